"""Decoding of INT8 and INT4 on a CPU: what is written is what a model with the rounded weights writes."""

import copy
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from helpers.random_models import make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, compiled_decoding, decoding, fast_generation, quantized_decoding
from modeling_mini.compiled_decoding import CompiledStep, StepWithWeights, weights_of
from torch import nn

KINDS = ("8bit", "4bit")


def quantize(model: MiniForCausalLM, kind: str) -> tuple[MiniForCausalLM, MiniForCausalLM]:
    """The model with layers of bitsandbytes in its blocks, and one with the same rounded weights as plain numbers."""
    quantized, plain = copy.deepcopy(model), copy.deepcopy(model)
    for name, linear in list(quantized.model.layers.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        size, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if kind == "8bit":
            layer = bitsandbytes.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
            layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bitsandbytes.nn.Linear4bit(*size, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
            layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        quantized.model.layers.set_submodule(name, layer.to("cpu"))
        rounded = plain.model.layers.get_submodule(name).weight.data
        rounded.copy_(rounded_to_int8(rounded) if kind == "8bit" else rounded_to_nf4(rounded))
    quantized.is_quantized = True
    quantized.eval(), plain.eval()
    return quantized, plain


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """By its definition: the largest number of a row is 127. bitsandbytes takes weights in float16."""
    weight = weight.half().float()
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * (127.0 / largest)).round() * (largest / 127)


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """By the functions that layers do not go through."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", range(5))
def test_random_models_write_what_their_rounded_weights_write(kind: str, group: int) -> None:
    """50 models of each kind, each with a random request: text, logits and cache."""
    for number in range(10):
        draw = random.Random(f"{kind} {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        if kind == "4bit":  # widths that its layers take
            settings |= {"hidden_size": 64, "intermediate_size": draw.choice([64, 128]), "head_dim": 64}
            settings["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
        quantized, plain = quantize(make_model(**settings), kind)
        request = random_request(draw, settings["vocab_size"])
        request |= {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for model in (quantized, plain):
            torch.manual_seed(7)
            with mock.patch.object(fast_generation, "decode", wraps=fast_generation.decode) as fast_path:
                outputs.append(model.generate(**request))
            assert fast_path.called
        written, expected = outputs
        assert torch.equal(written.sequences, expected.sequences), f"{settings}\n{request}"
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_call_of_its_layers_the_weights_are_the_same(kind: str) -> None:
    """The first call of a layer moves its scales, and on some processors puts INT4 in another order."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "vocab_size": 97}
    quantized, plain = quantize(make_model(**shape), kind)
    ids = torch.randint(1, 97, (2, 6))
    expected = plain(ids).logits
    copies = [quantized_decoding.dequantized(quantized)(ids).logits]
    with torch.no_grad():
        quantized(ids)
    copies.append(quantized_decoding.dequantized(quantized)(ids).logits)
    torch.testing.assert_close(copies[0], expected, rtol=2e-5, atol=2e-5)
    # bitsandbytes may have rounded the scales of INT4 to bfloat16 for good.
    tolerance = 2e-5 if kind == "8bit" else 0.05
    torch.testing.assert_close(copies[1], expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():  # and what the library itself computes is near
        assert (quantized(ids).logits - copies[1]).norm() < 0.05 * expected.norm()


def test_the_copy_shares_all_but_the_quantized_layers() -> None:
    quantized, _ = quantize(make_model(), "8bit")
    copied = quantized_decoding.dequantized(quantized)
    assert type(copied.model.layers[0].mlp.up_proj) is nn.Linear
    assert copied.model.embed_tokens.weight is quantized.model.embed_tokens.weight is copied.lm_head.weight
    assert type(quantized.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear8bitLt
    assert decoding.obstacle_of_model(copied, copied.plain_modules) is None
    quantized.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output)
    copied = quantized_decoding.dequantized(quantized)
    assert "up_proj is not a plain Linear" in decoding.obstacle_of_model(copied, copied.plain_modules)


@pytest.mark.parametrize("switch", [False, "exact", "too large"])
def test_when_the_layers_themselves_are_called(switch: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = quantize(make_model(), "8bit")
    request = {"max_new_tokens": 4, "do_sample": False}
    if switch == "too large":
        monkeypatch.setattr(quantized_decoding, "DEQUANTIZED_BYTES", 1000)
    else:
        request["fast_decoding"] = switch
    with (
        mock.patch.object(fast_generation, "decode", wraps=fast_generation.decode) as fast_path,
        mock.patch.object(bitsandbytes, "matmul", wraps=bitsandbytes.matmul) as product,
    ):
        quantized.generate(torch.randint(1, 97, (1, 5)), **request)
    assert not fast_path.called and product.called


def test_the_compiled_step_is_that_of_the_model_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function depends on shapes alone, so INT4 and float32 share its file, and INT8 has one of its own."""
    model = make_model(hidden_size=64, intermediate_size=128, head_dim=64)
    quantized, _ = quantize(model, "4bit")
    integers, _ = quantize(model, "8bit")
    paths = []
    monkeypatch.setattr(compiled_decoding, "load_package", lambda path: paths.append(path) or (lambda inputs: None))
    for each in (model, quantized, integers):
        each.compile_decoding()
        assert type(each.compiled_step) is CompiledStep
    assert paths[0] == paths[1] != paths[2]
    for each in (quantized, integers):
        assert each.compiled_step.suits(quantized_decoding.dequantized(each), 1, None)
    assert not integers.compiled_step.suits(quantized_decoding.dequantized(quantized), 1, None)


def uncompiled(quantized: MiniForCausalLM) -> Callable[[list[torch.Tensor]], Any]:
    """The function that is compiled for a model, as torch runs it."""
    model = quantized_decoding.with_integers(quantized_decoding.dequantized(quantized))
    step, names, layers = StepWithWeights(model), list(weights_of(model)), model.config.num_hidden_layers

    def run(inputs: list[torch.Tensor]) -> Any:
        token_id, cos, sin, *rest = inputs
        assert sum(tensor.dtype == torch.int8 for tensor in rest) == 7 * layers
        return step(token_id, cos, sin, rest[:layers], dict(zip(names, rest[layers:], strict=True)))

    return run


@pytest.mark.parametrize("group", range(5))
def test_the_step_in_integers_writes_what_the_rounded_weights_write(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 models with a random request each, by the function before it is compiled."""
    monkeypatch.setattr(compiled_decoding, "load_package", lambda path: lambda inputs: None)
    for number in range(10):
        draw = random.Random(f"integers {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        quantized, plain = quantize(make_model(**settings), "8bit")
        quantized.compile_decoding()
        quantized.compiled_step.run = mock.Mock(wraps=uncompiled(quantized))
        request = random_request(draw, settings["vocab_size"])
        request |= {"return_dict_in_generate": True, "output_logits": True, "num_return_sequences": 1}
        request |= {"input_ids": request["input_ids"][:1], "attention_mask": torch.ones_like(request["input_ids"][:1])}
        outputs = []
        for model in (quantized, plain):
            torch.manual_seed(7)
            outputs.append(model.generate(**request))
        written, expected = outputs
        assert quantized.compiled_step.run.call_count == len(written.logits) - 1
        assert torch.equal(written.sequences, expected.sequences), f"{settings}\n{request}"
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_the_compiled_step_in_integers_writes_the_same() -> None:
    """Compiled in earnest, before and after the first call of the layers, which moves their scales."""
    torch.manual_seed(0)
    quantized, plain = quantize(make_model(), "8bit")
    quantized.compile_decoding()
    assert quantized.compiled_step is not None
    for length in (3, 40):
        request = {"input_ids": torch.randint(1, 97, (1, length)), "do_sample": False, "max_new_tokens": 30}
        with mock.patch.object(quantized.compiled_step, "run", wraps=quantized.compiled_step.run) as run:
            written = quantized.generate(**request)
        assert run.call_count == 29 and torch.equal(written, plain.generate(**request))
        quantized(request["input_ids"])
