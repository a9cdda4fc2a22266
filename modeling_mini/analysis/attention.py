"""Where the attention of a model goes: the entropy of every head, and maps. drawing.py draws them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class AttentionSummary:
    """
    Attention, averaged over the windows that it was measured on.

    Attributes:
        maps: (layers, heads, length, length), the mean weight that each query (row) gives each key (column).
        entropy: (layers, heads), in nats: the mean over windows and over all queries except the first of each window,
            which sees only one key.
        maximum_entropy: in nats, the same mean for uniform attention. Query t sees t + 1 keys, so its entropy is then
            ln(t + 1).
    """

    maps: torch.Tensor
    entropy: torch.Tensor
    maximum_entropy: float

    @property
    def share(self) -> torch.Tensor:
        """(layers, heads), the entropy as a share of the maximum: 0 is one key alone, 1 is all keys equally."""
        return self.entropy / self.maximum_entropy


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model is in evaluation mode, and its attention returns its weights."""
    implementation = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    try:
        model.set_attn_implementation("eager")
        model.eval()
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in training:
            module.training = True


@torch.no_grad()
def attention_weights(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """
    The attention of every head, `input_ids` (batch, length) to (layers, batch, heads, length, length).

    Raises:
        ValueError: if the model's attention is not eager, because no other returns weights (see `eager_attention`); or
            if it is eager and returns none.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(
            f"Attention weights need eager attention, and the model has {model.config._attn_implementation!r}: call "
            f"within `with eager_attention(model):`."
        )
    outputs = model(input_ids=input_ids.to(model.device), output_attentions=True, use_cache=False)
    if not outputs.attentions:
        raise ValueError(f"{type(model).__name__} returns no attention weights.")
    return torch.stack(outputs.attentions)


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """The entropy of distributions over the last dimension, in nats, in float32: (..., keys) to (...)."""
    return torch.special.entr(weights.float()).sum(dim=-1)


def summarize_attention(model: PreTrainedModel, windows: torch.Tensor) -> AttentionSummary:
    """
    Entropies and mean maps over `windows` (windows, length), which have no padding. The model is the same afterwards.
    One window is measured at a time, which needs layers * heads * length^2 * 8 bytes. The maximum entropy assumes that
    a token can see all tokens before it, which is not so in models with sliding windows.

    Raises:
        ValueError: if windows have fewer than two tokens, or the model's attention returns no weights.
    """
    length = windows.shape[1]
    if length < 2:
        raise ValueError("The first token can attend only to itself: give at least two tokens.")
    maps = entropies = 0
    with eager_attention(model):
        for window in windows:
            weights = attention_weights(model, window[None])[:, 0].float()
            maps = maps + weights / len(windows)
            entropies = entropies + entropy(weights)[..., 1:].mean(dim=-1) / len(windows)
    maximum = torch.arange(2, length + 1, dtype=torch.float64).log().mean().item()
    return AttentionSummary(maps.cpu(), entropies.cpu(), maximum)
