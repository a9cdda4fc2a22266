"""
Which attention a training run computes on a CPU: torch's fused kernel, blocks of products (block_attention.py), or a
function in C++ (native_attention.py). What they give is equal up to rounding.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_attention import causal_attention, fits_in_blocks
from .cpu_kernels import MARGIN, are_times, measured_once, shortest_seconds
from .native_attention import native_attention

# What can stand in the place of torch's kernel, which is FUSED.
FUSED, BLOCKS, NATIVE = "fused", "blocks", "native"
OPERATORS = {BLOCKS: causal_attention, NATIVE: native_attention}


def suits(way: str, query: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether such an operator computes attention of these queries (batch, heads, length, head_dim) in this type."""
    return dtype == torch.float32 if way == NATIVE else fits_in_blocks(*query.shape[:3], dtype)


def attention_forward(
    way: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it. What the operator does not compute goes to torch's fused kernel."""
    # Autocast knows torch's own operators and not these.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    is_for_operator = (
        attention_mask is None
        and dropout == 0
        and query.device.type == "cpu"
        and query.requires_grad
        and query.shape[2] == key.shape[2] > 1
        and value.shape == key.shape
        and kwargs.get("is_causal") is not False
        and getattr(module, "is_causal", True)
        and suits(way, query, dtype)
    )
    if not is_for_operator:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    states = query.to(dtype), key.to(dtype), value.to(dtype)
    return OPERATORS[way](*states, query.shape[-1] ** -0.5 if scaling is None else scaling)[0], None


def fastest_attention(config: PreTrainedConfig, sequences: int, dtype: torch.dtype, ways: list[str]) -> str:
    """
    FUSED, or that of the other `ways` which is the fastest here for so many sequences of a whole context. A way has to
    be faster than torch's kernel by MARGIN.
    """
    heads, length = getattr(config, "num_attention_heads", None), getattr(config, "max_position_embeddings", None)
    if heads is None or length is None or config._attn_implementation != "sdpa":
        return FUSED
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = torch.empty(sequences, heads, length, head_dim, device="meta")
    ways = [way for way in ways if suits(way, query, dtype)]
    if not ways:
        return FUSED

    def measure() -> dict[str, float]:
        query, key, value = (
            torch.ones(sequences, number, length, head_dim, dtype=dtype, requires_grad=True)
            for number in (heads, key_value_heads, key_value_heads)
        )
        attentions: dict[str, Callable[[], torch.Tensor]] = {
            FUSED: lambda: nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads != key_value_heads
            ),
            **{way: lambda way=way: OPERATORS[way](query, key, value, head_dim**-0.5)[0] for way in ways},
        }
        return shortest_seconds(
            {
                way: lambda attention=attention: torch.autograd.grad(attention().sum(), (query, key, value))
                for way, attention in attentions.items()
            }
        )

    shape = f"{sequences} x {heads} ({key_value_heads}) x {length} x {head_dim}"
    seconds = measured_once(
        f"attention {shape} in {dtype}: {', '.join(ways)}",
        measure,
        lambda kept: isinstance(kept, dict) and are_times([kept.get(way) for way in (FUSED, *ways)]),
    )
    fastest = min(ways, key=seconds.get)
    return fastest if seconds[fastest] * MARGIN < seconds[FUSED] else FUSED


def name_of(way: str) -> str:
    """The name under which transformers knows a way."""
    return f"mini_{way}"


for each in OPERATORS:
    ALL_ATTENTION_FUNCTIONS.register(name_of(each), functools.partial(attention_forward, each))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name_of(each), sdpa_mask)


@contextlib.contextmanager
def attention_by(model: PreTrainedModel, way: str) -> Iterator[None]:
    """Within the context, a model whose attention is `sdpa` computes it in this way where it can."""
    before = model.config._attn_implementation
    if before == "sdpa" and way != FUSED:
        model.config._attn_implementation = name_of(way)
    try:
        yield
    finally:
        model.config._attn_implementation = before
