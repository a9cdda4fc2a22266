"""A moving average of the weights, which often predicts better than the last of them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """
    The exponential moving average of the trainable parameters (Polyak and Juditsky 1992), sharded where they are.

    Args:
        decay: the share of the old average that each step keeps. For the first steps it is (1 + n) / (10 + n) if that
            is less, so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), list(self.parameters.values()), step)

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model with the average as its weights."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_into_model(self.averages)
        try:
            yield
        finally:
            self.copy_into_model(own)

    @torch.no_grad()
    def copy_into_model(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
