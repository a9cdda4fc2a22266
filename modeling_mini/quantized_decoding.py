"""
Decoding of models in INT8 and INT4 on a CPU: for one call of `generate`, their weights are dequantized.

A layer of bitsandbytes reads its weight anew in each call, and rounds its input too, which takes several times as long
as a product in float32. Here the weights are read once, into a copy of the model that shares everything else. The copy
then reads the prompt, and the fast path and the compiled step decode with it. So `generate` writes exactly what a model
with these rounded weights would write. When the call ends, the copy is gone.

The compiled step reads INT8 weights as they are: reading them takes most of its time. It computes with the same
numbers, because an integer and its scale give the dequantized weight.
"""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# A model whose weights would take more bytes, dequantized, is decoded layer by layer, in transformers' loop:
# people quantize models of that size because their memory has no space for them.
DEQUANTIZED_BYTES = 512 * 1024**2
LIBRARY = "bitsandbytes."
LARGEST_INTEGER = 127  # of INT8, which stands for the largest number of a row


def has_quantized_layers(model: PreTrainedModel) -> bool:
    """Whether the model is on a CPU and has layers of bitsandbytes whose weights are not too large when dequantized."""
    if not getattr(model, "is_quantized", False) or model.device.type != "cpu":
        return False
    layers = [module for module in model.modules() if type(module).__module__.startswith(LIBRARY)]
    size = sum(layer.in_features * layer.out_features for layer in layers) * model.dtype.itemsize
    return bool(layers) and size <= DEQUANTIZED_BYTES


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of a quantized model whose layers of bitsandbytes are linear layers with the same weights, in the type of the
    embedding. All other modules and parameters are those of the model itself, so the copy is for reading.
    """
    dtype = model.get_input_embeddings().weight.dtype
    return copy_of(
        model, lambda module: linear_of(module, dtype) if type(module).__module__.startswith(LIBRARY) else None
    )


def copy_of(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The copy of one module, and of all that it contains, with a replacement wherever there is one."""
    if (replaced := replacement(module)) is not None:
        return replaced
    copied = copy.copy(module)
    copied._modules = {
        name: child if child is None else copy_of(child, replacement) for name, child in module._modules.items()
    }
    return copied


class IntegerLinear(nn.Module):
    """
    A linear layer whose weight (out, in) is in INT8, with a scale for each row (out,). It is for the compiled step, and
    has no forward.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = bias


def with_integers(model: PreTrainedModel) -> PreTrainedModel:
    """What `dequantized` made, with an `IntegerLinear` for each layer that was in INT8. Other models are given back."""
    if not any(hasattr(module, "integers") for module in model.modules()):
        return model
    return copy_of(
        model,
        lambda module: IntegerLinear(*module.integers, module.bias) if hasattr(module, "integers") else None,
    )


def linear_of(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the weight of a `Linear8bitLt` or `Linear4bit`."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(layer.training)
    linear.weight = nn.Parameter(weight_of(layer).to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    if type(layer).__name__ == "Linear8bitLt":
        linear.integers = (layer.weight.data, scales_of(layer) / LARGEST_INTEGER)  # for `with_integers`
    # `obstacle` has to find hooks, or a `forward` of the instance, that somebody has put on the layer.
    linear._forward_pre_hooks, linear._forward_hooks = layer._forward_pre_hooks, layer._forward_hooks
    if "forward" in layer.__dict__:
        linear.__dict__["forward"] = layer.__dict__["forward"]
    return linear


def weight_of(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a layer of bitsandbytes in the type in which that library gives it."""
    functional = importlib.import_module("bitsandbytes.functional")
    if type(layer).__name__ == "Linear8bitLt":
        return functional.int8_vectorwise_dequant(layer.weight.data, scales_of(layer))
    weight, state = layer.weight.data, layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # On some processors the first call of a layer puts weight and scales in another order. The library's way back
        # rounds the scales once more, unless they were not nested.
        state = copy.copy(state)
        scales, state.original_nested = state.absmax, False
        weight, state = functional._convert_weight_packed_for_cpu_inverse(weight, state)
        state.absmax = scales.T.reshape(-1).float()
    return functional.dequantize_4bit(weight, state)


def scales_of(layer: Any) -> torch.Tensor:
    """The largest number of each row (out,) of a `Linear8bitLt`. Its first call moves them from weight to state."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
