"""Pictures of what attention.py and activations.py measure."""

import math
import os
import re

import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from .activations import DEAD_SHARE, ActivationStatistics
from .attention import AttentionSummary
from .figures import figure_file

# Inches for one token at which a label of 7 points fits, and the edge of one map in inches.
LABEL_PITCH, SMALLEST_MAP, LARGEST_MAP = 0.12, 1.5, 4.8
# The kinds of sites within a layer: what follows `layers.N` in their names, and their label, colour and marker.
KINDS = {
    "": ("residual stream", "#252525", "o"),
    ".self_attn": ("attention output", "#3182bd", "s"),
    ".mlp": ("SwiGLU output", "#e6550d", "^"),
    ".mlp.hidden": ("SwiGLU hidden units", "#fdae6b", "v"),
}


def draw_attention(
    summary: AttentionSummary, path: str | os.PathLike, labels: list[str] | None = None, title: str = ""
) -> None:
    """
    Writes a PNG of all maps, a row for each layer and a column for each head, with the entropy of each as a share of
    the maximum. The labels of the tokens are at the left and the bottom of the grid. Where they are too many to be
    read, the numbers of the positions are there.
    """
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


def draw_activations(
    activations: dict[str, ActivationStatistics],
    gradients: dict[str, float],
    path: str | os.PathLike,
    title: str = "",
) -> None:
    """Writes a PNG with one panel for each statistic, over layers, and one for `gradients` (see `gradient_norms`)."""
    layers = sum(re.fullmatch(r"layers\.\d+", site) is not None for site in activations)
    panels = {
        "rms": ("rms", "linear"),
        "largest": ("largest magnitude", "log"),
        "kurtosis": ("kurtosis (3 is normal)", "log"),
        "mean": ("mean", "linear"),
        "dead": (f"dead units (never above {DEAD_SHARE:.0%} of the rms)", "linear"),
    }
    line = {"linewidth": 1.2, "clip_on": False}
    with figure_file(path, figsize=(11, 6.2)) as figure:
        axes = figure.subplots(2, 3).flat
        for axis, (field, (name, scale)) in zip(axes, panels.items(), strict=False):
            for suffix, (label, color, marker) in KINDS.items():
                if f"layers.0{suffix}" not in activations:  # blocks of others may have other parts
                    continue
                values = [getattr(activations[f"layers.{layer}{suffix}"], field) for layer in range(layers)]
                axis.plot(range(layers), values, color=color, marker=marker, markersize=4, label=label, **line)
            axis.set_title(name, loc="left", fontsize=9)
            if scale == "log":
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
        axes[2].axhline(3, color="#969696", linestyle=":", linewidth=1)
        axes[3].axhline(0, color="#969696", linestyle=":", linewidth=1)
        axes[4].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[4].set_ylim(0, max(0.1, 1.1 * max(statistics.dead for statistics in activations.values())))
        for suffix in (".self_attn", ".mlp"):
            label, color, marker = KINDS[suffix]
            values = [gradients.get(f"layers.{layer}{suffix}", math.nan) for layer in range(layers)]
            label = label.split()[0]
            axes[5].plot(range(layers), values, color=color, marker=marker, markersize=4, label=label, **line)
        for style, group in (("--", "embed_tokens"), (":", "norms"), ("-.", "lm_head")):
            if group in gradients:
                axes[5].axhline(gradients[group], color="#636363", linestyle=style, linewidth=1, label=group)
        axes[5].set_title("gradient norm", loc="left", fontsize=9)
        axes[5].set_ylim(bottom=0)
        axes[5].legend(frameon=False, fontsize=7)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.set_xlabel("layer")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(KINDS), frameon=False)
        figure.suptitle(title or "Activations", x=0.01, ha="left", parse_math=False)
