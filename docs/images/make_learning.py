"""
Makes the pictures of docs/LEARNING.md anew: `python docs/images/make_learning.py`

What can be computed is computed here, with the functions that train; the losses are those of docs/LOG.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import matplotlib.pyplot as plt
import torch
from training_mini.arguments import parse_arguments
from training_mini.muon import orthogonalize
from training_mini.optimization import share_of_peak

FOLDER = Path(__file__).parent
# Nats per character on Tiny Shakespeare after the change of the name, with as many tokens (docs/LOG.md); one seed.
CHANGES = {
    "without QK-norm": 1.7224 - 1.6750,
    "batches of 16, half the steps": 1.7336 - 1.6822,
    "context of 256, half the steps": 1.7673 - 1.6822,
    "learning rate 0.04": 1.8672 - 1.8437,
    "output projections from zero": 1.8690 - 1.8437,
    "learning rate 0.03": 1.5785 - 1.5673,
    "5 iterations of Muon": 1.5751 - 1.5673,
    "LayerNorm": 1.6801 - 1.6750,
    "2 heads of 64": 1.5707 - 1.5673,
}


def singular_values() -> None:
    """What Muon makes of a gradient in which a few directions are strong."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(128, 128)).Q for _ in range(2))
    gradient = left @ torch.diag(torch.logspace(0, -2, 128)) @ right
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(torch.linalg.svdvals(gradient), label="gradient, as SGD takes it")
    for iterations in (1, 3, 5):
        values = torch.linalg.svdvals(orthogonalize(gradient[None], iterations)[0])
        axes.plot(values, label=f"Muon, {iterations} iteration{'s' * (iterations > 1)}")
    axes.set(xlabel="direction, strongest first", ylabel="length of the step in it", ylim=(0, None))
    axes.legend()
    save(figure, "learning-muon.png")


def schedule() -> None:
    """The learning rate over the first command, and over the other schedules."""
    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for name in ("linear", "cosine", "wsd", "constant"):
        settings = parse_arguments(["--lr_scheduler_type", name]).optimization
        steps = range(0, settings.max_steps + 1, 10)
        axes.plot(
            steps, [share_of_peak(step, settings) for step in steps], label=name, lw=2.5 if name == "linear" else 1
        )
    axes.set(xlabel="step", ylabel="share of the learning rate")
    axes.legend()
    save(figure, "learning-schedule.png")


def changes() -> None:
    """What each change of the recipe costs."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    names = sorted(CHANGES, key=CHANGES.get)
    bars = axes.barh(names, [CHANGES[name] for name in names])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(
        xlabel="nats per character more than the recipe\n(one seed each; seeds differ by 0.01 to 0.04)", xlim=(0, 0.1)
    )
    save(figure, "learning-changes.png")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(FOLDER / name, dpi=120)
    print(FOLDER / name)


if __name__ == "__main__":
    singular_values()
    schedule()
    changes()
