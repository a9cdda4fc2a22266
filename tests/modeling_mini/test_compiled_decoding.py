"""Compiled decoding: that it writes what the uncompiled step writes, for any weights and lengths, and when it runs."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_models import make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, compiled_decoding, decoding
from modeling_mini.compiled_decoding import (
    CompiledDecoder,
    CompiledStep,
    CompiledStepForMany,
    StepOfBatchWithWeights,
    StepOfModel,
    packed_weights,
    weights_between_products,
)
from modeling_mini.decoding import RotaryTable
from torch import nn
from transformers.activations import ACT2FN

PROMPT = torch.arange(1, 6)[None]


class UncompiledStep(CompiledStep):
    """The function that is compiled, as torch runs it, in place of the compiled one."""

    def __init__(self, model: MiniForCausalLM) -> None:
        self.shape = self.shape_of(model)
        self.calls = 0

    def decoder(
        self, model: MiniForCausalLM, cache: Any, attention_mask: Any, position_ids: torch.Tensor, max_new_tokens: int
    ) -> CompiledDecoder:
        step = StepOfModel(model)

        def run(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls += 1
            token_id, cos, sin, *caches = inputs
            return step(token_id, cos, sin, caches)

        return CompiledDecoder(run, [], cache, RotaryTable(model, position_ids), max_new_tokens)


@pytest.mark.parametrize("group", range(10))
def test_random_models_and_requests_give_the_same(group: int) -> None:
    """100 models of random shapes: text, scores, logits and cache, by the function before it is compiled."""
    calls = 0
    for number in range(10):
        draw = random.Random(f"compiled {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        compiled = copy.deepcopy(model)  # dynamic RoPE keeps the frequencies of the last text
        request = random_request(draw, settings["vocab_size"])
        request |= {"return_dict_in_generate": True, "output_logits": True, "num_return_sequences": 1}
        request |= {"input_ids": request["input_ids"][:1], "attention_mask": torch.ones_like(request["input_ids"][:1])}
        torch.manual_seed(7)
        expected = model.generate(**request, fast_decoding=False)
        compiled.compiled_step = step = UncompiledStep(compiled)
        torch.manual_seed(7)
        written = compiled.generate(**request)
        assert step.calls == len(written.logits) - 1  # the first token comes from the prompt
        calls += step.calls
        assert torch.equal(written.sequences, expected.sequences), f"{settings}\n{request}"
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert written.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        for a, b in zip(written.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=2e-5, atol=2e-5)
    assert calls > 20


class UncompiledStepForMany(CompiledStepForMany):
    """As `UncompiledStep`, for several sequences."""

    def __init__(self, model: MiniForCausalLM) -> None:
        self.shape = self.shape_of(model)
        self.sizes: list[int] = []
        step = StepOfBatchWithWeights(model)
        packed, others = packed_weights(model), weights_between_products(model)
        layers, names = model.config.num_hidden_layers, len(packed)

        def run(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            self.sizes.append(len(inputs[0]))
            assert all(tensor.is_contiguous() for tensor in inputs)  # which the compiled function takes for granted
            weights = inputs[4 + layers :]
            return step(
                *inputs[:4],
                inputs[4 : 4 + layers],
                dict(zip(packed, weights[:names], strict=True)),
                dict(zip(others, weights[names:], strict=True)),
            )

        self.run_many = run


@pytest.mark.parametrize("group", range(10))
def test_random_batches_give_the_same(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    100 models of random shapes and batches, padded or not, by the function before it is compiled: text, logits and
    cache; and the text alone, where finished sequences leave.
    """
    monkeypatch.setattr(decoding, "FIRST_CAPACITY_OF_MANY", 5)  # the cache has to grow
    sizes = []
    for number in range(10):
        draw = random.Random(f"batch {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        request = random_request(draw, settings["vocab_size"])
        batch, length = draw.choice([2, 3, 8, 20]), request["input_ids"].shape[1]
        request["input_ids"] = torch.randint(1, settings["vocab_size"], (batch, length))
        mask = torch.ones(batch, length, dtype=torch.long)
        if draw.random() < 0.5:
            for row in range(batch):
                mask[row, : draw.randrange(length)] = 0
        ends = torch.randint(1, settings["vocab_size"], (max(1, settings["vocab_size"] // 8),)).tolist()
        request |= {"attention_mask": mask, "eos_token_id": ends, "num_return_sequences": 1}
        all_results = {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for compiled, more in ((False, all_results | {"fast_decoding": False}), (True, all_results), (True, {})):
            each = copy.deepcopy(model)  # dynamic RoPE keeps the frequencies of the last text
            if compiled:
                each.compiled_step = step = UncompiledStepForMany(each)
            torch.manual_seed(7)
            outputs.append(each.generate(**request, **more))
            sizes += [(size, batch) for size in step.sizes] if compiled else []
        expected, written, text = outputs
        context = f"{settings}\n{request}"
        assert torch.equal(written.sequences, expected.sequences), context
        assert torch.equal(text, expected.sequences), context
        assert len(written.logits) == len(expected.logits)
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        for a, b in zip(written.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=2e-5, atol=2e-5)
    assert len(sizes) > 20 and any(size < batch for size, batch in sizes) and min(sizes)[0] >= 2


def test_one_sequence_has_the_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a padded one alone has none; nor has "exact"."""
    model = make_model()
    step = UncompiledStepForMany(model)
    assert step.suits(model, 1, None) and not step.suits(model, 1, torch.tensor([[0, 1]]))
    assert step.suits(model, 2, torch.tensor([[0, 1], [1, 1]]))
    model.compiled_step = step
    ids = torch.randint(1, 97, (3, 5))
    exact = model.generate(ids, max_new_tokens=6, do_sample=False, fast_decoding="exact")
    assert not step.sizes
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), exact)
    assert step.sizes == [3] * 5
    one = CompiledDecoder.__new__(CompiledDecoder)
    monkeypatch.setattr(CompiledStep, "decoder", lambda *arguments: one)
    cache = model(ids[:1], use_cache=True).past_key_values
    assert step.decoder(model, cache, None, torch.arange(5)[None], 3) is one


SHAPE_WITH_EVERY_PART = {
    "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "qk_norm": True, "attention_bias": True,
    "mlp_bias": True, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> MiniForCausalLM:
    """A model with about every part, compiled for real."""
    torch.manual_seed(0)
    model = make_model(**SHAPE_WITH_EVERY_PART)
    model.compile_decoding()
    assert model.compiled_step is not None
    return model


@pytest.mark.slow
def test_the_compiled_step_for_many_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2 to 20 sequences, padded or not, from a prompt of one token on, over a cache that has to grow."""
    monkeypatch.setattr(decoding, "FIRST_CAPACITY_OF_MANY", 7)
    torch.manual_seed(0)
    model = make_model(**SHAPE_WITH_EVERY_PART)
    model.compile_decoding(many=True)
    calls, run = [], model.compiled_step.run_many
    monkeypatch.setattr(model.compiled_step, "run_many", lambda inputs: (calls.append(len(inputs[0])), run(inputs))[1])
    for batch, length in ((2, 1), (3, 2), (8, 19), (20, 40)):
        ids, mask = torch.randint(1, 97, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        mask[1:, : length // 2] = 0
        for manner in ({"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 0.8}):
            texts = []
            for switch in ({}, {"fast_decoding": False}):
                torch.manual_seed(3)
                request = {"max_new_tokens": 40, "eos_token_id": [5, 6, 7, 8], **manner, **switch}
                texts.append(model.generate(ids, attention_mask=mask, **request))
            assert torch.equal(*texts)
    assert set(calls) >= {2, 3, 8, 20} and len(set(calls)) > 4  # some have left


def counted(model: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of the compiled step."""
    calls: list[int] = []
    run = model.compiled_step.run

    def counting(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(inputs))
        return run(inputs)

    monkeypatch.setattr(model.compiled_step, "run", counting)
    return calls


@pytest.mark.slow
def test_the_compiled_step_writes_the_same(compiled: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampling, from a prompt of one token on, over a cache that has to grow."""
    monkeypatch.setattr(compiled_decoding, "FIRST_CAPACITY", 7)
    calls = counted(compiled, monkeypatch)
    for length in (1, 2, 19, 40):
        ids = torch.randint(1, 97, (1, length))
        for manner in ({"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 0.8}):
            texts = []
            for switch in ({}, {"fast_decoding": False}):
                torch.manual_seed(3)
                texts.append(compiled.generate(ids, max_new_tokens=60, **manner, **switch))
            assert torch.equal(*texts)
    assert len(calls) == 4 * 2 * 59


@pytest.mark.slow
def test_changed_weights_are_seen(compiled: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a copy of the model, which shares the function and not the weights."""
    calls = counted(compiled, monkeypatch)
    model = copy.deepcopy(compiled)
    texts = []
    for _ in range(3):
        text = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
        assert torch.equal(text, model.generate(PROMPT, max_new_tokens=20, do_sample=False, fast_decoding=False))
        texts.append(text.tolist())
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    assert len({str(text) for text in texts}) == 3
    assert len(calls) == 3 * 19
    before = compiled.generate(PROMPT, max_new_tokens=20, do_sample=False)
    assert before.tolist() == texts[0]
    assert pickle.loads(pickle.dumps(model)).compiled_step is None


def two_rows(model: MiniForCausalLM) -> dict[str, Any]:
    return {"inputs": PROMPT.repeat(2, 1)}


def padded(model: MiniForCausalLM) -> dict[str, Any]:
    return {"inputs": PROMPT, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}


def in_bfloat16(model: MiniForCausalLM) -> dict[str, Any]:
    model.to(torch.bfloat16)
    return {"inputs": PROMPT}


def with_another_vocabulary(model: MiniForCausalLM) -> dict[str, Any]:
    model.resize_token_embeddings(90)
    return {"inputs": PROMPT}


def with_another_eps(model: MiniForCausalLM) -> dict[str, Any]:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1
    return {"inputs": PROMPT}


def with_another_activation(model: MiniForCausalLM) -> dict[str, Any]:
    model.model.layers[0].mlp.act_fn = ACT2FN["relu2"]
    return {"inputs": PROMPT}


def with_another_scale(model: MiniForCausalLM) -> dict[str, Any]:
    model.model.layers[0].self_attn.scaling *= 2
    return {"inputs": PROMPT}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *(two_rows, padded, in_bfloat16, with_another_vocabulary),
        *(with_another_eps, with_another_activation, with_another_scale),
    ],
)
def test_what_the_compiled_step_does_not_fit_goes_without(
    change: Callable[[MiniForCausalLM], dict[str, Any]], compiled: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(compiled, monkeypatch)
    model = copy.deepcopy(compiled)
    request = change(model)
    text = model.generate(**request, max_new_tokens=9, do_sample=False)
    assert torch.equal(text, model.generate(**request, max_new_tokens=9, do_sample=False, fast_decoding=False))
    assert not calls


@pytest.mark.slow
def test_the_file_is_used_again(compiled: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another model of the shape, and not where it is damaged."""
    path = compiled_decoding.package_path(compiled)
    written: list[Path] = []
    monkeypatch.setattr(compiled_decoding, "write_package", lambda model, path: written.append(path))
    other = MiniForCausalLM(compiled.config).eval()
    other.compile_decoding()
    assert other.compiled_step is not None and not written
    whole = path.read_bytes()
    try:
        monkeypatch.setattr(
            compiled_decoding, "write_package", lambda model, path: (written.append(path), path.write_bytes(whole))
        )
        half = len(whole) // 2
        for damaged in (whole[:half], whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :], b""):
            path.write_bytes(damaged)
            assert CompiledStep(other).shape == other.compiled_step.shape and written.pop() == path
    finally:
        path.write_bytes(whole)
    assert compiled_decoding.package_path(make_model()) != path


def test_without_a_compiler_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config
    from transformers.utils import logging

    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = make_model(num_hidden_layers=1)
    with caplog.at_level("WARNING"), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        model.compile_decoding()
    assert model.compiled_step is None
    (warning,) = [record.message for record in caplog.records if record.name == "modeling_mini.fast_generation"]
    assert warning.startswith("Decoding is not compiled, and goes on without: ") and "\n" not in warning
    assert not list(tmp_path.rglob("*.pt2"))
    text = model.generate(PROMPT, max_new_tokens=9, do_sample=False)
    assert torch.equal(text, model.generate(PROMPT, max_new_tokens=9, do_sample=False, fast_decoding=False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.to(torch.bfloat16), "float32 on a CPU; this model is bfloat16 on a cpu"),
        (lambda model: model.train(), "the model is in training mode"),
    ],
    ids=["bfloat16", "training"],
)
def test_models_that_are_not_compiled(
    change: Callable[[MiniForCausalLM], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("modeling_mini.fast_generation.logger.warning", warnings.append)
    model = make_model()
    change(model)
    model.compile_decoding()
    assert model.compiled_step is None
    assert len(warnings) == 1 and reason in warnings[0]
