"""What keeps a model from being too sure: label smoothing, the z-loss, and dropout that changes over the run."""

import math

import torch
from torch import nn

from .arguments import OptimizationArguments
from .batches import NOT_LEARNED


def regularized_loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums over all tokens, in float32: the loss to minimise, and the plain cross-entropy to report.

    With Z the sum of exponentials over the vocabulary, the first is the cross-entropy with a target of which
    `label_smoothing` is spread evenly over the vocabulary (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567), plus
    `z_loss` (log Z)^2, which holds the logits near zero (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311).

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length); -100 counts nothing.
    """
    counts = targets != NOT_LEARNED
    logits, targets = logits[counts].float(), targets[counts]
    log_partition = logits.logsumexp(dim=-1)
    cross_entropy = log_partition - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = cross_entropy
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_partition - logits.mean(dim=-1))
    if z_loss:
        loss = loss + z_loss * log_partition.square()
    return loss.sum(), cross_entropy.detach().sum()


def dropout_at(step: int, arguments: OptimizationArguments) -> float | None:
    """The dropout of the step after `step` steps: `dropout_start` at the first, `dropout_end` at the last."""
    if arguments.dropout_start is None or arguments.dropout_end is None:
        return None
    share = min(1.0, step / max(1, arguments.max_steps - 1))
    if arguments.dropout_annealing == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return arguments.dropout_start + share * (arguments.dropout_end - arguments.dropout_start)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout of a model in the manner of transformers: modules, and the attribute of attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability
