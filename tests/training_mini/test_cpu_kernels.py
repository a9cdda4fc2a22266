"""oneDNN's products give what torch's own give, in both directions, and the faster of the two is taken."""

import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from peft import LoraConfig, get_peft_model
from torch import nn
from training_mini import cpu_attention, cpu_kernels
from training_mini.cpu_kernels import (
    PRODUCTS,
    bfloat16_is_faster,
    linear_product,
    measure_products,
    multiply,
    seconds_by_type,
    shape_of,
    use_products,
)
from training_mini.lora import sizes_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SOME_PRODUCTS = [list(some) for n in (1, 2, 3) for some in itertools.combinations(PRODUCTS, n)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the results that oneDNN computes from now on."""
    shapes: list[torch.Size] = []

    def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append((result := linear_product(inputs, weight)).shape)
        return result

    monkeypatch.setattr(cpu_kernels, "linear_product", product)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("products", SOME_PRODUCTS, ids="+".join)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (1, 1)])
def test_linear_layer(shape: tuple[int, ...], bias: bool, products: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    other = nn.Sequential(copy.deepcopy(layer))
    use_products(other, {"40 x 24": products})
    inputs = torch.randn(*shape, 24)
    by_onednn = counted(monkeypatch)
    results = []
    for module in (layer, other):
        leaf = inputs.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append([output, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    assert len(by_onednn) == len(products), "each named product, and no other, is by oneDNN"
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_shapes_are_those_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft makes the head anew where an adapter learned the embedding, with its numbers of features exchanged."""
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1))
    learned = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    head = get_peft_model(model, LoraConfig(r=2, **learned)).merge_and_unload().lm_head
    measured: list[tuple[int, ...]] = []
    monkeypatch.setattr(cpu_kernels, "SMALLEST_STEP", 0)
    monkeypatch.setattr(cpu_kernels, "measured_once", lambda key, measure, fits: measure())
    monkeypatch.setattr(cpu_kernels, "faster_products", lambda *sizes: measured.append(sizes) or list(PRODUCTS))
    assert measure_products(nn.Sequential(head), 8) == {"264 x 128": list(PRODUCTS)} and measured == [(264, 128, 8)]
    assert shape_of(head) == "264 x 128" and sizes_of(head) == (264, 128)


def test_model_and_what_is_saved_of_it_stay_the_same() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2, attention_bias=True))
    other = copy.deepcopy(model)
    layers = [module for module in other.modules() if type(module) is nn.Linear]
    use_products(other, {shape_of(layer): list(PRODUCTS) for layer in layers})
    ids = torch.randint(8, 264, (2, 32))
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, expected), actual in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("faster", [[], ["output"], ["input_gradient", "weight_gradient"], list(PRODUCTS)])
def test_the_faster_product_is_taken(faster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: 0.0)
    clock = itertools.count()  # each reading is a second later
    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: next(clock))

    def timed(product: str, left: torch.Tensor, right: torch.Tensor, by_onednn: tuple[str, ...]) -> torch.Tensor:
        if (product in by_onednn) != (product in faster):
            next(clock)
        return multiply(product, left, right, by_onednn)

    monkeypatch.setattr(cpu_kernels, "multiply", timed)
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2))
    choice = measure_products(model, 4096)
    assert choice == ({"128 x 128": faster, "264 x 128": faster} if faster else {})
    monkeypatch.setattr(cpu_kernels, "faster_products", None)
    assert measure_products(model, 4096) == choice, "it is measured once on a machine"
    (tmp_path / "cache" / "products.json").write_text("{")
    monkeypatch.setattr(cpu_kernels, "faster_products", lambda outputs, inputs, tokens: list(PRODUCTS))
    assert measure_products(model, 4096) == {"128 x 128": list(PRODUCTS), "264 x 128": list(PRODUCTS)}


def test_what_a_busy_machine_measured_is_for_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    used, results = itertools.count(step=5), iter("abc")
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: next(used))
    assert [cpu_kernels.measured_once("this", lambda: next(results)) for _ in range(2)] == ["a", "b"]
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: 0.0)
    assert [cpu_kernels.measured_once("this", lambda: next(results)) for _ in range(2)] == ["c", "c"]


def test_what_is_damaged_in_the_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "seconds_of_others", lambda: 0.0)
    monkeypatch.setattr(cpu_kernels, "faster_products", lambda outputs, inputs, tokens: ["output"])
    monkeypatch.setattr(cpu_kernels, "seconds_by_type", lambda *way: [1.0, 0.5])
    monkeypatch.setattr(cpu_kernels, "has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_attention, "shortest_seconds", lambda ways: {"fused": 2.0, "blocks": 1.0})
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2))

    def choices() -> tuple[Any, ...]:
        products = measure_products(model, 4096)
        attention = cpu_attention.fastest_attention(model.config, 8, torch.float32, ["blocks"])
        return products, cpu_kernels.bfloat16_is_faster(model, 4096, products), attention

    expected = choices()
    assert expected == ({"128 x 128": ["output"], "264 x 128": ["output"]}, True, "blocks")
    cache = tmp_path / "products.json"
    kept = json.loads(cache.read_text())
    for damage in (
        None,
        1,
        "output",
        ["outputs", None],
        [None, 0.5],
        [-1.0, float("nan")],
        {"blocks": None},
        [1.0],
        {},
    ):
        cache.write_text(json.dumps(dict.fromkeys(kept, damage)))
        assert choices() == expected and json.loads(cache.read_text()) == kept, damage


@pytest.mark.slow
def test_what_others_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that computes for half a second is seen, and this process is not."""
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    before = cpu_kernels.seconds_of_others()
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert cpu_kernels.seconds_of_others() - before > 0.4
    times = psutil.cpu_times()
    monkeypatch.setattr(cpu_kernels.psutil, "cpu_times", lambda: times)
    before, began = cpu_kernels.seconds_of_others(), time.process_time()
    while time.process_time() < began + 0.3:
        pass
    assert cpu_kernels.seconds_of_others() - before < -0.2, "its own seconds are taken off"


def test_a_small_step_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "faster_products", None)
    assert measure_products(MiniForCausalLM(MiniConfig.preset("tiny")), 512) == {}


def test_large_products_are_measured_with_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(cpu_kernels, "multiply", lambda product, left, right, names: sizes.append((left, right)))
    assert len(seconds_by_type(2048, 1024, 100_000, ())) == 2
    for left, right in sizes:
        assert 0.9e8 < 2 * left.shape[0] * left.shape[1] * right.shape[0] <= cpu_kernels.LARGEST_PRODUCT
    assert {left.dtype for left, _ in sizes} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("capability", "seconds", "faster"),
    [
        ("avx512_bf16", [3.0, 1.0], True),
        ("amx_bf16", [3.0, 1.0], True),
        ("avx512_bf16", [1.2, 1.0], False),
        ("avx2", [3.0, 1.0], False),
    ],
)
def test_bfloat16_where_it_is_clearly_faster(
    capability: str, seconds: list[float], faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    asked = []
    monkeypatch.setattr(cpu_kernels, "seconds_by_type", lambda *shape: asked.append(shape) or seconds)
    model = MiniForCausalLM(MiniConfig.preset("tiny"))
    assert bfloat16_is_faster(model, 4096, {"128 x 128": ["output"]}) == faster
    if capability == "avx2":
        assert asked == [], "it would take minutes to measure"
    else:
        assert asked == [(128, 128, 4096, ("output",)), (264, 128, 4096, ())]
    assert not bfloat16_is_faster(model, 64, {}), "a small step is not worth it"
