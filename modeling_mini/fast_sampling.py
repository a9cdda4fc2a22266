"""
Sampling for one sequence: the tokens of transformers' warpers and `torch.multinomial`, in a fraction of their time.

Temperature, top-k, top-p and the draw are two dozen calls of torch on a few hundred numbers. They take 76 microseconds,
a compiled step of `small` about 250 (docs/LOG.md). A call of numpy costs less, and most of the work is only for the
tokens that top-k leaves: 40 microseconds. The random numbers are those that `torch.multinomial` draws, from the same
generator. numpy may round the last bits of a probability differently; where that could matter, torch decides.
"""

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers.generation import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order of `generate`
# Results of torch and numpy for the same numbers differ by less than this share of the largest.
MARGIN = 1e-5


class FastSampler:
    """
    Draws one token from scores (1, vocab_size) in float32 on a CPU.

    Args:
        warpers: some of `WARPERS`, each at most once and in that order.
    """

    def __init__(self, warpers: Iterable[LogitsProcessor]) -> None:
        self.warpers = list(warpers)
        by_class = {type(warper): warper for warper in self.warpers}
        temperature, top_k, top_p = (by_class.get(kind) for kind in WARPERS)
        self.temperature = 1.0 if temperature is None else float(temperature.temperature)
        self.top_k: int | None = None if top_k is None else top_k.top_k
        self.removed = 0.0 if top_p is None else 1 - top_p.top_p  # top-p removes at most this much probability

    @classmethod
    def taken_from(cls, processors: list[LogitsProcessor]) -> tuple[list[LogitsProcessor], "FastSampler | None"]:
        """The processors that are left, and the sampler in place of the last ones; `None` if it cannot replace them."""
        rest = list(processors)
        warpers: list[LogitsProcessor] = []
        for kind in reversed(WARPERS):
            if rest and type(rest[-1]) is kind:
                warpers.insert(0, rest.pop())
        keeps_one = all(getattr(warper, "min_tokens_to_keep", 1) == 1 for warper in warpers)
        fills_with_nothing = all(getattr(warper, "filter_value", -math.inf) == -math.inf for warper in warpers)
        if not keeps_one or not fills_with_nothing:
            return list(processors), None
        return rest, cls(warpers)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """
        The token (1,).

        Raises:
            RuntimeError: if scores are not finite, as `torch.multinomial` does.
        """
        values = scores.numpy()[0]
        if self.temperature != 1:
            values = values / self.temperature
        highest = values.max()
        if not math.isfinite(highest):  # NaN, too
            return torch.multinomial(F.softmax(self.warped(scores), dim=-1), num_samples=1).squeeze(1)
        kept = None  # the tokens that may be drawn; `None` for all
        if self.top_k is not None and self.top_k < len(values):
            ascending = values.copy()
            ascending.partition(-self.top_k)
            least = ascending[-self.top_k]
            kept = (values >= least).nonzero()[0]
            values = values[kept]
        weights = torch.from_numpy(values - highest).exp_().numpy()
        is_certain = True  # whether top-p leaves the same tokens as in torch, however the last bits are rounded
        if self.removed > 0:
            ascending = weights.copy()
            ascending.sort()
            sums = ascending.cumsum(dtype=float)
            bound = self.removed * sums[-1]
            first = min(int(sums.searchsorted(bound)), len(sums) - 1)  # the smallest weight that stays
            # It is not certain if a sum is near the bound, or if the last weight removed equals the first that stays.
            near = MARGIN * sums[-1]
            is_certain = abs(sums[first] - bound) > near
            if first:
                last_removed = ascending[first - 1]
                is_certain &= bound - sums[first - 1] > near and last_removed < ascending[first] * (1 - MARGIN)
                stay = (weights >= ascending[first]).nonzero()[0]
                weights = weights[stay]
                kept = stay if kept is None else kept[stay]
        # This is what torch.multinomial does for one sample: a race of exponential clocks.
        times = torch.empty_like(scores).exponential_(1)
        clocks = times.numpy()[0]
        rates = weights / (clocks if kept is None else clocks[kept])
        winner = int(rates.argmax())
        if is_certain and (rates >= rates[winner] * (1 - MARGIN)).sum() == 1:
            return torch.tensor([winner if kept is None else int(kept[winner])])
        return (F.softmax(self.warped(scores), dim=-1) / times).argmax(dim=-1)

    def warped(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores as transformers' warpers leave them."""
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores
