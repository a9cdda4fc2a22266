"""
The optimizers that `--optimizer` knows. To add one, add an entry to `OPTIMIZERS`: the flag, its defaults, the groups of
parameters and the word in the model card come from there.

torch is imported inside the functions, because the command line needs this file and `--help` should not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# The kinds of parameters, and the setting with the peak learning rate of each. `matrices` are the matrices of the
# blocks. An embedding that is also the head counts as `embedding`.
LEARNING_RATES = {
    "matrices": "learning_rate",
    "embedding": "embedding_learning_rate",
    "head": "head_learning_rate",
    "vectors": "vector_learning_rate",
}

ParameterGroups = dict[str, dict[str, Any]]


class OptimizerSettings(Protocol):
    """What the optimizers below read of `OptimizationArguments`, which imports this file."""

    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    muon_momentum: float
    muon_iterations: int
    muon_dtype: str | None


@dataclass(frozen=True)
class Optimizer:
    """
    Attributes:
        display_name: its name in cards and reports.
        make: makes the optimizers from parameter groups by kind. Each group has `params`, `lr`, `initial_lr` and
            `weight_decay`.
        defaults: the values of settings of OptimizationArguments that the user did not give.
        rates: for each kind, the default of its learning rate as a multiple of `learning_rate`; 1 for other kinds.
        is_single: whether `make` returns one optimizer, as DeepSpeed needs.
    """

    display_name: str
    make: Callable[[ParameterGroups, OptimizerSettings], list[torch.optim.Optimizer]]
    defaults: dict[str, Any]
    rates: dict[str, float]
    is_single: bool = True


def make_adamw(groups: ParameterGroups, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""
    import torch

    if not groups:
        return []
    # Groups with equal settings are merged: that needs fewer kernels, and the states of older runs have such groups.
    # Parameters of different meshes of processes stay apart, because a kernel takes those of one mesh.
    merged: dict[tuple[float, float, Any], dict[str, Any]] = {}
    for group in groups.values():
        for parameter in group["params"]:
            key = group["lr"], group["weight_decay"], getattr(parameter, "device_mesh", None)
            merged.setdefault(key, {**group, "params": []})["params"].append(parameter)
    return [
        torch.optim.AdamW(
            list(merged.values()),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,  # one kernel for all parameters; otherwise a small model spends most of the step on calls
        )
    ]


def make_muon(groups: ParameterGroups, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """
    Muon for the matrices of the blocks, AdamW for the rest: a row of the embedding or the head is one token.

    Raises:
        ValueError: for a model with other weights, such as those of all experts of a layer in one tensor.
    """
    import torch

    from .muon import Muon

    rest = dict(groups)
    matrices = rest.pop("matrices", None)
    adamw = make_adamw(rest, settings)
    if matrices is None:
        return adamw
    if shape := next((tuple(parameter.shape) for parameter in matrices["params"] if parameter.ndim != 2), None):
        raise ValueError(
            f"--optimizer muon takes matrices, and the model has weights of shape {shape}, which are several in one: "
            f"give --optimizer adamw."
        )
    dtype = getattr(torch, settings.muon_dtype) if settings.muon_dtype is not None else None
    muon = Muon([matrices], momentum=settings.muon_momentum, iterations=settings.muon_iterations, dtype=dtype)
    return [muon, *adamw]


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
