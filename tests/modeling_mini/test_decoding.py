"""
The fast path of `generate`: when it runs, and that it writes what transformers' loop and a loop without a cache write.
"""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from helpers.random_models import groups, make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, decoding, fast_generation, modeling_mini
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@pytest.fixture(autouse=True)
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows with each call that took the fast path, so that no test compares transformers' loop with itself."""
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return decoding.decode(*args)

    monkeypatch.setattr(fast_generation, "decode", counted)
    yield calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", groups(15))
def test_random_models_and_requests_give_the_same(group: int, dtype: torch.dtype, fast_calls: list[int]) -> None:
    """300 models of random shapes, each with a random request: text, scores, logits and cache, fast and slow."""
    for number in range(10):
        draw = random.Random(f"{group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings).to(dtype)
        request = random_request(draw, settings["vocab_size"])
        request |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        results = []
        for fast in (True, False):
            torch.manual_seed(7)
            calls = len(fast_calls)
            results.append(model.generate(**request, fast_decoding=fast))
            assert len(fast_calls) == calls + fast, (settings, request)
        fast, slow = results
        context = f"{settings}\n{request}"
        # In bfloat16 equal bits: ties between logits are common there, and a tie decides the rest of a text.
        tolerance = 2e-5 if dtype == torch.float32 else 0.0
        assert torch.equal(fast.sequences, slow.sequences), context
        for name in ("scores", "logits"):
            assert len(fast[name]) == len(slow[name])
            for a, b in zip(fast[name], slow[name], strict=True):
                assert a.dtype == b.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert fast.past_key_values.get_seq_length() == slow.past_key_values.get_seq_length()
        for a, b in zip(fast.past_key_values.layers, slow.past_key_values.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("tiny", 30), ("small", 30), ("medium", 30)]
    + [pytest.param(name, 8, marks=pytest.mark.slow) for name in ("large", "gpt2")],
)
def test_presets_give_the_same_bits(name: str, tokens: int, fast_calls: list[int]) -> None:
    model = MiniForCausalLM(MiniConfig.preset(name)).eval()
    request = {"max_new_tokens": tokens, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        for batch in (1, 4):
            ids, mask = torch.randint(8, 264, (batch, 12)), torch.ones(batch, 12, dtype=torch.long)
            mask[1:, :5] = 0
            results = []
            for fast in (True, False):
                torch.manual_seed(7)
                results.append(model.generate(ids, attention_mask=mask, **request, fast_decoding=fast))
            fast, slow = results
            assert torch.equal(fast.sequences, slow.sequences), (dtype, batch)
            assert torch.equal(torch.stack(fast.logits), torch.stack(slow.logits)), (dtype, batch)
    assert len(fast_calls) == 6


def random_request_of_many(draw: random.Random, vocab_size: int) -> dict[str, Any]:
    """A random request with 8 to 20 sequences, of which some end before others."""
    request = random_request(draw, vocab_size)
    batch, length = draw.choice([8, 9, 20]), request["input_ids"].shape[1]
    request["input_ids"] = torch.randint(1, vocab_size, (batch, length))
    request["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    if draw.random() < 0.5:
        for row in range(batch):
            request["attention_mask"][row, : draw.randrange(length)] = 0
    request["eos_token_id"] = torch.randint(1, vocab_size, (max(1, vocab_size // 8),)).tolist()
    return request | {"num_return_sequences": 1}


@pytest.mark.parametrize("group", groups(20))
def test_many_sequences_give_the_same(group: int, monkeypatch: pytest.MonkeyPatch, fast_calls: list[int]) -> None:
    """
    200 models of random shapes, each with a random request of many sequences: text, logits and cache; the text alone,
    where sequences leave; and "exact", which never takes the form for many.
    """
    monkeypatch.setattr(decoding, "FIRST_CAPACITY_OF_MANY", 5)  # the cache has to grow
    products, dropped = [], []
    attention_of_many, drop_finished = decoding.attention_of_many, decoding.Decoder.drop_finished

    def counted_drop(self: decoding.Decoder, unfinished: torch.Tensor) -> None:
        drop_finished(self, unfinished)
        dropped.append(self.kept is not None)

    monkeypatch.setattr(decoding, "attention_of_many", lambda *args: (products.append(1), attention_of_many(*args))[1])
    monkeypatch.setattr(decoding.Decoder, "drop_finished", counted_drop)
    for number in range(10):
        draw = random.Random(f"many {group} {number}")
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        request = random_request_of_many(draw, settings["vocab_size"])
        all_results = {"return_dict_in_generate": True, "output_logits": True}
        in_double = copy.deepcopy(model).double()
        outputs = {}
        for name, (weights, more) in {
            "slow": (in_double, {"fast_decoding": False} | all_results), "fast": (in_double, all_results),
            "slow text": (model, {"fast_decoding": False}), "text": (model, {}),
            "exact": (model, {"fast_decoding": "exact"}),
        }.items():  # fmt: skip
            torch.manual_seed(7)
            before = len(products)
            # A copy, because dynamic RoPE keeps the frequencies of the last text.
            outputs[name] = copy.deepcopy(weights).generate(**request, **more)
            assert name in ("fast", "text") or len(products) == before
        slow, fast = outputs["slow"], outputs["fast"]
        context = f"{settings}\n{request}"
        assert torch.equal(fast.sequences, slow.sequences), context
        assert torch.equal(outputs["text"], outputs["slow text"]), context
        assert torch.equal(outputs["exact"], outputs["slow text"]), context
        assert len(fast.logits) == len(slow.logits)
        for a, b in zip(fast.logits, slow.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for a, b in zip(fast.past_key_values.layers, slow.past_key_values.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=1e-10, atol=1e-10)
    assert products and any(dropped)
    assert len(fast_calls) == 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_exact_gives_the_same_bits_for_many(name: str, fast_calls: list[int]) -> None:
    """And the form for many does not, so that the option has something to switch."""
    model = MiniForCausalLM(MiniConfig.preset(name)).eval()
    ids, mask = torch.randint(8, 264, (16, 12)), torch.ones(16, 12, dtype=torch.long)
    mask[1:, :5] = 0
    request = {"max_new_tokens": 20, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    request |= {"inputs": ids, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    exact, many, slow = (torch.stack(model.generate(**request, fast_decoding=f).logits) for f in ("exact", True, False))
    assert torch.equal(exact, slow)
    assert not torch.equal(many, slow)
    assert len(fast_calls) == 2


def test_finished_sequences_leave_unless_somebody_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of the caller, or a processor of the caller, all sequences are computed to the end."""
    rows = []
    logits = decoding.Decoder.logits
    monkeypatch.setattr(
        decoding.Decoder, "logits", lambda self, ids: (logits(self, ids), rows.append(len(self.filled[0])))[0]
    )
    model = make_model()
    ids = torch.randint(1, 97, (12, 5))
    request = {"inputs": ids, "max_new_tokens": 30, "do_sample": False, "eos_token_id": list(range(20))}
    expected = model.generate(**request, fast_decoding=False)
    assert torch.equal(model.generate(**request), expected)
    assert rows[0] == 12 and rows[-1] < 9 and rows == sorted(rows, reverse=True)
    cache, cache_of_loop = (DynamicCache(config=model.config) for _ in range(2))
    for more in ({"past_key_values": cache}, {"logits_processor": LogitsProcessorList([Forbid()])}):
        rows.clear()
        model.generate(**request, **more)
        assert set(rows) == {12}
    model.generate(**request, past_key_values=cache_of_loop, fast_decoding=False)
    for a, b in zip(cache.layers, cache_of_loop.layers, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=2e-5, atol=2e-5)


def test_wrong_fast_decoding() -> None:
    with pytest.raises(ValueError, match=r"fast_decoding must be .*, got 'fast'"):
        make_model().generate(torch.randint(1, 97, (1, 5)), max_new_tokens=2, fast_decoding="fast")


@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_text_equals_a_loop_without_a_cache(norm_type: str, padded: bool, fast_calls: list[int]) -> None:
    model = make_model(norm_type=norm_type)
    prompts = [torch.randint(1, 97, (length,)).tolist() for length in (9, 3, 6)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(40):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    if padded:
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(input_ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        found = output[:, width:].tolist()
    else:
        found = []
        for prompt in prompts:
            output = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
            found.append(output[0, len(prompt) :].tolist())
    assert found == expected
    assert len(set(map(tuple, expected))) == 3  # three different texts
    assert fast_calls


def test_the_cache_grows_beyond_its_first_room(monkeypatch: pytest.MonkeyPatch, fast_calls: list[int]) -> None:
    monkeypatch.setattr(decoding, "FIRST_CAPACITY", 3)  # of the text too
    for rope in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}):
        model = make_model(rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=16)
        ids = torch.randint(1, 97, (2, 5))
        mask = torch.tensor([[1] * 5, [0] * 2 + [1] * 3])
        request = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
        assert torch.equal(model.generate(**request), model.generate(**request, fast_decoding=False))
    assert len(fast_calls) == 2


def test_large_projections_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    ids = torch.randint(1, 97, (1, 5))
    together = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert len(decoding.Weights.of(model).layers[0].query_key_value) == 1
    monkeypatch.setattr(decoding, "FUSED_BYTES", 0)
    weights = decoding.Weights.of(model)
    assert (
        weights.layers[0].query_key_value[0].weight.data_ptr()
        == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    )
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), together)


def test_changed_weights_are_seen() -> None:
    """By an optimizer, by assignment to .data (as adapters are merged), by loading, and by another type."""
    model, ids = make_model(), torch.randint(1, 97, (1, 5))

    def both() -> list[int]:
        fast, slow = (model.generate(ids, max_new_tokens=12, do_sample=False, fast_decoding=f) for f in (True, False))
        assert torch.equal(fast, slow)
        return fast.tolist()

    texts = [both()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    texts.append(both())
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.5 * torch.randn_like(layer.self_attn.q_proj.weight)
        layer.mlp.up_proj.weight.data += 0.5 * torch.randn_like(layer.mlp.up_proj.weight)
    texts.append(both())
    model.load_state_dict(make_model().state_dict())
    texts.append(both())
    assert len({str(text) for text in texts}) == 4
    model.to(torch.bfloat16)
    both()


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class Forbid(LogitsProcessor):
    """Looks at the text, in a way that needs it in one piece."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.view(-1).numel() == input_ids.numel()
        return scores.scatter(1, input_ids[:, -3:], -float("inf"))


class StopAt(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert input_ids.view(-1).numel() == input_ids.numel()
        return (input_ids[:, 5:] % 7 == 0).any(dim=-1)


@pytest.mark.parametrize("batch", [1, 3])
def test_processors_criteria_and_streamers_of_the_user(batch: int, fast_calls: list[int]) -> None:
    model, ids = make_model(), torch.randint(1, 97, (batch, 5))
    results = []
    for fast in (True, False):
        streamer = Recorder() if batch == 1 else None
        output = model.generate(
            ids,
            max_new_tokens=40,
            do_sample=False,
            logits_processor=LogitsProcessorList([Forbid()]),
            stopping_criteria=StoppingCriteriaList([StopAt(), MaxTimeCriteria(60.0)]),
            streamer=streamer,
            fast_decoding=fast,
        )
        results.append((output.tolist(), streamer and streamer.tokens, streamer and streamer.ended))
    assert results[0] == results[1]
    assert len(fast_calls) == 1
    assert 5 < len(results[0][0][0]) < 45  # the criterion stopped it


class Answer(StoppingCriteria):
    """Answers with what transformers' loop takes beside a tensor of truth values, one for each row."""

    def __init__(self, of: Callable[[bool], Any]) -> None:
        self.of = of

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.of(input_ids.shape[1] == 9)


@pytest.mark.parametrize(
    ("criteria", "length"),
    [
        ([Answer(lambda is_over: is_over)], 9),
        ([Answer(torch.tensor)], 9),
        ([Answer(lambda is_over: torch.full((2,), int(is_over)))], 9),
        ([MaxLengthCriteria(20), MaxLengthCriteria(9)], 9),
        ([MaxLengthCriteria(3)], 6),
    ],
    ids=["bool", "one for all", "numbers", "two lengths", "less than the prompt"],
)
def test_criteria_of_any_form(criteria: list[StoppingCriteria], length: int, fast_calls: list[int]) -> None:
    model, ids = make_model(), torch.randint(1, 97, (2, 5))
    request = {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": StoppingCriteriaList(criteria)}
    written = model.generate(ids, **request)
    assert torch.equal(written, model.generate(ids, **request, fast_decoding=False))
    assert written.shape[1] == length
    assert len(fast_calls) == 1


def test_a_cache_of_the_user_is_continued(fast_calls: list[int]) -> None:
    model, ids = make_model(), torch.randint(1, 97, (1, 8))
    results = []
    for fast in (True, False):
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=cache, fast_decoding=fast)
        assert cache.get_seq_length() == 17
        more = torch.cat((first, ids), dim=1)
        results.append(
            model.generate(more, max_new_tokens=10, do_sample=False, past_key_values=cache, fast_decoding=fast)
        )
        with torch.no_grad():  # and the model itself can go on with it
            results.append(model(results[-1][:, -1:], past_key_values=cache).logits)
    assert len(fast_calls) == 2
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_results_can_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and cache are no inference tensors, which autograd would refuse; also a cache that had to grow."""
    monkeypatch.setattr(decoding, "FIRST_CAPACITY", 2)
    model, ids = make_model(), torch.randint(1, 97, (1, 8))
    output = model.generate(ids, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    model(output.sequences, labels=output.sequences).loss.backward()
    assert model.lm_head.weight.grad is not None
    kept = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    assert not any(tensor.is_inference() for tensor in (output.sequences, *output.logits, *kept))


def add_hook(model: MiniForCausalLM) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)


def replace_forward(model: MiniForCausalLM) -> None:
    model.model.layers[0].mlp.forward = type(model.model.layers[0].mlp).forward.__get__(model.model.layers[0].mlp)


class OtherLinear(nn.Linear):
    pass


def replace_layer(model: MiniForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj = OtherLinear(48, 80, bias=False)


def mix_types(model: MiniForCausalLM) -> None:
    model.model.norm.to(torch.float64)


def parametrize(model: MiniForCausalLM) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


OBSTACLES_OF_MODELS = {
    "hook": (add_hook, "model.layers.1 is not a plain MiniDecoderLayer"),
    "forward": (replace_forward, "model.layers.0.mlp is not a plain MiniMLP"),
    "layer": (replace_layer, "model.layers.0.mlp.up_proj is not a plain OtherLinear"),
    "training": (lambda model: model.train(), "training mode"),
    "training of a part": (lambda model: model.model.layers[1].residual_dropout.train(), "training mode, or a part"),
    "eager attention": (lambda model: model.set_attn_implementation("eager"), "not sdpa"),
    "types": (mix_types, "several types"),
    "parametrization": (parametrize, "model.layers.0.mlp.up_proj is not a plain Parametrized"),
}


@pytest.mark.parametrize("name", OBSTACLES_OF_MODELS)
def test_models_that_take_the_loop_of_transformers(name: str, fast_calls: list[int]) -> None:
    change, reason = OBSTACLES_OF_MODELS[name]
    model = make_model()
    assert decoding.obstacle_of_model(model, model.plain_modules) is None
    change(model)
    assert reason in decoding.obstacle_of_model(model, model.plain_modules)
    if name != "types":  # which no loop can run
        model.generate(torch.randint(1, 97, (1, 5)), max_new_tokens=2)
    assert not fast_calls


@pytest.mark.parametrize(
    "request_",
    [
        {"fast_decoding": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_requests_that_take_the_loop_of_transformers(request_: dict[str, Any], fast_calls: list[int]) -> None:
    model, ids = make_model(), torch.randint(1, 97, (1, 5))
    model.generate(ids, max_new_tokens=3, do_sample=False, **request_)
    assert not fast_calls
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert fast_calls


def test_a_patched_class_or_attention_takes_the_loop_of_transformers(
    monkeypatch: pytest.MonkeyPatch, fast_calls: list[int]
) -> None:
    model, ids = make_model(), torch.randint(1, 97, (1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(modeling_mini.MiniMLP, "forward", lambda self, states: torch.zeros_like(states))
        assert "model.layers.0.mlp is not a plain MiniMLP" in decoding.obstacle_of_model(model, model.plain_modules)
        model.generate(ids, max_new_tokens=3)
    with monkeypatch.context() as patch:

        def attention(*args: Any, **kwargs: Any) -> Any:
            return sdpa_attention_forward(*args, **kwargs)

        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
        model.generate(ids, max_new_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ids, max_new_tokens=3)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: output)
    model.generate(ids, max_new_tokens=3)
    hook.remove()
    assert not fast_calls
    model.generate(ids, max_new_tokens=3)
    assert fast_calls


def test_a_limit_beyond_any_memory(fast_calls: list[int]) -> None:
    """Until the model ends its text: memory is allocated as the text grows."""
    model, ids = make_model(), torch.randint(1, 97, (1, 5))
    first = int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    output = model.generate(ids, max_new_tokens=10**12, do_sample=False, eos_token_id=first)
    assert output.shape == (1, 6) and len(fast_calls) == 2


def test_embeddings_in_place_of_ids_take_the_loop_of_transformers(fast_calls: list[int]) -> None:
    model, ids = make_model(), torch.randint(1, 97, (1, 5))
    model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=3)
    assert not fast_calls


def test_the_switch_in_a_generation_config(fast_calls: list[int], tmp_path: Any) -> None:
    model, ids = make_model(), torch.randint(1, 97, (1, 5))
    model.generate(ids, generation_config=GenerationConfig(max_new_tokens=3, fast_decoding=False))
    model.generation_config = GenerationConfig(pad_token_id=0, fast_decoding=False)
    model.generate(ids, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    MiniForCausalLM.from_pretrained(tmp_path).generate(ids, max_new_tokens=3)
    assert not fast_calls
    model.generate(ids, max_new_tokens=3, fast_decoding=True)
    assert fast_calls
