"""
Faster float32 matrix products for training on AMD processors.

There, torch's products go to MKL, which reaches about half of what oneDNN, in the same torch, does. Torch has no switch
for it, so the linear layers of a model that trains on such a CPU call oneDNN themselves.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import nn


@torch.library.custom_op("mini::linear_product", mutates_args=())  # so that torch.compile takes it as it is
def linear_product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs` (..., k) times the transpose of `weight` (n, k), plus `bias` (n,): oneDNN's, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@linear_product.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


class OneDnnLinear(torch.autograd.Function):
    """`nn.functional.linear` with oneDNN in both directions."""

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
    """Lets the linear layers of a model multiply by oneDNN. Its weights and what is saved of it stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(linear_forward, module)


def onednn_is_faster() -> bool:
    """
    Whether this CPU is AMD's and this torch has the operation. By the vendor and not by a measurement: a run that is
    resumed on the same machine takes the same way, bit by bit.
    """
    cpu_info = Path("/proc/cpuinfo")
    is_amd = platform.system() == "Linux" and cpu_info.is_file() and "AuthenticAMD" in cpu_info.read_text()
    return is_amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
