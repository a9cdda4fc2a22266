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
        return math.exp(min(self.loss, 700.0))  # e^709 is the largest double


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
    starts = np.arange(0, len(ids), length)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    # The last window may be shorter; it goes alone.
    full = [start for start in mine if start + length <= len(ids)]
    share = max(1, batch_size // accelerator.num_processes)
    groups = [(full[i : i + share], length) for i in range(0, len(full), share)]
    groups += [([start], len(ids) - start) for start in mine if start + length > len(ids)]
    # All processes take as many turns, with nothing to do in the last ones of some: they ask `should_stop`, and a
    # sharded model gathers its weights, together.
    turns = math.ceil(math.ceil(len(starts) / accelerator.num_processes) / share) + 1
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for turn in range(turns):
                if should_stop():
                    return None
                group, group_length = groups[turn] if turn < len(groups) else ([0], 1)
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
