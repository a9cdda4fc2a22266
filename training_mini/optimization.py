"""The optimizer and the learning rate."""

import functools
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from .arguments import OptimizationArguments


def make_optimizers(model: PreTrainedModel, arguments: OptimizationArguments) -> list[torch.optim.Optimizer]:
    """
    AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) for all parameters, or Muon (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks and AdamW for the rest. Only
    matrices decay: a norm or bias that is pulled to zero changes what the layer computes, not how complex it is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if arguments.optimizer == "muon":
        matrices = block_matrices(model)
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=arguments.learning_rate,
                weight_decay=arguments.weight_decay,
                momentum=arguments.muon_momentum,
                # Updates as large as AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that one learning
                # rate serves both.
                adjust_lr_fn="match_rms_adamw",
            )
        )
        taken = {id(matrix) for matrix in matrices}
        parameters = [parameter for parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if groups := [group for group in groups if group["params"]]:  # all of an adapter may be matrices
        optimizers.append(
            torch.optim.AdamW(
                groups,
                lr=arguments.learning_rate,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
                fused=True,  # one kernel for all parameters; a small model spends most of an unfused step on dispatch
            )
        )
    return optimizers


def block_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The matrices of the hidden layers: not the embedding and the head, whose rows are tokens."""
    token_matrices = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in token_matrices]


def make_schedulers(
    optimizers: list[torch.optim.Optimizer], arguments: OptimizationArguments, step: int
) -> list[LambdaLR]:
    """Schedules that stand after `step` steps; the rate is a function of the step, so there is nothing to save."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = arguments.learning_rate
    share = functools.partial(share_of_peak, arguments=arguments)
    return [LambdaLR(optimizer, share, last_epoch=step - 1) for optimizer in optimizers]


def share_of_peak(step: int, arguments: OptimizationArguments) -> float:
    """
    The learning rate of a step as a share of its peak: what transformers' schedules of these names give. They are not
    imported, because their module imports peft and bitsandbytes, which takes as long as torch itself.
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
    # As in transformers: only wsd warms up from its floor.
    if name == "wsd" or (name == "cosine" and step >= warmup):
        share = share * (1.0 - arguments.min_lr_rate) + arguments.min_lr_rate
    return share
