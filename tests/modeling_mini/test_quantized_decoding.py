"""Decoding of INT8 and INT4 on a CPU: what is written is what a model with the rounded weights writes."""

import copy
import random
from unittest import mock

import bitsandbytes
import pytest
import torch
from helpers.random_models import make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, decoding, fast_generation, quantized_decoding
from modeling_mini.compiled_decoding import CompiledDecoder, NativeModel
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


@pytest.mark.parametrize("group", range(5))
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_the_compiled_step_writes_what_the_rounded_weights_write(
    kind: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 models of each kind with a random request each, of one sequence and of several; INT8 as integers."""
    types: list[set[torch.dtype]] = []
    init, step = NativeModel.__init__, CompiledDecoder.step

    def noting(self: NativeModel, model: MiniForCausalLM, pack: bool) -> None:
        init(self, model, pack)
        types.append({tensor.dtype for tensor in self.tensors})

    steps = mock.Mock(wraps=step)
    monkeypatch.setattr(NativeModel, "__init__", noting)
    monkeypatch.setattr(CompiledDecoder, "step", lambda *arguments: steps(*arguments))
    for number in range(10):
        draw = random.Random(f"integers {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        quantized, plain = quantize(make_model(**settings), kind)
        quantized.compile_decoding()
        assert quantized.compiled_step.suits(quantized_decoding.dequantized(quantized))
        request = random_request(draw, settings["vocab_size"])
        batch, length = draw.choice([1, 2, 9]), request["input_ids"].shape[1]
        request |= {"input_ids": torch.randint(1, settings["vocab_size"], (batch, length))}
        request |= {"attention_mask": torch.ones(batch, length, dtype=torch.long), "num_return_sequences": 1}
        request |= {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for model in (quantized, plain):
            torch.manual_seed(7)
            steps.reset_mock()
            outputs.append(model.generate(**request))
            assert steps.call_count == (0 if model is plain else len(outputs[0].logits) - 1)
        written, expected = outputs
        assert torch.equal(written.sequences, expected.sequences), f"{settings}\n{request}"
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert types and all((torch.int8 in each) == (kind == "8bit") for each in types)


def test_layers_of_one_input_of_which_some_are_quantized() -> None:
    torch.manual_seed(0)
    quantized, _ = quantize(make_model(), "8bit")
    attention = quantized.model.layers[0].self_attn
    attention.k_proj = quantized_decoding.dequantized(quantized).model.layers[0].self_attn.k_proj
    del attention.k_proj.quantized_layer
    plain = quantized_decoding.dequantized(quantized)
    quantized.compile_decoding()
    for batch in (1, 3):
        request = {"inputs": torch.randint(1, 97, (batch, 5)), "do_sample": False, "max_new_tokens": 20}
        with mock.patch.object(CompiledDecoder, "step", autospec=True, side_effect=CompiledDecoder.step) as step:
            written = quantized.generate(**request)
        assert step.call_count == 19
        assert torch.equal(written, plain.generate(**request))


def test_the_compiled_step_in_integers_writes_the_same() -> None:
    """Before and after the first call of the layers, which moves their scales."""
    torch.manual_seed(0)
    quantized, plain = quantize(make_model(), "8bit")
    quantized.compile_decoding()
    assert quantized.compiled_step is not None
    for length in (3, 40):
        request = {"input_ids": torch.randint(1, 97, (1, length)), "do_sample": False, "max_new_tokens": 30}
        with mock.patch.object(CompiledDecoder, "step", autospec=True, side_effect=CompiledDecoder.step) as step:
            written = quantized.generate(**request)
        assert step.call_count == 29 and torch.equal(written, plain.generate(**request))
        quantized(request["input_ids"])
