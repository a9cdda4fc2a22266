"""
Decoding of models in INT8 and INT4 on a CPU: what is written is what a model with the dequantized weights writes.

A layer of bitsandbytes reads its weight anew in each call, and rounds its input too, which takes several times as long
as a product in float32. Without a compiled step, the weights are dequantized for one call of `generate`, into a copy of
the model that shares everything else. The copy reads the prompt, and the fast path decodes with it. When the call ends,
the copy is gone.

The compiled step reads the weights as they are stored: reading them takes most of its time. It computes with the same
numbers, because an integer and its scale, or four bits and the scale of their block, give the dequantized weight. Only
a prompt that is too long for it is read by a copy with dequantized weights.
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
    if not module._modules:
        return module
    copied = copy.copy(module)
    copied._modules = {
        name: child if child is None else copy_of(child, replacement) for name, child in module._modules.items()
    }
    return copied


class QuantizedLinear(nn.Module):
    """
    The weight of a `Linear8bitLt` or `Linear4bit` as it is stored, for the compiled step. It has no forward.

    Attributes:
        format: "int8"; in INT4 the type and the size of a block, such as "nf4 64"; "" where only `dequantized` can be
            used.
        weight: (out, in) in INT8; in INT4 bytes of two weights each, the first in the upper four bits.
        scales: (out,) in INT8; one for each block in INT4.
        block: in INT4, how many weights share a scale.
        table: in INT4, the 16 numbers that four bits stand for.
        packed_bytes: the size of the weight where the compiled step packs it.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attributes = self.__dict__  # `self.name = ...` takes a microsecond in a module, and would register the layer
        attributes["layer"] = layer
        attributes["training"] = False  # as a linear layer, it computes the same in training mode
        attributes["in_features"], attributes["out_features"] = layer.in_features, layer.out_features
        attributes["bias"] = None if layer.bias is None else layer.bias.data.float()
        carry_hooks(layer, self)
        if type(layer).__name__ == "Linear8bitLt":
            weight, scales = layer.weight.data, scales_of(layer) / LARGEST_INTEGER
            attributes.update(format="int8", weight=weight, scales=scales, packed_bytes=weight.nbytes)
            return
        weight, state = canonical(layer)
        # It fits where each block lies in one row, and the product with its scale is not rounded to another type.
        fits = layer.in_features % state.blocksize == 0 and state.dtype == torch.float32
        attributes.update(
            format=f"{state.quant_type} {state.blocksize}" if fits else "",
            weight=weight,
            scales=scales_of_blocks(state) if fits else None,
            block=state.blocksize,
            table=state.code,
            packed_bytes=0 if fits else 4 * layer.in_features * layer.out_features,  # INT4 itself is not packed
        )

    def dequantized(self) -> torch.Tensor:
        """The weight (out, in) in float32."""
        return weight_of(self.layer).float()


def with_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of a model with a `QuantizedLinear` for each layer of bitsandbytes, or for each layer that `dequantized` made
    of one. A model that is not quantized is given back.
    """
    if not getattr(model, "is_quantized", False):
        return model

    def replacement(module: nn.Module) -> QuantizedLinear | None:
        layer = quantized_layer(module)
        return None if layer is None else QuantizedLinear(layer)

    return copy_of(model, replacement)


def quantized_layer(module: nn.Module) -> Any | None:
    """The layer of bitsandbytes that a module is, or from which `dequantized` made it; `None` if there is none."""
    if type(module).__module__.startswith(LIBRARY):
        return module
    return module.__dict__.get("quantized_layer", [None])[0]


def linear_of(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the weight of a `Linear8bitLt` or `Linear4bit`."""
    linear = nn.Linear.__new__(nn.Linear)  # nn.Linear() would draw random weights, which takes half of the time of this
    nn.Module.__init__(linear)
    linear.train(layer.training)
    linear.in_features, linear.out_features = layer.in_features, layer.out_features
    linear.weight = nn.Parameter(weight_of(layer).to(dtype), requires_grad=False)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    linear.register_parameter("bias", bias)
    linear.quantized_layer = [layer]  # for `with_quantized`
    carry_hooks(layer, linear)
    return linear


def carry_hooks(layer: Any, replacement: nn.Module) -> None:
    """`obstacle` has to find hooks, or a `forward` of the instance, that somebody has put on the layer."""
    replacement._forward_pre_hooks, replacement._forward_hooks = layer._forward_pre_hooks, layer._forward_hooks
    if "forward" in layer.__dict__:
        replacement.__dict__["forward"] = layer.__dict__["forward"]


def weight_of(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a layer of bitsandbytes in the type in which that library gives it."""
    functional = importlib.import_module("bitsandbytes.functional")
    if type(layer).__name__ == "Linear8bitLt":
        return functional.int8_vectorwise_dequant(layer.weight.data, scales_of(layer))
    return functional.dequantize_4bit(*canonical(layer))


def canonical(layer: Any) -> tuple[torch.Tensor, Any]:
    """
    The weight of a `Linear4bit` and its state in the order in which they are saved: rows, and two weights in a byte.
    """
    weight, state = layer.weight.data, layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        functional = importlib.import_module("bitsandbytes.functional")
        # On some processors the first call of a layer puts weight and scales in another order. The library's way back
        # rounds the scales once more, unless they were not nested.
        state = copy.copy(state)
        scales, state.original_nested = state.absmax, False
        weight, state = functional._convert_weight_packed_for_cpu_inverse(weight, state)
        state.absmax = scales.T.reshape(-1).float()
    return weight, state


def scales_of_blocks(state: Any) -> torch.Tensor:
    """
    The scales of INT4, of which bitsandbytes may have quantized the differences from their mean. They are then computed
    once for the tensors that the state has now: for a small model that takes as long as two tokens.
    """
    if not state.nested:
        return state.absmax
    nested = state.state2
    tensors = (state.absmax, state.offset, nested.absmax, nested.code)
    versions = [tensor._version for tensor in tensors]
    kept = state.__dict__.get("kept_scales")
    if kept is None or any(a is not b for a, b in zip(kept[0], tensors, strict=True)) or kept[1] != versions:
        functional = importlib.import_module("bitsandbytes.functional")
        state.kept_scales = kept = (
            tensors,
            versions,
            functional.dequantize_blockwise(state.absmax, nested) + state.offset,
        )
    return kept[2]


def scales_of(layer: Any) -> torch.Tensor:
    """The largest number of each row (out,) of a `Linear8bitLt`. Its first call moves them from weight to state."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
