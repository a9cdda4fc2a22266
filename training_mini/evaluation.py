"""How well a model predicts held-out text, in units that mean the same for every tokenizer."""

import gzip
import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .batches import make_rows


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
    context_length: int,
    batch_size: int,
    bos_token_id: int,
    accelerator: Accelerator,
) -> Evaluation:
    """
    Predicts every token of `ids` once, in windows of one context that do not overlap, shared out over all processes.

    Nats and bytes are summed, never averaged over batches, so the figure is the same for any batch size and any number
    of processes.
    """
    starts = np.arange(0, len(ids), context_length)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    # The last window may be shorter; it goes alone.
    full = [start for start in mine if start + context_length <= len(ids)]
    groups = [(full[i : i + batch_size], context_length) for i in range(0, len(full), batch_size)]
    groups += [([start], len(ids) - start) for start in mine if start + context_length > len(ids)]
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for group, length in groups:
            inputs, targets = (t.to(accelerator.device) for t in make_rows(ids, group, length, bos_token_id))
            with accelerator.autocast():
                logits = model(input_ids=inputs, use_cache=False).logits
            nats += nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    model.train(was_training)
    total_nats = accelerator.reduce(nats, reduction="sum").item()
    total_bytes = max(1, int(bytes_per_token[ids].sum()))
    return Evaluation(loss=total_nats / len(ids), bits_per_byte=total_nats / math.log(2) / total_bytes)


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9` need for the same bytes: the number that a language model has to beat."""
    compressed = {"gzip": gzip.compress(text, compresslevel=9), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / max(1, len(text)) for name, data in compressed.items()}
