"""
The optimizers that `--optimizer` knows. To add one, add an entry to `OPTIMIZERS`: the flag, its defaults, the groups of
parameters and the word in the model card come from there.

torch is imported within functions: the flags need this file, and their help should not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .arguments import OptimizationArguments

# The kinds of parameters, and the setting that holds the peak learning rate of each. `matrices` are those of the
# blocks; an embedding that is tied to the head is the embedding.
LEARNING_RATES = {
    "matrices": "learning_rate",
    "embedding": "embedding_learning_rate",
    "head": "head_learning_rate",
    "vectors": "vector_learning_rate",
}

ParameterGroups = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Optimizer:
    """
    Attributes:
        display_name: what cards and reports call it.
        make: the optimizers for parameter groups by kind; each group has `params`, `lr`, `initial_lr` and
            `weight_decay`.
        defaults: values of settings of OptimizationArguments that are not given.
        rates: the learning rate of a kind as a multiple of `learning_rate`, where it is not given; 1 if missing here.
        is_single: whether `make` gives one optimizer, which DeepSpeed needs.
    """

    display_name: str
    make: Callable[[ParameterGroups, OptimizationArguments], list[torch.optim.Optimizer]]
    defaults: dict[str, Any]
    rates: dict[str, float]
    is_single: bool = True


def make_adamw(groups: ParameterGroups, settings: OptimizationArguments) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""
    import torch

    if not groups:
        return []
    # Groups that differ in nothing are one: fewer kernels, and the states of older runs have the same groups.
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups.values():
        key = group["lr"], group["weight_decay"]
        known = merged.setdefault(key, {**group, "params": []})
        known["params"] = [*known["params"], *group["params"]]
    return [
        torch.optim.AdamW(
            list(merged.values()),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,  # one kernel for all parameters; a small model spends most of an unfused step on dispatch
        )
    ]


def make_muon(groups: ParameterGroups, settings: OptimizationArguments) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, and AdamW for the rest: rows of the embedding and the head are tokens."""
    from .muon import Muon

    rest = dict(groups)
    matrices = rest.pop("matrices", None)
    muon = [Muon([matrices], momentum=settings.muon_momentum, iterations=settings.muon_iterations)] if matrices else []
    return [*muon, *make_adamw(rest, settings)]


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        display_name="AdamW",
        make=make_adamw,
        defaults={"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 1.0},
        rates={},
    ),
    "muon": Optimizer(
        display_name="Muon and AdamW",
        make=make_muon,
        defaults={"learning_rate": 0.02, "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 0.0},
        rates={"embedding": 0.5, "head": 0.15, "vectors": 0.15},
        is_single=False,
    ),
}
