"""
Faster float32 matrix products for training on AMD processors.

On these, torch computes matrix products with MKL, which is about half as fast as oneDNN in the same torch. Torch has no
switch for this. So when a model trains on such a CPU, its linear layers call oneDNN themselves.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import nn


@torch.library.custom_op("mini::linear_product", mutates_args=())  # torch.compile does not look inside
def linear_product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs` (..., k) times the transpose of `weight` (n, k), plus `bias` (n,), by oneDNN and without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@linear_product.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


class OneDnnLinear(torch.autograd.Function):
    """`nn.functional.linear` with oneDNN in the forward and the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        return linear_product(inputs, weight, bias)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_inputs = linear_product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        of_weight = linear_product(rows.t(), inputs.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_inputs, of_weight, rows.sum(0) if ctx.has_bias else None


def linear_forward(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return OneDnnLinear.apply(inputs, module.weight, module.bias)


def use_onednn(model: nn.Module) -> None:
    """Makes the linear layers of a model use oneDNN. Weights and checkpoints do not change."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(linear_forward, module)


def onednn_is_faster() -> bool:
    """
    Whether this CPU is from AMD and this torch has the operation. The vendor decides and not a measurement, so that a
    run that is resumed on the same machine computes the same, bit by bit.
    """
    cpu_info = Path("/proc/cpuinfo")
    is_amd = platform.system() == "Linux" and cpu_info.is_file() and "AuthenticAMD" in cpu_info.read_text()
    return is_amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
