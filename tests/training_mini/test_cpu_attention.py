"""Attention in blocks gives what torch's own gives, in value and gradient, and is used only where it may be."""

import copy
from typing import Any

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from training_mini import cpu_attention, cpu_kernels
from training_mini.cpu_attention import (
    BLOCK,
    attention_in_blocks,
    blocks_are_faster,
    causal_attention,
    causal_attention_backward,
)

# (batch, heads, key_value_heads, length, head_dim)
SHAPES = [(2, 4, 4, 256, 32), (3, 8, 2, 100, 16), (1, 6, 1, BLOCK, 8), (5, 2, 2, BLOCK + 1, 4), (2, 3, 3, 2, 4)]


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


def in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return causal_attention(query, key, value, query.shape[-1] ** -0.5)[0].transpose(1, 2)


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def with_gradients(attention: Any, states: list[torch.Tensor]) -> list[torch.Tensor]:
    output = attention(*states)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, states, gradient)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bytes_at_once", [1, 2**14, 2**30])
def test_equals_the_fused_kernel(shape: tuple[int, ...], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "BYTES_AT_ONCE", bytes_at_once)
    exact = with_gradients(fused, states_of(shape))
    torch.testing.assert_close(with_gradients(in_blocks, states_of(shape)), exact, rtol=1e-10, atol=1e-12)
    single = with_gradients(in_blocks, states_of(shape, torch.float32))
    torch.testing.assert_close(single, [tensor.float() for tensor in exact], rtol=1e-4, atol=1e-5)


def test_backward_may_compute_other_parts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it runs with another number of threads."""
    states = states_of(SHAPES[1])
    monkeypatch.setattr(cpu_attention, "BYTES_AT_ONCE", 1)
    output = in_blocks(*states)
    monkeypatch.setattr(cpu_attention, "BYTES_AT_ONCE", 2**30)
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiler_is_told_the_truth(shape: tuple[int, ...]) -> None:
    """Shapes and strides for the compiler, and the gradient, are those of the operators."""
    states = states_of(shape)
    torch.library.opcheck(causal_attention, (*states, 0.5))
    output, probabilities = causal_attention(*states, 0.5)
    made = torch.randn_like(output), *(tensor.detach() for tensor in (*states, probabilities)), 0.5
    torch.library.opcheck(causal_attention_backward, made)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the queries of each call of attention in blocks from now on."""
    calls: list[torch.dtype] = []
    monkeypatch.setattr(
        cpu_attention, "causal_attention", lambda *states: (calls.append(states[0].dtype), causal_attention(*states))[1]
    )
    return calls


def a_model(**settings: Any) -> MiniForCausalLM:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MiniForCausalLM(MiniConfig(**{**shape, "qk_norm": True, **settings}))


def learn(model: MiniForCausalLM, **inputs: Any) -> list[torch.Tensor]:
    ids = torch.randint(8, 264, (2, 90), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model, other = counted(monkeypatch), a_model(), a_model()
    other.set_attn_implementation("eager")
    expected = learn(other)
    assert calls == []
    if checkpointing:
        model.activation_checkpointing_enable()
    with attention_in_blocks(model):
        found = learn(model)
    assert calls == [torch.float32] * (4 if checkpointing else 2)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_autocast_reaches_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model, other = counted(monkeypatch), a_model(), a_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = learn(other)
        with attention_in_blocks(model):
            found = learn(model)
    assert calls == [torch.bfloat16] * 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("reason", ["padding", "dropout", "no gradient", "too long", "eager", "one token"])
def test_the_rest_is_left_to_other_kernels(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = a_model(attention_dropout=0.1 if reason == "dropout" else 0.0)
    if reason == "eager":
        model.set_attn_implementation("eager")
    if reason == "too long":
        monkeypatch.setattr(cpu_attention, "MOST_BYTES", 1000)
    other = copy.deepcopy(model)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :20] = 0
    inputs = {"attention_mask": mask} if reason == "padding" else {}

    def run(model: MiniForCausalLM) -> list[torch.Tensor]:
        torch.manual_seed(0)
        if reason == "no gradient":
            with torch.no_grad():
                return [model(torch.arange(8, 60)[None]).logits]
        if reason == "one token":
            return [model(torch.tensor([[8]])).logits]
        return learn(model, **inputs)

    expected = run(other)
    with attention_in_blocks(model):
        found = run(model)
    assert calls == []
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = a_model(), a_model()
    for layer in model.model.layers:
        layer.compile()
    torch._dynamo.utils.counters.clear()
    with attention_in_blocks(model):
        found = learn(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    assert not torch._dynamo.utils.counters["graph_break"], "attention breaks no graph"
    torch.testing.assert_close(found, learn(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 0.5), True), ((1.0, 0.95), False), ((0.5, 1.0), False)])
def test_the_faster_one_is_taken(
    seconds: tuple[float, float], faster: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: 0.0)
    computed = []

    def timed(ways: dict[str, Any], rounds: int = 1) -> dict[str, float]:
        for way in ways.values():
            computed.append(way())  # gradients
        return dict(zip(ways, seconds, strict=True))

    monkeypatch.setattr(cpu_attention, "shortest_seconds", timed)
    model = a_model(max_position_embeddings=80)
    assert blocks_are_faster(model.config, 2, torch.bfloat16) == faster
    for by_fused, by_blocks in zip(*computed, strict=True):
        torch.testing.assert_close(by_blocks, by_fused, rtol=0.05, atol=0.05)
    monkeypatch.setattr(cpu_attention, "shortest_seconds", None)
    assert blocks_are_faster(model.config, 2, torch.bfloat16) == faster, "it is measured once on a machine"
    assert not blocks_are_faster(model.config, 100_000, torch.bfloat16), "too long for blocks"
    model.set_attn_implementation("eager")
    assert not blocks_are_faster(model.config, 2, torch.bfloat16), "the user chose"
    assert not blocks_are_faster(nn.Module, 2, torch.bfloat16), "no transformer"


def test_shortest_seconds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order, times = [], iter([0, 5, 5, 6, 6, 8, 8, 11])
    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: next(times))
    ways = {name: lambda name=name: order.append(name) for name in ("one", "two")}
    assert cpu_kernels.shortest_seconds(ways, rounds=2) == {"one": 2, "two": 1}
    assert order == ["one", "two", "one", "two"]
