"""
Faster float32 matrix products for training on CPUs.

torch computes matrix products with MKL, and has oneDNN in the same library, without a switch between them. Which is
faster depends on the processor and on the product: on one AMD processor oneDNN is twice as fast in all of them, on
another it is faster in the forward pass and slower in the gradient of the weights. So the products of the model at hand
are measured at the start of a run.
"""

import contextlib
import functools
import json
import time

import torch
from files_mini import cache_folder, read_json, write_text
from installation_mini import processor_name
from torch import nn

# A linear layer has three products: its output, and in the backward pass the gradients of its inputs and its weight.
PRODUCTS = ("output", "input_gradient", "weight_gradient")
ROUNDS = 9
MARGIN = 1.1  # oneDNN has to be faster by this factor, because a small gain may be chance
# A step with fewer FLOPs takes a few hundredths of a second, and there is nothing to gain.
SMALLEST_STEP = 2e9

# For the shape "outputs x inputs" of a weight, the products that oneDNN computes.
Choice = dict[str, list[str]]


@torch.library.custom_op("mini::linear_product", mutates_args=())  # torch.compile does not look inside
def linear_product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inputs` (..., k) times the transpose of `weight` (n, k), by oneDNN and without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


@linear_product.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


class LinearFunction(torch.autograd.Function):
    """`nn.functional.linear` without a bias, with oneDNN for the products that `by_onednn` names."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, inputs: torch.Tensor, weight: torch.Tensor, by_onednn: tuple[str, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.by_onednn = by_onednn
        return multiply("output", inputs, weight, by_onednn)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        input_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = multiply("input_gradient", gradient, weight.t(), ctx.by_onednn)
        if ctx.needs_input_grad[1]:
            columns, rows = gradient.flatten(0, -2).t(), inputs.flatten(0, -2).t()
            weight_gradient = multiply("weight_gradient", columns, rows, ctx.by_onednn)
        return input_gradient, weight_gradient, None


def multiply(product: str, left: torch.Tensor, right: torch.Tensor, by_onednn: tuple[str, ...]) -> torch.Tensor:
    """`left` (..., k) times the transpose of `right` (n, k)."""
    return linear_product(left, right) if product in by_onednn else nn.functional.linear(left, right)


def linear_forward(module: nn.Linear, by_onednn: tuple[str, ...], inputs: torch.Tensor) -> torch.Tensor:
    output = LinearFunction.apply(inputs, module.weight, by_onednn)
    return output if module.bias is None else output + module.bias


def use_products(model: nn.Module, choice: Choice) -> None:
    """Makes the linear layers of a model multiply as `choice` says. Weights and checkpoints do not change."""
    for module in model.modules():
        if type(module) is nn.Linear and (by_onednn := choice.get(shape_of(module))):
            module.forward = functools.partial(linear_forward, module, tuple(by_onednn))


def measure_products(model: nn.Module, tokens: int) -> Choice:
    """
    The products that oneDNN computes faster than MKL here, for the linear layers of a model and so many tokens in a
    micro-batch. It takes well under a second, and once on a machine: the result is kept in the cache, so that equal
    runs are equal bit by bit.
    """
    layers = {shape_of(module): module for module in model.modules() if type(module) is nn.Linear}
    parameters = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear)
    if 6 * parameters * tokens < SMALLEST_STEP or not onednn_is_available():
        return {}
    cache, measured = cache_folder() / "products.json", {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        measured = read_json(cache)
    known = len(measured)
    choice = {}
    here = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for shape, layer in layers.items():
        key = f"{here}, {tokens} x {shape}"
        if key not in measured:
            measured[key] = faster_products(layer.out_features, layer.in_features, tokens)
        choice[shape] = measured[key]
    if len(measured) > known:
        with contextlib.suppress(OSError):  # a folder that cannot be written
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps(measured, indent=1))
    return {shape: products for shape, products in choice.items() if products}


def faster_products(outputs: int, inputs: int, tokens: int) -> list[str]:
    """The products of a layer in which oneDNN is faster, by the shortest times of rounds that take turns."""
    # No random numbers: a run that measures draws the same ones later as a run that knows the result.
    rows, gradient, weight = torch.ones(tokens, inputs), torch.ones(tokens, outputs), torch.ones(outputs, inputs)
    operands = ((rows, weight), (gradient, weight.t()), (gradient.t(), rows.t()))
    faster = []
    for product, (left, right) in zip(PRODUCTS, operands, strict=True):
        seconds: dict[str, list[float]] = {"": [], product: []}
        for _ in range(ROUNDS):
            for name, times in seconds.items():
                began = time.perf_counter()
                multiply(product, left, right, (name,))
                times.append(time.perf_counter() - began)
        if min(seconds[product]) * MARGIN < min(seconds[""]):
            faster.append(product)
    return faster


def shape_of(layer: nn.Linear) -> str:
    return f"{layer.out_features} x {layer.in_features}"


def onednn_is_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
