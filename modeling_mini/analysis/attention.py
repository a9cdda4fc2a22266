"""Where the attention of a model goes: the entropy of every head, and maps."""

import contextlib
import os
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


# Inches for one token at which a label of 7 points fits, and the edge of one map in inches.
LABEL_PITCH, SMALLEST_MAP, LARGEST_MAP = 0.12, 1.5, 4.8


def draw_attention(
    summary: AttentionSummary, path: str | os.PathLike, labels: list[str] | None = None, title: str = ""
) -> None:
    """
    Writes a PNG of all maps, a row for each layer and a column for each head, with the entropy of each as a share of
    the maximum. The labels of the tokens are at the left and the bottom of the grid. Where they are too many to be
    read, the numbers of the positions are there.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.ticker import MaxNLocator

    from .figures import figure_file

    layers, heads, length, _ = summary.maps.shape
    if labels is not None and length * LABEL_PITCH > LARGEST_MAP:
        labels = None
    if labels is not None:
        font = get_font(findfont("DejaVu Sans"))
        # Characters that the font does not have would all be the same empty box.
        labels = ["".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in label) for label in labels]
    edge = max(length * LABEL_PITCH, SMALLEST_MAP) if labels is not None else 2.0
    future = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    color = colormaps["magma_r"].with_extremes(bad="#e8e8e8")
    with figure_file(path, figsize=(heads * edge + 1.5, layers * (edge + 0.25) + 0.8)) as figure:
        axes = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for layer, row in enumerate(axes):
            for head, axis in enumerate(row):
                # The colour is that of the square root, because most weights are small and 1 % should be visible.
                image = axis.imshow(
                    summary.maps[layer, head].masked_fill(future, torch.nan).numpy(),
                    norm=PowerNorm(0.5, vmin=0, vmax=1),
                    cmap=color,
                    interpolation="nearest" if length <= 64 else "auto",
                )
                axis.set_title(f"layer {layer} head {head}: {summary.share[layer, head]:.0%}", fontsize=8, pad=3)
                axis.spines[:].set_visible(False)
                axis.tick_params(length=0)
        if labels is None:
            axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
            axes[0, 0].yaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            for axis in axes[:, 0]:
                axis.set_yticks(range(length), labels, fontsize=7, parse_math=False)
            for axis in axes[-1]:
                axis.set_xticks(range(length), labels, fontsize=7, parse_math=False)
                for tick, label in zip(axis.get_xticklabels(), labels, strict=True):
                    tick.set_rotation(90 if len(label) > 1 else 0)
        figure.supylabel("query: the token that attends")
        figure.supxlabel("key: the token attended to")
        bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, pad=0.01)
        bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
        bar.set_label("attention weight")
        bar.outline.set_visible(False)
        explanation = "Percentages: entropy as a share of uniform attention"
        figure.suptitle(f"{title}\n{explanation}" if title else explanation, fontsize=10, parse_math=False)
