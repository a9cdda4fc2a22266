"""Attention in C++ gives what torch's own gives, in value and gradient, for all shapes, strides and threads."""

import random
from pathlib import Path

import pytest
import torch
from helpers.attention import fused, states_of, with_gradients
from helpers.other_processors import BRANCHES, without_extensions
from training_mini import native_attention as module
from training_mini.native_attention import native_attention, native_attention_backward

# (batch, heads, key_value_heads, length, head_dim). A block has 72 queries, and a tile 6 or 12 of 16 or 32 numbers.
SHAPES = [(2, 4, 4, 256, 32), (3, 8, 2, 100, 16), (1, 6, 1, 72, 8), (5, 2, 2, 73, 5), (2, 3, 3, 2, 40), (1, 2, 1, 1, 4)]


def by_function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return native_attention(query, key, value, query.shape[-1] ** -0.5)[0].transpose(1, 2)


def check(shape: tuple[int, ...], factor: float = 1.0) -> None:
    """
    As exact as torch's kernel in float32. Both are compared with float64, by the length of the difference over all
    numbers. A large `factor` makes a softmax that is nearly one key.
    """
    states = [factor * each.detach() for each in states_of(shape)]
    exact = with_gradients(fused, [each.requires_grad_() for each in states])
    single = [each.detach().float().requires_grad_() for each in states]
    for found, torchs, true in zip(
        with_gradients(by_function, single), with_gradients(fused, single), exact, strict=True
    ):
        assert (found - true).norm() <= max(2 * (torchs - true).norm(), 1e-6 * true.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [0.01, 1.0, 10.0])
def test_equals_the_fused_kernel(shape: tuple[int, ...], factor: float) -> None:
    check(shape, factor)


@pytest.mark.slow
def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(200):
        kv_heads = draw.randint(1, 3)
        heads = kv_heads * draw.randint(1, 3)
        check((draw.randint(1, 3), heads, kv_heads, draw.randint(1, 170), draw.choice([1, 3, 4, 8, 16, 24, 32, 48])))


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_what_other_processors_compile(branches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SOURCE", without_extensions(module.SOURCE, branches))
    library = module.attention_library.__wrapped__()
    monkeypatch.setattr(module, "attention_library", lambda: library)
    for shape in SHAPES:
        check(shape)


def test_strides_do_not_matter() -> None:
    shape = 2, 4, 2, 90, 16
    states = [each.detach().float() for each in states_of(shape)]
    contiguous = with_gradients(by_function, [each.contiguous().requires_grad_() for each in states])
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0)):  # the last two: heads are not contiguous
        back = [order.index(dimension) for dimension in range(4)]
        permuted = [each.permute(order).contiguous().permute(back).requires_grad_() for each in states]
        assert all(map(torch.equal, with_gradients(by_function, permuted), contiguous))


def test_threads_do_not_matter() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            states = [each.detach().float().requires_grad_() for each in states_of((3, 6, 2, 130, 16))]
            results.append(with_gradients(by_function, states))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_what_comes_later_does_not_matter() -> None:
    states = [each.detach().float() for each in states_of((1, 2, 1, 100, 16))]
    whole = native_attention(*states, 0.25)[0]
    for each in states:
        each[:, :, 80:] += 1e6
    assert torch.equal(native_attention(*states, 0.25)[0][:, :80], whole[:, :80])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_compiler_is_told_the_truth(shape: tuple[int, ...]) -> None:
    """Shapes and strides for the compiler, and the gradient, are those of the operators."""
    states = [each.detach().float().requires_grad_() for each in states_of(shape)]
    torch.library.opcheck(native_attention, (*states, 0.5))
    output, log_sums = native_attention(*states, 0.5)
    made = torch.randn_like(output), *(tensor.detach() for tensor in (*states, log_sums)), 0.5
    torch.library.opcheck(native_attention_backward, made)
