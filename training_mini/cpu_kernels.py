"""
Faster matrix products for training on CPUs.

torch computes float32 products with MKL, and has oneDNN in the same library, without a switch between them. Which is
faster depends on the processor and on the product: on one AMD processor oneDNN is twice as fast in all of them, on
another it is faster in the forward pass and slower in the gradient of the weights. Some processors multiply in bfloat16
twice as fast as in float32, others a hundred times more slowly. So the products of the model at hand are measured at
the start of a run.
"""

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch
from files_mini import cache_folder, read_json, write_text
from installation_mini import processor_name
from modeling_mini.integrations import features_of
from torch import nn

# A linear layer has three products: its output, and in the backward pass the gradients of its inputs and its weight.
PRODUCTS = ("output", "input_gradient", "weight_gradient")
ROUNDS = 9
MARGIN = 1.1  # another way has to be faster by this factor, because a small gain may be chance
# And bfloat16 by this, in the products alone: autocast has to convert between the types as well.
BFLOAT16_MARGIN = 1.3
# A measurement is kept for later runs if meanwhile other programs used at most this share of a core, or this many
# seconds: threads that have to wait for each other can look fifteen times as slow.
SHARE_OF_OTHERS, SECONDS_OF_OTHERS = 0.25, 0.1
# Products with more FLOPs are measured with fewer tokens. Beyond this, the speed no longer depends on the size.
LARGEST_PRODUCT = 5e8
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
    """What `use_products` puts in the place of the forward of a layer: (..., in_features) to (..., out_features)."""
    output = LinearFunction.apply(inputs, module.weight, by_onednn)
    return output if module.bias is None else output + module.bias


def use_products(model: nn.Module, choice: Choice) -> None:
    """
    Makes the linear layers of a model multiply as `choice` says, and no longer as an earlier one said. Weights and
    checkpoints do not change.
    """
    for module in linear_layers(model):
        forward = vars(module).get("forward")
        if isinstance(forward, functools.partial) and forward.func is linear_forward:
            del module.forward
        by_onednn = choice.get(shape_of(module))
        if by_onednn and "forward" not in vars(module):  # else another library has its own there
            module.forward = functools.partial(linear_forward, module, tuple(by_onednn))


def measure_products(model: nn.Module, tokens: int) -> Choice:
    """
    The products that oneDNN computes faster than MKL here, for the linear layers of a model and so many tokens in a
    micro-batch.
    """
    if not onednn_is_available() or flops_of_step(model, tokens) < SMALLEST_STEP:
        return {}
    choice = {
        shape_of(layer): measured_once(
            f"{tokens} x {shape_of(layer)}",
            lambda layer=layer: faster_products(*layer.weight.shape, tokens),
            are_products,
        )
        for layer in linear_layers(model)
    }
    return {shape: products for shape, products in choice.items() if products}


def bfloat16_is_faster(model: nn.Module, tokens: int, choice: Choice) -> bool:
    """
    Whether the products of a model are so much faster in bfloat16 than in float32, as `choice` has them, that autocast
    pays. Only a processor with instructions for bfloat16 is asked: others need minutes for the measurement.
    """
    if not has_bfloat16():
        return False
    if flops_of_step(model, tokens) < SMALLEST_STEP:
        return False
    seconds = [0.0, 0.0]
    for shape, count in Counter(map(shape_of, linear_layers(model))).items():
        outputs, inputs = map(int, shape.split(" x "))
        by_onednn = tuple(choice.get(shape, ()))
        of_shape = measured_once(
            f"{tokens} x {shape} in bfloat16 beside {'+'.join(by_onednn) or 'MKL'}",
            lambda way=(outputs, inputs, tokens, by_onednn): seconds_by_type(*way),
            lambda kept: are_times(kept, 2),
        )
        seconds = [total + count * part for total, part in zip(seconds, of_shape, strict=True)]
    in_float32, in_bfloat16 = seconds
    return in_float32 > BFLOAT16_MARGIN * in_bfloat16


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def measured_once(what: str, measure: Callable[[], Any], is_right: Callable[[Any], bool] = lambda kept: True) -> Any:
    """
    What `measure` gives. It runs once on a machine: the result, which JSON can hold, is kept in the cache, so that
    equal runs are equal bit by bit. Where other programs ran meanwhile, it is for this run alone.

    Args:
        is_right: whether something in the cache can be such a result; what is damaged is measured again.
    """
    key = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {what}"
    cache, measured = cache_folder() / "products.json", {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        measured = read_json(cache)
    if key not in measured or not is_right(measured[key]):
        began, others = time.monotonic(), seconds_of_others()
        measured[key] = measure()
        share = SHARE_OF_OTHERS * (time.monotonic() - began)
        if seconds_of_others() - others <= max(share, SECONDS_OF_OTHERS):
            with contextlib.suppress(OSError):  # a folder that cannot be written
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_text(cache, json.dumps(measured, indent=1))
    return measured[key]


def are_products(kept: Any) -> bool:
    """Whether it can be a result of `faster_products`."""
    return isinstance(kept, list) and all(name in PRODUCTS for name in kept)


def are_times(kept: Any, number: int | None = None) -> bool:
    """Whether it is a list of times in seconds, and has `number` of them if that is given."""
    is_list = isinstance(kept, list) and number in (None, len(kept))
    return is_list and all(isinstance(time, float) and time > 0 for time in kept)


def seconds_of_others() -> float:
    """The seconds of the processor that all other programs have used so far."""
    machine, own = psutil.cpu_times(), os.times()
    return machine.user + machine.system + getattr(machine, "nice", 0.0) - own.user - own.system


def shortest_seconds(ways: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The shortest time of each way, by rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(times) for name, times in seconds.items()}


def operands_of(
    outputs: int, inputs: int, tokens: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both sides of each product of a linear layer."""
    tokens = min(tokens, max(64, int(LARGEST_PRODUCT / (2 * outputs * inputs))))
    # Ones and not random numbers: what a run draws later must not depend on whether it measured or read the cache.
    rows, gradient, weight = (
        torch.ones(shape, dtype=dtype) for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
    )
    return dict(zip(PRODUCTS, ((rows, weight), (gradient, weight.t()), (gradient.t(), rows.t())), strict=True))


def faster_products(outputs: int, inputs: int, tokens: int) -> list[str]:
    """The products of a layer in which oneDNN is faster."""
    faster = []
    for product, (left, right) in operands_of(outputs, inputs, tokens).items():
        ways = {name: functools.partial(multiply, product, left, right, (name,)) for name in ("", product)}
        seconds = shortest_seconds(ways)
        if seconds[product] * MARGIN < seconds[""]:
            faster.append(product)
    return faster


def seconds_by_type(outputs: int, inputs: int, tokens: int, by_onednn: tuple[str, ...]) -> list[float]:
    """The seconds of the three products of a layer in float32, as `by_onednn` has them, and in bfloat16."""
    ways = {}
    for dtype in (torch.float32, torch.bfloat16):
        for product, (left, right) in operands_of(outputs, inputs, tokens, dtype).items():
            names = by_onednn if dtype == torch.float32 else ()
            ways[f"{dtype} {product}"] = functools.partial(multiply, product, left, right, names)
    seconds = list(shortest_seconds(ways).values())
    return [sum(seconds[: len(PRODUCTS)]), sum(seconds[len(PRODUCTS) :])]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of a model: those of bitsandbytes and peft have a forward of their own."""
    return [module for module in model.modules() if type(module) is nn.Linear]


def flops_of_step(model: nn.Module, tokens: int) -> int:
    """The FLOPs of the products of the linear layers, forward and backward, for so many tokens."""
    return 6 * tokens * sum(layer.weight.numel() for layer in linear_layers(model))


def shape_of(layer: nn.Linear) -> str:
    """A key of `Choice`."""
    outputs, inputs = features_of(layer)
    return f"{outputs} x {inputs}"


def onednn_is_available() -> bool:
    """Whether this build of torch has it, and the operator that calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
