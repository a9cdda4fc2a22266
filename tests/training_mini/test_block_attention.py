"""Attention in blocks gives what torch's own gives, in value and gradient."""

import pytest
import torch
from helpers.attention import fused, states_of, with_gradients
from training_mini import block_attention
from training_mini.block_attention import BLOCK, causal_attention, causal_attention_backward

# (batch, heads, key_value_heads, length, head_dim)
SHAPES = [
    (2, 4, 4, 256, 32), (3, 8, 2, 100, 16), (1, 6, 1, BLOCK, 8), (1, 6, 2, 70, 8), (5, 2, 2, BLOCK + 1, 4),
    (2, 3, 3, 2, 4),
]  # fmt: skip


def in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return causal_attention(query, key, value, query.shape[-1] ** -0.5)[0].transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bytes_at_once", [1, 2**14, 2**30])
def test_equals_the_fused_kernel(shape: tuple[int, ...], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BYTES_AT_ONCE", bytes_at_once)
    exact = with_gradients(fused, states_of(shape))
    torch.testing.assert_close(with_gradients(in_blocks, states_of(shape)), exact, rtol=1e-10, atol=1e-12)
    single = with_gradients(in_blocks, states_of(shape, torch.float32))
    torch.testing.assert_close(single, [tensor.float() for tensor in exact], rtol=1e-4, atol=1e-5)


def test_backward_may_compute_other_parts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it runs with another number of threads."""
    states = states_of(SHAPES[1])
    monkeypatch.setattr(block_attention, "BYTES_AT_ONCE", 1)
    output = in_blocks(*states)
    monkeypatch.setattr(block_attention, "BYTES_AT_ONCE", 2**30)
    found = torch.autograd.grad(output.square().sum(), states)
    exact = torch.autograd.grad(fused(*states).square().sum(), states)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_about_as_exact_as_in_the_fused_kernel(shape: tuple[int, ...]) -> None:
    exact = with_gradients(
        fused, [states.detach().double().requires_grad_() for states in states_of(shape, torch.bfloat16)]
    )
    errors = [
        [(found - true).norm() / true.norm() for found, true in zip(with_gradients(way, states), exact, strict=True)]
        for way, states in ((in_blocks, states_of(shape, torch.bfloat16)), (fused, states_of(shape, torch.bfloat16)))
    ]
    for by_blocks, by_fused in zip(*errors, strict=True):
        assert by_blocks < max(2.5 * by_fused, 0.004), "bfloat16 has 8 bits"


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiler_is_told_the_truth(shape: tuple[int, ...]) -> None:
    """Shapes and strides for the compiler, and the gradient, are those of the operators."""
    states = states_of(shape)
    torch.library.opcheck(causal_attention, (*states, 0.5))
    output, probabilities = causal_attention(*states, 0.5)
    made = torch.randn_like(output), *(tensor.detach() for tensor in (*states, probabilities)), 0.5
    torch.library.opcheck(causal_attention_backward, made)
