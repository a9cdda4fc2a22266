"""What moves the weights and how: optimizers, schedules, the moving average, dropout, and additions to the loss."""

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel

from .arguments import OptimizationArguments
from .data.batches import NOT_LEARNED, Batch
from .muon import local
from .optimizers import LEARNING_RATES, OPTIMIZERS, ParameterGroups


def make_optimizers(model: PreTrainedModel, arguments: OptimizationArguments) -> list[torch.optim.Optimizer]:
    """
    The optimizers that `arguments.optimizer` names. Each kind of parameter has a learning rate of its own. Only
    matrices have weight decay: a norm or a bias that shrinks changes what a layer computes, and does not make it
    simpler.
    """
    groups: ParameterGroups = {}
    for kind, parameters in parameters_by_kind(model).items():
        rate = arguments.learning_rate_of(kind)
        decay = 0.0 if kind == "vectors" else arguments.weight_decay
        groups[kind] = {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
    return OPTIMIZERS[arguments.optimizer].make(groups, arguments)


def parameters_by_kind(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters that learn, by the kinds of `LEARNING_RATES`; kinds without parameters are left out."""
    kind_of = {id(model.get_output_embeddings().weight): "head"}
    kind_of[id(model.get_input_embeddings().weight)] = "embedding"  # also where it is tied to the head
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in LEARNING_RATES}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "vectors" if parameter.ndim < 2 else kind_of.get(id(parameter), "matrices")
            kinds[kind].append(parameter)
    return {kind: parameters for kind, parameters in kinds.items() if parameters}


def make_schedulers(
    optimizers: list[torch.optim.Optimizer], arguments: OptimizationArguments, step: int
) -> list[LambdaLR]:
    """The schedules after `step` steps. The rate is a function of the step, so a checkpoint has no state of them."""
    share = functools.partial(share_of_peak, arguments=arguments)
    return [LambdaLR(optimizer, share, last_epoch=step - 1) for optimizer in optimizers]


def share_of_peak(step: int, arguments: OptimizationArguments) -> float:
    """
    The learning rate of a step as a share of its peak, equal to transformers' schedules of the same names. Those are
    not imported: their module imports peft and bitsandbytes, which takes as long as to import torch.
    """
    name, warmup, total = arguments.lr_scheduler_type, arguments.warmup_steps, arguments.max_steps
    if step < warmup:
        share = step / warmup
    elif name == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, total - warmup))))
    elif name == "linear":
        share = max(0.0, (total - step) / max(1, total - warmup))
    elif name == "wsd":
        decayed = max(0, step - (total - arguments.decay_steps))
        share = max(0.0, 1.0 - decayed / max(1, arguments.decay_steps))
    else:
        share = 1.0
    # As in transformers, only the warmup of wsd begins at the floor; the others begin at 0.
    if name == "wsd" or (name == "cosine" and step >= warmup):
        share = share * (1.0 - arguments.min_lr_rate) + arguments.min_lr_rate
    return share


class ExponentialMovingAverage:
    """
    The exponential moving average (EMA) of the trainable parameters (Polyak and Juditsky 1992). It is sharded like
    them.

    Args:
        decay: the share of the old average that each step keeps. In step n it is at most (1 + n) / (10 + n), so that
            the random weights of the start are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # The local parts of sharded tensors: torch does not compute with tensors of different meshes at once.
        averages, weights = (list(map(local, tensors.values())) for tensors in (self.averages, self.parameters))
        get_ema_multi_avg_fn(decay)(averages, weights, step)

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within the context, the weights of the model are the average."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_into_model(self.averages)
        try:
            yield
        finally:
            self.copy_into_model(own)

    @torch.no_grad()
    def copy_into_model(self, values: dict[str, torch.Tensor]) -> None:
        """Gives the trainable parameters these values, by name."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def training_loss(
    model: nn.Module, batch: Batch, tokens: float, label_smoothing: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to minimise and the cross-entropy to report: sums over a batch, divided by `tokens`."""
    if not (label_smoothing or z_loss):
        targets = batch.targets
        loss = model(
            **batch.inputs, labels=targets, shift_labels=targets, num_items_in_batch=tokens, use_cache=False
        ).loss
        return loss, loss.detach()
    logits = model(**batch.inputs, use_cache=False).logits  # (sequences, length, vocabulary)
    loss, cross_entropy = regularized_loss(logits, batch.targets, label_smoothing, z_loss)
    return loss / tokens, cross_entropy / tokens


def regularized_loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The loss to minimise and the plain cross-entropy to report, both as sums over all tokens in float32.

    The first is a cross-entropy in which the share `label_smoothing` of the target is spread evenly over the vocabulary
    (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567), plus `z_loss` (log Z)^2. Z is the sum of the exponentials
    of the logits, and this term keeps the logits near zero (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311).

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length); -100 is left out.
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
    # With --max_minutes, the first step is tried out before max_steps is known.
    share = min(1.0, step / max(1, arguments.max_steps - 1)) if step else 0.0
    if arguments.dropout_annealing == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return arguments.dropout_start + share * (arguments.dropout_end - arguments.dropout_start)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout of a transformers model: the modules, and the attribute `attention_dropout`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability
