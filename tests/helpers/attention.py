"""Attention by torch's own kernel, in float64, for what computes it in another way."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def states_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values as a model has them: transposed views of (batch, length, heads, head_dim)."""
    batch, heads, key_value_heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(batch, length, number, head_dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, key_value_heads, key_value_heads)
    ]


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def with_gradients(attention: Any, states: list[torch.Tensor]) -> list[torch.Tensor]:
    output = attention(*states)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, states, gradient)]
