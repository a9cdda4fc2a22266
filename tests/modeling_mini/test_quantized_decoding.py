"""Decoding of INT8 and INT4 on a CPU: what is written is what a model with the rounded weights writes."""

import copy
import random
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from helpers.other_processors import BRANCHES, compile_without
from helpers.random_models import groups, make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, compiled_decoding, decoding, fast_generation, quantized_decoding
from modeling_mini.compiled_decoding import CompiledDecoder, NativeModel
from modeling_mini.quantized_decoding import QuantizedLinear
from torch import nn

KINDS = ("8bit", "4bit")


def quantize(
    model: MiniForCausalLM,
    kind: str,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    head: bool = False,
) -> tuple[MiniForCausalLM, MiniForCausalLM]:
    """
    The model with layers of bitsandbytes in its blocks, or also as its head, and one with the same rounded weights as
    plain numbers.
    """
    manner = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
    quantized, plain = copy.deepcopy(model), copy.deepcopy(model)
    for name, linear in list(quantized.named_modules()):
        if type(linear) is not nn.Linear or (name == "lm_head" and not head):
            continue
        size, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if kind == "8bit":
            layer = bitsandbytes.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
            layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bitsandbytes.nn.Linear4bit(*size, bias=bias, quant_type=quant_type, compute_dtype=torch.float32)
            layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **manner)
        layer.bias = linear.bias
        quantized.set_submodule(name, layer.to("cpu"))
        rounded = plain.get_submodule(name).weight.data
        rounded.copy_(rounded_to_int8(rounded) if kind == "8bit" else rounded_to_4bit(rounded, manner))
    quantized.is_quantized = True
    quantized.eval(), plain.eval()
    return quantized, plain


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """By its definition: the largest number of a row is 127. bitsandbytes takes weights in float16."""
    weight = weight.half().float()
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * (127.0 / largest)).round() * (largest / 127)


def rounded_to_4bit(weight: torch.Tensor, manner: dict[str, Any]) -> torch.Tensor:
    """By the functions that layers do not go through."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, **manner)
    return bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", groups(5))
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


@pytest.mark.parametrize("group", groups(5))
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


def settings_for_blocks(draw: random.Random) -> dict[str, Any]:
    """A random model of which all rows are whole blocks of 64, so that the compiled step reads INT4 as it is."""
    heads = draw.choice([1, 2, 4])
    widths = {"hidden_size": draw.choice([64, 128]), "intermediate_size": draw.choice([64, 192]), "head_dim": 64}
    rope = draw.choice([{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
    groups = {"num_attention_heads": heads, "num_key_value_heads": draw.choice([1, heads])}
    return random_settings(draw) | widths | groups | {"rope_parameters": {"rope_theta": 10000.0, **rope}}


def assert_same_text(
    quantized: MiniForCausalLM,
    plain: MiniForCausalLM,
    draw: random.Random,
    length: int,
    batch: int = 1,
    loop: bool = False,
) -> None:
    """From a random prompt, padded or not. `loop`: as transformers' loop writes it."""
    ids = torch.randint(1, plain.config.vocab_size, (batch, length))
    mask = torch.ones_like(ids)
    if draw.random() < 0.5:
        mask[-1, : length // 2] = 0
    request = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    request |= {"return_dict_in_generate": True, "output_logits": True}
    written, expected = quantized.generate(ids, **request), plain.generate(ids, **request, fast_decoding=not loop)
    assert torch.equal(written.sequences, expected.sequences), plain.config
    for a, b in zip(written.logits, expected.logits, strict=True):
        # Models this wide round more: the modules in float32 and in float64 differ by up to 1e-5 of the largest logit.
        assert (a - b).abs().max() < 5e-5 * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", groups(5))
def test_nothing_is_dequantized_for_a_short_prompt(kind: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 random models of each kind, prompts of one block of tokens and of several, and both forms of INT4."""
    formats = set()
    for number in range(10):
        draw = random.Random(f"prompts of quantized {kind} {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        manner = {"quant_type": draw.choice(["nf4", "fp4"]), "blocksize": 64, "nested": draw.random() < 0.5}
        quantized, plain = quantize(make_model(**settings_for_blocks(draw)), kind, **manner)
        quantized.compile_decoding()
        read = mock.Mock(wraps=CompiledDecoder.read_prompt)
        linear = NativeModel.linear

        def noting(self: NativeModel, *projections: nn.Module, linear: Any = linear) -> Any:
            formats.add((getattr(projections[0], "format", "float32"), self.pack))
            return linear(self, *projections)

        with monkeypatch.context() as patch:
            patch.setattr(CompiledDecoder, "read_prompt", lambda *arguments, read=read: read(*arguments))
            patch.setattr(NativeModel, "linear", noting)
            length = draw.choice([1, 2, 16, 17, 50])
            batch = draw.choice([1, 1, 3])
            patch.setattr(quantized_decoding, "weight_of", mock.Mock(side_effect=AssertionError("dequantized")))
            assert_same_text(quantized, plain, draw, length, batch)
        assert read.call_count == 1
    expected = "int8" if kind == "8bit" else f"{manner['quant_type']} 64"
    assert (expected, False) in formats


@pytest.mark.parametrize("group", groups(20))
def test_several_sequences_read_four_bits(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    200 random models, 2 to 64 sequences: what transformers' loop writes with the dequantized weights. Blocks of
    several lengths, projections and heads that end within a tile, and heads in INT4 too.
    """
    monkeypatch.setattr(compiled_decoding, "QUANTIZED_PROMPT_TOKENS", 10**6)
    types: list[tuple[torch.dtype, ...]] = []
    init = NativeModel.__init__

    def noting(self: NativeModel, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more)
        types.append(tuple(tensor.dtype for tensor in self.tensors))

    monkeypatch.setattr(NativeModel, "__init__", noting)
    for number in range(10):
        draw = random.Random(f"several in four bits {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        manner = {"quant_type": draw.choice(["nf4", "fp4"]), "nested": draw.random() < 0.5}
        block = draw.choice([32, 64, 128])
        settings = settings_for_blocks(draw) | {
            "hidden_size": draw.choice([block, 3 * block]),
            "intermediate_size": draw.choice([block, 5 * block]),
            "num_attention_heads": 4,
            "num_key_value_heads": draw.choice([1, 2, 4]),
            "head_dim": draw.choice([block // 4, block]),
        }
        model = make_model(**settings)
        has_head = not settings["tie_word_embeddings"] and draw.random() < 0.5
        quantized, plain = quantize(model, "4bit", blocksize=block, head=has_head, **manner)
        quantized.compile_decoding()
        batch, length = draw.choice([2, 3, 4, 5, 7, 9, 16, 33, 64]), draw.choice([1, 2, 5, 12])
        with monkeypatch.context() as patch:
            patch.setattr(quantized_decoding, "weight_of", mock.Mock(side_effect=AssertionError("dequantized")))
            assert_same_text(quantized, plain, draw, length, batch, loop=True)
        assert types[-1].count(torch.uint8) == 7 * settings["num_hidden_layers"] + has_head
    assert len(types) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_read_with_dequantized_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text is written with the stored ones."""
    monkeypatch.setattr(compiled_decoding, "QUANTIZED_PROMPT_TOKENS", 20)
    read = mock.Mock(wraps=CompiledDecoder.read_prompt)
    monkeypatch.setattr(CompiledDecoder, "read_prompt", lambda *arguments: read(*arguments))
    draw = random.Random(kind)
    torch.manual_seed(0)
    quantized, plain = quantize(make_model(**settings_for_blocks(draw)), kind)
    quantized.compile_decoding()
    for length in (6, 61):
        assert_same_text(quantized, plain, draw, length)
        assert read.call_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_what_other_processors_compile(branches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_without(branches, tmp_path, monkeypatch)
    step = None
    for number in range(12):
        draw = random.Random(f"other processors {number}")
        torch.manual_seed(number)
        manner = {"quant_type": draw.choice(["nf4", "fp4"]), "nested": draw.random() < 0.5}
        quantized, plain = quantize(make_model(**settings_for_blocks(draw)), KINDS[number % 2], **manner)
        if step is None:
            quantized.compile_decoding()
            step = quantized.compiled_step
        quantized.compiled_step = step
        assert step is not None
        assert_same_text(quantized, plain, draw, draw.choice([1, 5, 20]), draw.choice([1, 3]))
        assert_same_text(quantized, plain, draw, draw.choice([1, 5]), draw.choice([7, 33]))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_stored_numbers_are_the_dequantized_weight_bit_by_bit(quant_type: str, blocksize: int, nested: bool) -> None:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(512, 96, bias=False, quant_type=quant_type, compute_dtype=torch.float32)
    manner = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(96, 512), requires_grad=False, **manner)
    stored = QuantizedLinear(layer.to("cpu"))
    numbers = torch.stack((stored.weight >> 4, stored.weight & 15), dim=-1).view(-1, blocksize).int()
    assert stored.format == f"{quant_type} {blocksize}"
    assert torch.equal((stored.table[numbers] * stored.scales[:, None]).view(96, 512), stored.dequantized())


def test_changed_scales_of_scales_are_seen() -> None:
    """They are computed once for the tensors of a layer."""
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    first = quantized_decoding.scales_of_blocks(state)
    assert quantized_decoding.scales_of_blocks(state) is first
    state.offset += 1
    torch.testing.assert_close(quantized_decoding.scales_of_blocks(state), first + 1)
    state.absmax = state.absmax.flip(0)
    torch.testing.assert_close(quantized_decoding.scales_of_blocks(state), first.flip(0) + 1)


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
