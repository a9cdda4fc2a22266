"""Compiled decoding: that it writes what the uncompiled step writes, for any model and batch, and when it runs."""

import copy
import ctypes
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.other_processors import BRANCHES, compile_without
from helpers.random_models import groups, make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, compiled_decoding, decoding, native_code
from modeling_mini.compiled_decoding import ACTIVATIONS, CompiledDecoder, NativeModel, native_library
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache

PROMPT = torch.arange(1, 6)[None]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each compiled step, by the number of its sequences."""
    sizes: list[int] = []
    step = CompiledDecoder.step

    def counting(self: CompiledDecoder, token_ids: torch.Tensor, *rotary: torch.Tensor) -> torch.Tensor:
        sizes.append(len(token_ids))
        return step(self, token_ids, *rotary)

    monkeypatch.setattr(CompiledDecoder, "step", counting)
    return sizes


def assert_close(written: Any, expected: Any) -> None:
    """Texts are equal; logits and cache nearly."""
    assert torch.equal(written.sequences, expected.sequences)
    assert len(written.logits) == len(expected.logits)
    for a, b in zip(written.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert written.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for a, b in zip(written.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("group", groups(20))
def test_random_models_and_requests_give_the_same(
    group: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    200 models of random shapes, with batches of 1 to 20, padded or not: text, logits and cache; and the text alone,
    where finished sequences leave.
    """
    monkeypatch.setattr(decoding, "FIRST_CAPACITY_OF_MANY", 5)  # the cache has to grow
    pairs = []
    for number in range(10):
        draw = random.Random(f"compiled {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        request = random_request(draw, settings["vocab_size"])
        batch, length = draw.choice([1, 1, 2, 3, 4, 8, 13, 20]), request["input_ids"].shape[1]
        request["input_ids"] = torch.randint(1, settings["vocab_size"], (batch, length))
        mask = torch.ones(batch, length, dtype=torch.long)
        if draw.random() < 0.5:
            for row in range(batch):
                mask[row, : draw.randrange(length)] = 0
        ends = torch.randint(1, settings["vocab_size"], (max(1, settings["vocab_size"] // 8),)).tolist()
        request |= {"attention_mask": mask, "eos_token_id": ends, "num_return_sequences": 1}
        all_results = {"return_dict_in_generate": True, "output_logits": True}
        outputs = []
        for is_compiled, more in ((False, all_results | {"fast_decoding": False}), (True, all_results), (True, {})):
            each = copy.deepcopy(model)  # dynamic RoPE keeps the frequencies of the last text
            if is_compiled:
                each.compile_decoding()
            torch.manual_seed(7)
            sizes.clear()
            outputs.append(each.generate(**request, **more))
            pairs += [(size, batch) for size in sizes]
            if is_compiled and more:
                assert len(sizes) == len(outputs[-1].logits) - 1, "the first token comes from the prompt"
        expected, written, text = outputs
        assert_close(written, expected)
        assert torch.equal(text, expected.sequences), f"{settings}\n{request}"
    assert len(pairs) > 20 and any(size < batch for size, batch in pairs)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows with each prompt that the native function reads, by the sizes of its token ids. It reads all of them."""
    sizes: list[tuple[int, ...]] = []
    read_prompt = CompiledDecoder.read_prompt

    def noting(self: CompiledDecoder, token_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(token_ids.shape))
        return read_prompt(self, token_ids, position_ids)

    monkeypatch.setattr(CompiledDecoder, "read_prompt", noting)
    monkeypatch.setattr(compiled_decoding, "PROMPT_TOKENS", 10**6)
    monkeypatch.setattr(compiled_decoding, "QUANTIZED_PROMPT_TOKENS", 10**6)
    return sizes


@pytest.mark.parametrize("group", groups(10))
def test_prompts_of_any_length(group: int, sizes: list[int], prompts: list[tuple[int, ...]]) -> None:
    """
    100 random models: prompts of one block and of several, without padding, padded, and with any mask; then a text that
    goes on from the cache.
    """
    for number in range(10):
        draw = random.Random(f"prompts {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        batch, length = draw.choice([1, 1, 2, 5, 20]), draw.choice([1, 2, 15, 16, 17, 33, 70])
        whole = torch.randint(1, settings["vocab_size"], (batch, length + 40))
        mask = torch.ones_like(whole)
        if (kind := draw.choice(["none", "padded", "any"])) == "padded":
            for row in range(batch):
                mask[row, : draw.randrange(length)] = 0
        elif kind == "any":
            mask[:, :length] = torch.rand(batch, length) < 0.7
            mask[:, length - 1] = 1
        more, request = draw.choice([1, 5, 20]), {"max_new_tokens": draw.choice([1, 2, 9]), "do_sample": False}
        request |= {"return_dict_in_generate": True, "output_logits": True}
        results = []
        for is_compiled in (False, True):
            each = copy.deepcopy(model)  # dynamic RoPE keeps the frequencies of the last text
            if is_compiled:
                each.compile_decoding()
            first = each.generate(whole[:, :length], attention_mask=mask[:, :length], **request)
            text = torch.cat((first.sequences, whole[:, length : length + more]), dim=1)
            cache = copy.deepcopy(first.past_key_values)
            second = each.generate(text, attention_mask=mask[:, : text.shape[1]], past_key_values=cache, **request)
            results.append((first, second))
        for written, expected in zip(*reversed(results), strict=True):
            assert_close(written, expected)
        assert prompts[-2] == (batch, length) and prompts[-1][0] == batch and len(prompts) == 2 * (number + 1)
    assert sizes


def test_which_prompts_it_reads(compiled: MiniForCausalLM, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    read = mock.Mock(wraps=CompiledDecoder.read_prompt)
    monkeypatch.setattr(CompiledDecoder, "read_prompt", lambda *arguments: read(*arguments))
    most = compiled_decoding.PROMPT_TOKENS
    cache = DynamicCache()
    text = torch.randint(1, 97, (1, 9))
    with torch.no_grad():
        compiled(text[:, :4], past_key_values=cache)
    requests = [
        (True, {"inputs": torch.randint(1, 97, (1, most))}),
        (False, {"inputs": torch.randint(1, 97, (1, most + 1))}),
        (True, {"inputs": torch.randint(1, 97, (2, most // 2))}),
        (False, {"inputs": torch.randint(1, 97, (2, most // 2 + 1))}),
        (False, {"inputs": text, "prefill_chunk_size": 4}),
        (False, {"inputs": text, "fast_decoding": "exact"}),
        (True, {"inputs": text, "past_key_values": copy.deepcopy(cache)}),
        # Without the tokens of the cache, as the mask tells.
        (False, {"inputs": text[:, 4:], "attention_mask": torch.ones(1, 9), "past_key_values": copy.deepcopy(cache)}),
    ]
    for expected, request in requests:
        read.reset_mock()
        written = compiled.generate(**request, max_new_tokens=5, do_sample=False)
        assert read.called == expected, request
        if "past_key_values" in request:
            request["past_key_values"] = copy.deepcopy(cache)
        request["fast_decoding"] = False
        assert torch.equal(written, compiled.generate(**request, max_new_tokens=5, do_sample=False))
    with pytest.raises(IndexError, match="index out of range in self"):
        compiled.generate(torch.tensor([[1, 97]]), max_new_tokens=5, do_sample=False)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("activation", ACT2FN)
def test_every_activation_that_it_knows(activation: str, threads: int, sizes: list[int]) -> None:
    """In shapes that no vector fits, on any number of threads; and the others are decoded without it."""
    if type(ACT2FN[activation]) not in ACTIVATIONS and threads > 1:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
        torch.manual_seed(1)
        model = make_model(**shape, head_dim=10, hidden_act=activation, attention_bias=True, mlp_bias=True)
        model.compile_decoding()
        if type(ACT2FN[activation]) not in ACTIVATIONS:
            assert model.compiled_step is None
            return
        ids = torch.randint(1, 97, (7, 11))
        request = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        assert_close(model.generate(ids, **request), model.generate(ids, **request, fast_decoding=False))
        assert sizes == [7] * 11
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 192])
def test_heads_that_vectors_fit(head_dim: int, sizes: list[int]) -> None:
    torch.manual_seed(1)
    model = make_model(head_dim=head_dim, num_hidden_layers=1)
    model.compile_decoding()
    request = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for ids in (torch.randint(1, 97, (1, 40)), torch.randint(1, 97, (6, 9))):
        assert_close(model.generate(ids, **request), model.generate(ids, **request, fast_decoding=False))
    assert len(sizes) == 2 * 29


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_large_weights_stay_where_they_are(batch: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = make_model(attention_bias=True, mlp_bias=True)
    model.compile_decoding()
    packed, init = [], NativeModel.__init__

    def noting(self: NativeModel, model: MiniForCausalLM, pack: bool) -> None:
        packed.append(pack)
        init(self, model, pack)

    monkeypatch.setattr(NativeModel, "__init__", noting)
    ids = torch.randint(1, 97, (batch, 5))
    request = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **request, fast_decoding=False)
    assert_close(model.generate(ids, **request), expected)
    monkeypatch.setattr(compiled_decoding, "PACKED_BYTES", 1000)
    assert_close(model.generate(ids, **request), expected)
    assert packed == [batch > 1, False] and len(sizes) == 2 * 29
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert {t.data_ptr() for t in NativeModel(model, pack=False).tensors} == pointers, "nothing is copied"


@pytest.mark.parametrize("pad_token_id", [-1, 97, 10**12])
def test_a_token_outside_of_the_vocabulary_is_no_address(pad_token_id: int, sizes: list[int]) -> None:
    """Finished sequences read the pad token."""
    torch.manual_seed(0)
    model = make_model()
    model.compile_decoding()
    request = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": list(range(20)), "pad_token_id": pad_token_id}
    for fast in (False, True):
        with pytest.raises(IndexError, match="index out of range in self"):
            # Results that somebody can see keep the finished sequences.
            model.generate(torch.randint(1, 97, (4, 5)), **request, fast_decoding=fast, return_dict_in_generate=True)
    assert sizes


def test_token_ids_of_32_bits(compiled: MiniForCausalLM) -> None:
    """As numpy makes them on some systems."""
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = compiled.generate(PROMPT, **settings, fast_decoding=False)
    for how in (True, "exact"):
        written = compiled.generate(PROMPT.int(), **settings, fast_decoding=how)
        assert written.dtype == torch.int64 and torch.equal(written, expected)


def test_an_adapter_that_learned_the_embedding_and_is_merged(sizes: list[int]) -> None:
    """peft then makes the head anew from the embedding, with its numbers of inputs and outputs exchanged."""
    model = make_model(vocab_size=37, tie_word_embeddings=True)
    learned = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = LoraConfig(r=2, init_lora_weights=False, **learned)
    merged = get_peft_model(model, adapter).merge_and_unload().eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = merged.generate(PROMPT, max_new_tokens=20, do_sample=False, fast_decoding=False)
    merged.compile_decoding()
    assert torch.equal(merged.generate(PROMPT, max_new_tokens=20, do_sample=False), expected) and sizes


def test_exact_is_decoded_without(sizes: list[int]) -> None:
    model = make_model()
    model.compile_decoding()
    ids = torch.randint(1, 97, (3, 5))
    exact = model.generate(ids, max_new_tokens=6, do_sample=False, fast_decoding="exact")
    assert not sizes
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), exact)
    assert sizes == [3] * 5


@pytest.fixture(scope="module")
def compiled() -> MiniForCausalLM:
    """A model with about every part."""
    torch.manual_seed(0)
    model = make_model(
        num_hidden_layers=1, hidden_size=32, intermediate_size=48, qk_norm=True, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model.compile_decoding()
    assert model.compiled_step is not None
    return model


@pytest.mark.slow
def test_long_texts(compiled: MiniForCausalLM, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampling, from a prompt of one token on, over a cache that has to grow."""
    monkeypatch.setattr(decoding, "FIRST_CAPACITY_OF_MANY", 7)
    for batch, length in ((1, 1), (1, 2), (1, 19), (1, 40), (2, 1), (3, 2), (8, 19), (20, 40)):
        ids, mask = torch.randint(1, 97, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        mask[1:, : length // 2] = 0
        for manner in ({"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 0.8}):
            texts = []
            for switch in ({}, {"fast_decoding": False}):
                torch.manual_seed(3)
                texts.append(compiled.generate(ids, attention_mask=mask, max_new_tokens=60, **manner, **switch))
            assert torch.equal(*texts)
    assert len(sizes) == 8 * 2 * 59


def test_changed_weights_are_seen(compiled: MiniForCausalLM, sizes: list[int]) -> None:
    """Also by a copy of the model, which shares the function and not the weights."""
    model = copy.deepcopy(compiled)
    texts = []
    for _ in range(3):
        text = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
        assert torch.equal(text, model.generate(PROMPT, max_new_tokens=20, do_sample=False, fast_decoding=False))
        texts.append(text.tolist())
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    assert len({str(text) for text in texts}) == 3
    assert len(sizes) == 3 * 19
    before = compiled.generate(PROMPT, max_new_tokens=20, do_sample=False)
    assert before.tolist() == texts[0]
    assert pickle.loads(pickle.dumps(model)).compiled_step is None


def with_another_vocabulary(model: MiniForCausalLM) -> None:
    model.resize_token_embeddings(90)


def with_another_eps(model: MiniForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def with_another_activation(model: MiniForCausalLM) -> None:
    model.model.layers[0].mlp.act_fn = ACT2FN["relu2"].eval()


def with_another_scale(model: MiniForCausalLM) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def with_weights_in_another_order(model: MiniForCausalLM) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()


def in_bfloat16(model: MiniForCausalLM) -> None:
    model.to(torch.bfloat16)


def with_an_unknown_activation(model: MiniForCausalLM) -> None:
    model.model.layers[0].mlp.act_fn = ACT2FN["mish"].eval()


def with_a_hook(model: MiniForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        *((each, 8) for each in (with_another_vocabulary, with_another_eps, with_another_activation)),
        *((each, 8) for each in (with_another_scale, with_weights_in_another_order)),
        *((each, 0) for each in (in_bfloat16, with_an_unknown_activation, with_a_hook)),
    ],
)
def test_a_model_that_has_changed_since(
    change: Callable[[MiniForCausalLM], None], steps: int, compiled: MiniForCausalLM, sizes: list[int]
) -> None:
    """Where the function knows what the model has now, it is used with that."""
    model = copy.deepcopy(compiled)
    request = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(PROMPT, **request)
    sizes.clear()
    change(model)
    written = model.generate(PROMPT, **request)
    assert len(sizes) == steps
    assert_close(written, model.generate(PROMPT, **request, fast_decoding=False))
    is_same = before.logits[0].shape == written.logits[0].shape and torch.equal(before.logits[0], written.logits[0])
    assert is_same == (change is with_weights_in_another_order)


def test_the_file_is_used_again_unless_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, compile_anew = native_library.__wrapped__, native_code.compile_library
    monkeypatch.setenv("MINI_CACHE", str(tmp_path / "cache"))
    compiled = mock.Mock(side_effect=compile_anew)
    monkeypatch.setattr(native_code, "compile_library", compiled)
    names = [load()._name for _ in range(2)]
    (path,) = (tmp_path / "cache" / "decoding").iterdir()
    assert names[1] == str(path) and compiled.call_count == 1
    whole = path.read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:half], whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :], b""):
        path.unlink()  # it is mapped into this process
        path.write_bytes(damaged)
        load()
        assert path.read_bytes() == whole
    assert compiled.call_count == 4
    monkeypatch.setattr(compiled_decoding, "SOURCE", compiled_decoding.SOURCE + "// changed")
    assert not compiled_decoding.is_compiled()
    monkeypatch.setenv("MINI_CACHE", str(path))  # a file, in which there can be no folder
    assert load().scratch_size.restype is ctypes.c_int64


@pytest.mark.slow
@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_what_other_processors_compile(
    branches: list[str],
    sizes: list[int],
    prompts: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_without(branches, tmp_path, monkeypatch)
    for number in range(10):
        draw = random.Random(f"other processors {number}")
        torch.manual_seed(number)
        model = make_model(**random_settings(draw))
        if number == 0:
            model.compile_decoding()
            step = model.compiled_step
        model.compiled_step = step
        request = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        for batch in (1, 2, 7):
            ids = torch.randint(1, model.config.vocab_size, (batch, draw.choice([6, 20])))
            assert_close(
                copy.deepcopy(model).generate(ids, **request), model.generate(ids, **request, fast_decoding=False)
            )
    assert len(sizes) == 10 * 3 * 9 and len(prompts) == 10 * 3


def test_structures_have_the_sizes_of_the_compiler() -> None:
    """A field that only one side knows would shift all that follow it."""
    library = native_library()
    names = ("LinearStruct", "NormStruct", "LayerStruct", "ModelStruct", "StepStruct")
    written = (ctypes.c_int64 * len(names))()
    library.structure_sizes(written)
    assert list(written) == [ctypes.sizeof(getattr(compiled_decoding, name)) for name in names]


def test_without_a_compiler_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config
    from transformers.utils import logging

    monkeypatch.setattr(compiled_decoding, "native_library", native_library.__wrapped__)
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = make_model(num_hidden_layers=1)
    with caplog.at_level("WARNING"), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        model.compile_decoding()
    assert model.compiled_step is None
    (warning,) = [record.message for record in caplog.records if record.name == "modeling_mini.fast_generation"]
    assert warning.startswith("Decoding is not compiled, and goes on without: ") and "\n" not in warning
    text = model.generate(PROMPT, max_new_tokens=9, do_sample=False)
    assert torch.equal(text, model.generate(PROMPT, max_new_tokens=9, do_sample=False, fast_decoding=False))


@pytest.mark.slow
@pytest.mark.parametrize("but_for", ["", "--version -fsyntax-only"], ids=["always", "when it compiles to the end"])
def test_a_compiler_that_hangs_is_not_waited_for(but_for: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    compiler = tmp_path / "c++"
    answers = "".join(f'case "$*" in *{flag}*) exit;; esac\n' for flag in but_for.split())
    compiler.write_text(f"#!/bin/sh\n{answers}exec sleep 100\n")
    compiler.chmod(0o755)
    warnings: list[str] = []
    monkeypatch.setattr("modeling_mini.fast_generation.logger.warning", warnings.append)
    monkeypatch.setattr(compiled_decoding, "native_library", native_library.__wrapped__)
    monkeypatch.setattr(native_code, "SECONDS", 0.5)
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    model = make_model(num_hidden_layers=1)
    with config.patch({"cpp.cxx": (None, str(compiler))}):
        model.compile_decoding()
    reason = f"the C++ compiler {str(compiler)!r} gave no answer in 0.5 seconds."
    assert warnings == [f"Decoding is not compiled, and goes on without: {reason}"] and model.compiled_step is None


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
