"""Measures how well a model predicts held-out text, in units that can be compared between tokenizers."""

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .data.batches import Batch, Collator


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        loss: mean cross-entropy in nats per token.
        bits_per_byte: the total cross-entropy in bits, divided by the bytes of the text. Unlike loss and perplexity it
            can be compared between tokenizers, and with a compressor.
    """

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def metrics(self) -> dict[str, float]:
        """The figures for `metrics.jsonl`."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_bits_per_byte": self.bits_per_byte,
        }

    def description(self, compressors: dict[str, float]) -> str:
        """The figures as a phrase, with the bits per byte that compressors need for the same text."""
        needed = ", ".join(f"{name} -9: {bits:.4f}" for name, bits in compressors.items())
        return (
            f"validation loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, "
            f"bits per byte {self.bits_per_byte:.4f} ({needed})"
        )


def perplexity_of(loss: float) -> float:
    """The perplexity of a mean cross-entropy in nats."""
    return math.exp(min(loss, 700.0))  # e^709 is the largest double


class HeldOut(Protocol):
    """
    Held-out text or examples, which are never trained on.

    Attributes:
        ids: the tokens that are predicted, `(tokens,)`.
        bytes: how many bytes of text they stand for.
    """

    ids: np.ndarray
    bytes: int

    def groups(self, process: int, num_processes: int, share: int) -> list[Any]:
        """The part of one process: groups of at most `share` sequences, each for one call of `make`."""

    def make(self, group: Any) -> Batch:
        """The batch of a group."""

    def windows(self, count: int) -> torch.Tensor:
        """The inputs of the first windows, at most `count` of them, `(windows, length)`."""


class HeldOutText:
    """
    Held-out text in windows of one context. They do not overlap, and every token is predicted once.

    Args:
        ids: `(tokens,)`.
        bytes_per_token: `(vocabulary,)`.
    """

    def __init__(self, ids: np.ndarray, bytes_per_token: np.ndarray, collator: Collator) -> None:
        self.ids, self.collator = ids, collator
        self.bytes = max(1, int(bytes_per_token[ids].sum()))

    def groups(self, process: int, num_processes: int, share: int) -> list[tuple[list[int], int]]:
        """Where the windows of each group start, and how long they are."""
        length = self.collator.context_length
        starts = range(process * length, len(self.ids), num_processes * length)
        full = [start for start in starts if start + length <= len(self.ids)]
        groups = [(full[i : i + share], length) for i in range(0, len(full), share)]
        # The last window may be shorter; it goes alone.
        return groups + [([start], len(self.ids) - start) for start in starts[len(full) :]]

    def make(self, group: tuple[list[int], int]) -> Batch:
        starts, length = group
        return self.collator.make(self.ids, starts, length)

    def windows(self, count: int) -> torch.Tensor:
        length = min(self.collator.context_length, len(self.ids))
        starts = range(0, len(self.ids) - length + 1, length)[:count]
        return self.collator.make(self.ids, starts, length).inputs["input_ids"]


def evaluate(
    model: nn.Module,
    held_out: HeldOut,
    batch_size: int,
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
    tensor_size: int = 1,
) -> Evaluation | None:
    """
    Predicts every held-out token once. The processes share the work.

    Nats and bytes are summed and never averaged over batches. So the figure is the same for any batch size and any
    number of processes.

    Args:
        batch_size: sequences at a time, over all processes.
        tensor_size: so many neighbouring processes compute the same.
        should_stop: asked between batches, by all processes together; if it says yes, the result is `None`.
    """
    processes = accelerator.num_processes // tensor_size
    share = max(1, batch_size // processes)
    groups = held_out.groups(accelerator.process_index // tensor_size, processes, share)
    # All processes take the same number of turns, because they ask `should_stop` together, and a sharded model gathers
    # its weights together. In the last turn, some have nothing to add.
    turns = max(len(held_out.groups(process, processes, share)) for process in range(processes))
    idle = held_out.groups(0, processes, share)[0]
    nats = [torch.zeros((), device=accelerator.device)]  # of each batch
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for turn in range(turns):
                if should_stop():
                    return None
                batch = held_out.make(groups[turn] if turn < len(groups) else idle).to(accelerator.device)
                with accelerator.autocast():
                    logits = model(**batch.inputs, use_cache=False).logits
                if turn < len(groups):
                    targets = batch.targets.flatten()
                    nats.append(nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
    finally:
        model.train(was_training)
    total_nats = torch.stack(nats).cpu().double().sum()  # Apple's GPUs have no float64
    if accelerator.num_processes > 1:
        total_nats = accelerator.reduce(total_nats.to(accelerator.device), reduction="sum")
    total_nats = total_nats.item() / tensor_size
    bits_per_byte = total_nats / math.log(2) / held_out.bytes
    return Evaluation(loss=total_nats / len(held_out.ids), bits_per_byte=bits_per_byte)


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """The bits per byte that `gzip -9` and `xz -9` need for a text. A language model should need fewer."""
    # As `xz -9`, but its dictionary of 64 MiB is made no larger than the text: to allocate all of it takes a tenth of a
    # second.
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(64 * 2**20, max(4096, len(text)))}]
    compressed = {"gzip": gzip.compress(text, compresslevel=9), "xz": lzma.compress(text, filters=xz)}
    return {name: 8 * len(data) / max(1, len(text)) for name, data in compressed.items()}
