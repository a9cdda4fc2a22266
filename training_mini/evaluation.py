"""How well a model predicts held-out text, in units that mean the same for every tokenizer."""

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .batches import RowMaker


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        loss: mean cross-entropy in nats per token.
        bits_per_byte: total cross-entropy in bits over the bytes of text that the tokens stand for. Unlike loss and
            perplexity it can be compared between tokenizers, and with a compressor.
    """

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """The perplexity of a mean cross-entropy in nats."""
    return math.exp(min(loss, 700.0))  # e^709 is the largest double


def evaluate(
    model: nn.Module,
    ids: np.ndarray,
    bytes_per_token: np.ndarray,
    rows: RowMaker,
    batch_size: int,
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """
    Predicts every token of `ids` once, in windows of one context that do not overlap, shared out over all processes.

    Nats and bytes are summed, never averaged over batches, so the figure is the same for any batch size and any number
    of processes.

    Args:
        batch_size: windows at a time, over all processes.
        should_stop: asked between batches, by all processes together; if it says yes, the result is `None`.
    """
    length = rows.context_length
    share = max(1, batch_size // accelerator.num_processes)

    def groups_of(process: int) -> list[tuple[list[int], int]]:
        """Where the windows of each of its turns start, and how long they are."""
        starts = range(process * length, len(ids), accelerator.num_processes * length)
        full = [start for start in starts if start + length <= len(ids)]
        groups = [(full[i : i + share], length) for i in range(0, len(full), share)]
        # The last window may be shorter; it goes alone.
        return groups + [([start], len(ids) - start) for start in starts[len(full) :]]

    groups = groups_of(accelerator.process_index)
    # All processes take as many turns, some with nothing to add in the last: they ask `should_stop`, and a sharded
    # model gathers its weights, together.
    turns = max(len(groups_of(process)) for process in range(accelerator.num_processes))
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for turn in range(turns):
                if should_stop():
                    return None
                group, group_length = groups[turn] if turn < len(groups) else ([0], min(length, len(ids)))
                batch = rows.make(ids, group, group_length).to(accelerator.device)
                with accelerator.autocast():
                    logits = model(**batch.inputs, use_cache=False).logits
                if turn < len(groups):
                    nats += nn.functional.cross_entropy(
                        logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum"
                    )
    finally:
        model.train(was_training)
    total_nats = accelerator.reduce(nats, reduction="sum").item()
    total_bytes = max(1, int(bytes_per_token[ids].sum()))
    return Evaluation(loss=total_nats / len(ids), bits_per_byte=total_nats / math.log(2) / total_bytes)


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` need for the same bytes: the number that a language model has to beat."""
    compressed = {"gzip": gzip.compress(text, compresslevel=9), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / max(1, len(text)) for name, data in compressed.items()}
