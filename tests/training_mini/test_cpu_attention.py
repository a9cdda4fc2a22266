"""A model learns the same by each way of attention, which is used only where it may be; the fastest is taken."""

import copy
from typing import Any

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from torch import nn
from training_mini import block_attention, cpu_attention, cpu_kernels
from training_mini.cpu_attention import BLOCKS, FUSED, NATIVE, OPERATORS, attention_by, fastest_attention


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """From now on, the ways of attention that were called, and the type of their queries."""
    calls: list[tuple[str, torch.dtype]] = []

    def counting(way: str, operator: Any) -> Any:
        return lambda *states: (calls.append((way, states[0].dtype)), operator(*states))[1]

    for way, operator in list(OPERATORS.items()):
        monkeypatch.setitem(OPERATORS, way, counting(way, operator))
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


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", OPERATORS)
def test_a_model_learns_the_same(way: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model, other = counted(monkeypatch), a_model(), a_model()
    other.set_attn_implementation("eager")
    expected = learn(other)
    assert calls == []
    if checkpointing:
        model.activation_checkpointing_enable()
    with attention_by(model, way):
        found = learn(model)
    assert calls == [(way, torch.float32)] * (4 if checkpointing else 2)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("way", "used"), [(BLOCKS, [(BLOCKS, torch.bfloat16)] * 2), (NATIVE, [])])
def test_autocast(way: str, used: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the blocks. The function in C++ has float32 alone, and is not called."""
    calls, model, other = counted(monkeypatch), a_model(), a_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = learn(other)
        with attention_by(model, way):
            found = learn(model)
    assert calls == used
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["padding", "dropout", "no gradient", "too long", "eager", "one token"])
@pytest.mark.parametrize("way", OPERATORS)
def test_the_rest_is_left_to_other_kernels(way: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = a_model(attention_dropout=0.1 if reason == "dropout" else 0.0)
    if reason == "eager":
        model.set_attn_implementation("eager")
    if reason == "too long":
        monkeypatch.setattr(block_attention, "MOST_BYTES", 1000)
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
    with attention_by(model, way):
        found = run(model)
    if reason == "too long" and way == NATIVE:  # it keeps no probabilities
        assert calls == [(way, torch.float32)] * 2
        return
    assert calls == []
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", OPERATORS)
def test_a_compiled_model_learns_the_same(way: str) -> None:
    model, other = a_model(), a_model()
    for layer in model.model.layers:
        layer.compile()
    torch._dynamo.utils.counters.clear()
    with attention_by(model, way):
        found = learn(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    assert not torch._dynamo.utils.counters["graph_break"], "attention breaks no graph"
    torch.testing.assert_close(found, learn(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ((1.0, 0.5, 0.6), BLOCKS),
        ((1.0, 0.5, 0.4), NATIVE),
        ((1.0, 0.95, 0.92), FUSED),
        ((0.5, 1.0, 1.0), FUSED),
    ],
)
def test_the_fastest_is_taken(
    seconds: tuple[float, ...], fastest: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
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
    asked = model.config, 2, torch.float32, [BLOCKS, NATIVE]
    assert fastest_attention(*asked) == fastest
    for by_fused, by_blocks, by_native in zip(*computed, strict=True):
        torch.testing.assert_close(by_blocks, by_fused, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_native, by_fused, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(cpu_attention, "shortest_seconds", None)
    assert fastest_attention(*asked) == fastest, "it is measured once on a machine"


@pytest.mark.parametrize(
    ("dtype", "ways"), [(torch.bfloat16, [BLOCKS]), (torch.float32, [NATIVE]), (torch.float32, [BLOCKS])], ids=str
)
def test_ways_that_do_not_fit_are_not_measured(
    dtype: torch.dtype, ways: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: 0.0)
    monkeypatch.setattr(cpu_attention, "shortest_seconds", lambda found: dict.fromkeys(found, 1.0) | {ways[0]: 0.5})
    model = a_model(max_position_embeddings=80)
    given = [BLOCKS, NATIVE] if dtype == torch.bfloat16 else ways
    assert fastest_attention(model.config, 2, dtype, given) == ways[0]
    monkeypatch.setattr(cpu_attention, "shortest_seconds", None)
    assert fastest_attention(model.config, 100_000, torch.bfloat16, given) == FUSED, "too long for blocks"
    assert fastest_attention(model.config, 3, dtype, []) == FUSED
    model.set_attn_implementation("eager")
    assert fastest_attention(model.config, 2, dtype, given) == FUSED, "the user chose"
    assert fastest_attention(nn.Module, 2, dtype, given) == FUSED, "no transformer"


def test_shortest_seconds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order, times = [], iter([0, 5, 5, 6, 6, 8, 8, 11])
    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: next(times))
    ways = {name: lambda name=name: order.append(name) for name in ("one", "two")}
    assert cpu_kernels.shortest_seconds(ways, rounds=2) == {"one": 2, "two": 1}
    assert order == ["one", "two", "one", "two"]
