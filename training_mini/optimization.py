"""The optimizer and the learning rate."""

import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from .arguments import RunArguments


def make_optimizer(model: nn.Module, arguments: RunArguments) -> torch.optim.Optimizer:
    """
    AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101). Only matrices decay: a norm or bias that is
    pulled to zero changes what the layer computes, not how complex it is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,  # one kernel for all parameters; a small model spends most of an unfused step on dispatch
    )


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: RunArguments) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warmup, then a cosine down to `min_lr_rate` of the peak."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=arguments.warmup_steps,
        num_training_steps=arguments.max_steps,
        min_lr_rate=arguments.min_lr_rate,
    )
