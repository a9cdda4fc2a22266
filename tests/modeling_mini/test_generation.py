"""
Every way of `generate()` that transformers offers, each against a decoder of a few lines that runs the whole text
through the model for every token and keeps no state.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
import torch
from configuration_mini import MiniConfig
from modeling_mini import MiniForCausalLM
from tokenization import ByteTokenizer
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    TextIteratorStreamer,
    WatermarkDetector,
    WatermarkingConfig,
    pipeline,
)
from transformers.utils import is_optimum_quanto_available

PROMPT = torch.randint(8, 264, (3, 9), generator=torch.Generator().manual_seed(2))
NEW = 16
# Fixed length, so that every test knows what to expect; the end of a text has tests of its own.
ENDLESS = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
GREEDY = {**ENDLESS, "do_sample": False}

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_model(attention: str = "sdpa", **fields: Any) -> MiniForCausalLM:
    """Sharp enough that its greedy text wanders instead of repeating one token."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MiniConfig(**{**sizes, "max_position_embeddings": 128, "tie_word_embeddings": False, **fields})
    model = MiniForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model


@pytest.fixture(scope="module")
def model() -> MiniForCausalLM:
    return make_model()


@torch.no_grad()
def next_scores(model: MiniForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits[:, -1].float()


def greedy_reference(
    model: MiniForCausalLM, ids: torch.Tensor, process: Process = lambda ids, scores: scores, new: int = NEW
) -> torch.Tensor:
    """Greedy decoding without a cache; `process` changes the scores as a logits processor would."""
    for _ in range(new):
        ids = torch.cat((ids, process(ids, next_scores(model, ids)).argmax(-1, keepdim=True)), dim=1)
    return ids


def test_greedy_text_wanders(model: MiniForCausalLM) -> None:
    """The other tests prove little on a text that repeats one token."""
    text = greedy_reference(model, PROMPT)[:, PROMPT.shape[1] :]
    assert all(len(set(row.tolist())) > NEW // 2 for row in text)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
def test_greedy(attention: str, heads: int, norm_type: str) -> None:
    model = make_model(attention, num_key_value_heads=heads, norm_type=norm_type, qk_norm=heads == 2)
    expected = greedy_reference(model, PROMPT)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert torch.equal(model.generate(PROMPT, **GREEDY, use_cache=False), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "max_cache_len": 64},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_other_caches_give_the_same_text(model: MiniForCausalLM, arguments: dict[str, Any]) -> None:
    assert torch.equal(model.generate(PROMPT, **GREEDY, **arguments), greedy_reference(model, PROMPT))


def error_of_cache(model: MiniForCausalLM, cache: QuantizedCache) -> float:
    """How far off the logits of single steps are, in standard deviations of the logits."""
    ids = greedy_reference(model, PROMPT)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        chunks = [PROMPT.shape[1], *[1] * NEW]
        steps = torch.cat([model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)], dim=1)
    # The prompt itself is read before it is rounded.
    torch.testing.assert_close(steps[:, : chunks[0]], exact[:, : chunks[0]], rtol=0, atol=1e-4)
    return ((steps - exact)[:, chunks[0] :].std() / exact.std()).item()


def test_quantized_cache_of_8_bit_floats(model: MiniForCausalLM) -> None:
    # Three bits of mantissa; 0.10 was measured. 0 would mean that nothing was rounded.
    assert 0.001 < error_of_cache(model, QuantizedCache(backend="fp8", config=model.config)) < 0.2
    text = model.generate(PROMPT, **GREEDY, cache_implementation="quantized", cache_config={"backend": "fp8"})
    assert text.shape == (3, 9 + NEW)


@pytest.mark.slow
@pytest.mark.skipif(not is_optimum_quanto_available(), reason="needs optimum-quanto, which builds kernels for 30 s")
def test_quantized_cache_of_4_bit_integers(model: MiniForCausalLM) -> None:
    cache = QuantizedCache(backend="quanto", config=model.config, nbits=4, q_group_size=16, residual_length=4)
    assert 0.001 < error_of_cache(model, cache) < 0.5


@pytest.mark.slow
def test_padded_batch_equals_each_row_alone(model: MiniForCausalLM) -> None:
    lengths = [9, 4, 1]
    mask = torch.zeros_like(PROMPT)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    ids = PROMPT.where(mask.bool(), 0)
    for arguments in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
        batch = model.generate(ids, attention_mask=mask, **GREEDY, **arguments)
        for row, length in enumerate(lengths):
            alone = model.generate(PROMPT[row : row + 1, -length:], **GREEDY, **arguments)
            assert torch.equal(batch[row, 9:], alone[0, length:]), (arguments, row)


def test_the_mask_is_found_from_the_pad_token(model: MiniForCausalLM) -> None:
    ids = PROMPT.clone()
    ids[1, :5] = 0
    batch = model.generate(ids, **GREEDY)
    assert torch.equal(batch[1, 9:], greedy_reference(model, PROMPT[1:2, 5:])[0, 4:])


def test_inputs_embeds(model: MiniForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(PROMPT)
    # Without ids to begin with, only the new ones come back.
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), greedy_reference(model, PROMPT)[:, 9:])
    both = model.generate(PROMPT, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(both, greedy_reference(model, PROMPT))


def test_a_second_turn_continues_the_cache(model: MiniForCausalLM) -> None:
    first = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DynamicCache)
    # The last token has not gone through the model yet.
    assert first.past_key_values.get_seq_length() == 9 + NEW - 1
    second_prompt = torch.cat((first.sequences, PROMPT.flip(0)), dim=1)
    second = model.generate(second_prompt, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy_reference(model, second_prompt))


# The end of a text.


def test_end_of_text_pads_the_rest(model: MiniForCausalLM) -> None:
    full = greedy_reference(model, PROMPT)
    ends = [full[0, 9 + 3].item(), full[1, 9 + 7].item()]
    text = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
    for row in range(3):
        new = full[row, 9:].tolist()
        stop = next((t + 1 for t, token in enumerate(new) if token in ends), NEW)
        expected = new[:stop] + [0] * (text.shape[1] - 9 - stop)
        assert text[row, 9:].tolist() == expected


def test_the_configuration_says_where_a_text_ends() -> None:
    model = make_model(eos_token_id=[2, 7])
    assert model.generation_config.eos_token_id == [2, 7]
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (1, 0)
    # A head that always answers 7.
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
    assert model.generate(PROMPT, do_sample=False, max_new_tokens=5).tolist() == [[*row, 7] for row in PROMPT.tolist()]
    held_back = model.generate(PROMPT, do_sample=False, max_new_tokens=5, min_new_tokens=3)
    assert held_back.shape == (3, 9 + 4)
    assert (held_back[:, -1] == 7).all()
    assert not torch.isin(held_back[:, 9:-1], torch.tensor([2, 7])).any()


def test_an_empty_prompt_begins_with_bos(model: MiniForCausalLM) -> None:
    text = model.generate(**GREEDY)
    assert torch.equal(text, greedy_reference(model, torch.tensor([[1]])))


ASCII = [8 + byte for byte in range(32, 127)]
NOT_ASCII = [i for i in range(264) if i not in ASCII]


def test_stop_strings(model: MiniForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    full = model.generate(PROMPT[:1], **GREEDY, suppress_tokens=NOT_ASCII)
    text = tokenizer.decode(full[0, 9:])
    assert len(text) == NEW
    stop = text[5:8]
    end = text.index(stop) + len(stop)
    stopped = model.generate(
        PROMPT[:1], **GREEDY, suppress_tokens=NOT_ASCII, stop_strings=["\n\n", stop], tokenizer=tokenizer
    )
    assert tokenizer.decode(stopped[0, 9:]) == text[:end]


def test_streamer(model: MiniForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    text = model.generate(PROMPT[:1], **GREEDY, suppress_tokens=NOT_ASCII, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(text[0, 9:])


def test_pipeline_reads_messages_whose_text_is_in_parts(model: MiniForCausalLM) -> None:
    write = pipeline("text-generation", model=model, tokenizer=ByteTokenizer(), do_sample=False, max_new_tokens=4)
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    answers = [write(messages)[0]["generated_text"][-1] for messages in (parts, [{"role": "user", "content": "hi"}])]
    assert answers[0] == answers[1] and answers[0]["role"] == "assistant"
    with pytest.raises(jinja2.TemplateError, match="A message is text, and a part of it that is not cannot be read"):
        write([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}])


# What changes the scores.


def test_repetition_penalty(model: MiniForCausalLM) -> None:
    def penalise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, seen in zip(scores, ids, strict=True):
            for token in set(seen.tolist()):
                row[token] = row[token] / 1.7 if row[token] > 0 else row[token] * 1.7
        return scores

    expected = greedy_reference(model, PROMPT, penalise)
    assert torch.equal(model.generate(PROMPT, **GREEDY, repetition_penalty=1.7), expected)
    assert not torch.equal(expected, greedy_reference(model, PROMPT))


def test_no_repeat_ngram(model: MiniForCausalLM) -> None:
    def few_letters(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :-12] = -torch.inf
        return scores

    def no_pair_twice(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = few_letters(ids, scores)
        for row, seen in zip(scores, ids.tolist(), strict=True):
            for first, second in itertools.pairwise(seen):
                if first == seen[-1]:
                    row[second] = -torch.inf
        return scores

    # With twelve letters, forty of them are sure to repeat a pair.
    plain = greedy_reference(model, PROMPT, few_letters, new=40)
    expected = greedy_reference(model, PROMPT, no_pair_twice, new=40)
    assert all(len(set(itertools.pairwise(row))) < 48 for row in plain.tolist())
    assert all(len(set(itertools.pairwise(row))) == 48 for row in expected.tolist())
    few = {**GREEDY, "max_new_tokens": 40, "suppress_tokens": list(range(252))}
    assert torch.equal(model.generate(PROMPT, **few), plain)
    assert torch.equal(model.generate(PROMPT, **few, no_repeat_ngram_size=2), expected)


def test_bad_words(model: MiniForCausalLM) -> None:
    plain = greedy_reference(model, PROMPT)
    one, pair = plain[0, 9].item(), plain[1, 9:11].tolist()

    def ban(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, one] = -torch.inf
        scores[ids[:, -1] == pair[0], pair[1]] = -torch.inf
        return scores

    text = model.generate(PROMPT, **GREEDY, bad_words_ids=[[one], pair])
    assert torch.equal(text, greedy_reference(model, PROMPT, ban))
    assert not (text[:, 9:] == one).any()
    assert text[1, 9:11].tolist() != pair


def test_forced_and_suppressed_tokens(model: MiniForCausalLM) -> None:
    text = model.generate(PROMPT, **GREEDY, suppress_tokens=NOT_ASCII, forced_eos_token_id=8 + ord("!"))
    assert torch.isin(text[:, 9:], torch.tensor(ASCII)).all()
    assert (text[:, -1] == 8 + ord("!")).all()
    assert not (text[:, -2] == 8 + ord("!")).all()


def test_own_logits_processor(model: MiniForCausalLM) -> None:
    def only_even(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, torch.arange(1, 264, 2), -torch.inf)

    text = model.generate(PROMPT, **GREEDY, logits_processor=[only_even])
    assert torch.equal(text, greedy_reference(model, PROMPT, only_even))


# Sampling.


def test_sampling_follows_the_seed(model: MiniForCausalLM) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(PROMPT, **ENDLESS, do_sample=True, top_k=0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_sampling_with_and_without_a_cache_is_the_same(model: MiniForCausalLM) -> None:
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(PROMPT, **ENDLESS, do_sample=True, top_k=50, top_p=0.9, use_cache=use_cache))
    assert torch.equal(*texts)


@pytest.mark.slow
def test_sampling_has_the_frequencies_of_the_model(model: MiniForCausalLM) -> None:
    count, temperature = 20_000, 0.7
    text = model.generate(
        PROMPT[:1], **{**ENDLESS, "max_new_tokens": 1}, do_sample=True, top_k=0, temperature=temperature,
        num_return_sequences=count,
    )  # fmt: skip
    seen = torch.bincount(text[:, -1], minlength=264) / count
    expected = (next_scores(model, PROMPT[:1])[0] / temperature).softmax(-1)
    # Five standard deviations of a frequency of one half.
    assert (seen - expected).abs().max() < 5 * 0.5 / count**0.5


def top_k_set(p: torch.Tensor) -> torch.Tensor:
    return p >= p.sort(descending=True).values[7]


def top_p_set(p: torch.Tensor) -> torch.Tensor:
    """The fewest most probable tokens that together reach 0.6."""
    values, order = p.sort(descending=True)
    kept = order[values.cumsum(-1) - values < 0.6]
    return torch.zeros_like(p, dtype=torch.bool).index_fill(0, kept, True)


def min_p_set(p: torch.Tensor) -> torch.Tensor:
    return p >= 0.2 * p.max()


def typical_p_set(p: torch.Tensor) -> torch.Tensor:
    """The fewest tokens, nearest to the mean surprise, that together reach 0.5."""
    surprise = -p.log()
    order = (surprise - (p * surprise).sum()).abs().argsort()
    before = p[order].cumsum(-1) - p[order]
    return torch.zeros_like(p, dtype=torch.bool).index_fill(0, order[before < 0.5], True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "allowed_set"),
    [
        ({"top_k": 8}, top_k_set),
        ({"top_k": 0, "top_p": 0.6}, top_p_set),
        ({"top_k": 0, "min_p": 0.2}, min_p_set),
        ({"top_k": 0, "typical_p": 0.5}, typical_p_set),
    ],
    ids=["top_k", "top_p", "min_p", "typical_p"],
)
def test_sampling_draws_from_the_allowed_tokens(
    model: MiniForCausalLM, arguments: dict[str, Any], allowed_set: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # Some mass beyond every cut-off, and so many draws that each allowed token comes up.
    temperature, count = 2.0, 3000
    p = (next_scores(model, PROMPT[:1])[0] / temperature).softmax(-1)
    allowed = allowed_set(p)
    assert 1 < allowed.sum() < 250
    assert p[~allowed].sum() > 0.1
    text = model.generate(
        PROMPT[:1], **{**ENDLESS, "max_new_tokens": 1}, do_sample=True, temperature=temperature, **arguments,
        num_return_sequences=count,
    )  # fmt: skip
    seen = torch.bincount(text[:, -1], minlength=264) > 0
    assert not (seen & ~allowed).any()
    likely = allowed & (p / p[allowed].sum() > 10 / count)
    assert seen[likely].all()


# Beams.


def beam_reference(model: MiniForCausalLM, ids: torch.Tensor, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `beams` texts of one prompt and their mean log-probability for each new token."""
    texts, totals = ids, torch.zeros(1)
    for _ in range(NEW):
        candidates = totals[:, None] + next_scores(model, texts).log_softmax(-1)
        totals, best = candidates.flatten().topk(beams)
        texts = torch.cat((texts[best // 264], best[:, None] % 264), dim=1)
    return texts, totals / NEW


def test_beam_search(model: MiniForCausalLM) -> None:
    outputs = model.generate(
        PROMPT, **GREEDY, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True
    )
    for row in range(3):
        texts, scores = beam_reference(model, PROMPT[row : row + 1], 4)
        assert torch.equal(outputs.sequences[4 * row : 4 * row + 4], texts)
        torch.testing.assert_close(outputs.sequences_scores[4 * row : 4 * row + 4], scores, rtol=0, atol=1e-4)
    steps = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    torch.testing.assert_close(steps.sum(-1) / NEW, outputs.sequences_scores, rtol=0, atol=1e-4)
    assert not torch.equal(outputs.sequences[::4], greedy_reference(model, PROMPT))


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_beam_search_reorders_every_cache(model: MiniForCausalLM, arguments: dict[str, Any]) -> None:
    expected = model.generate(PROMPT, **GREEDY, num_beams=4)
    assert torch.equal(model.generate(PROMPT, **GREEDY, num_beams=4, **arguments), expected)


def test_beam_sampling(model: MiniForCausalLM) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(PROMPT, **ENDLESS, do_sample=True, num_beams=3, temperature=2.0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    "arguments",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[9]]},
        {"dola_layers": "low"},
    ],
    ids=["contrastive", "group beams", "constrained beams", "dola"],
)
def test_modes_that_transformers_moved_to_the_hub(model: MiniForCausalLM, arguments: dict[str, Any]) -> None:
    """They are code on the Hub now, for any model alike; this test fails should they come back, to be tested here."""
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        model.generate(PROMPT, **GREEDY, **arguments)


# Speculation: the text of the model alone, in fewer calls.


def counted_calls(model: MiniForCausalLM, **arguments: Any) -> tuple[torch.Tensor, int]:
    calls: list[int] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    text = model.generate(**arguments)
    hook.remove()
    return text, len(calls)


def test_assisted_generation(model: MiniForCausalLM) -> None:
    ids = PROMPT[:1]
    expected = greedy_reference(model, ids)
    # A good assistant, which is the model itself, and a bad one.
    same = make_model()
    other = make_model(num_hidden_layers=1)
    for assistant in (same, other):
        assistant.generation_config.update(
            num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        text, calls = counted_calls(model, inputs=ids, **GREEDY, assistant_model=assistant)
        assert torch.equal(text, expected)
        assert calls <= (NEW // 4 + 1 if assistant is same else NEW)


@pytest.mark.slow
def test_assisted_sampling_follows_the_seed(model: MiniForCausalLM) -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        assistant = make_model(num_hidden_layers=1)
        texts.append(model.generate(PROMPT[:1], **ENDLESS, do_sample=True, assistant_model=assistant))
    assert torch.equal(*texts)


def test_prompt_lookup(model: MiniForCausalLM) -> None:
    # The prompt holds its own continuation, and begins again: what follows can be looked up.
    once = greedy_reference(model, PROMPT[:1])
    ids = torch.cat((once, once[:, -4:], once), dim=1)
    text, calls = counted_calls(model, inputs=ids, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(text, greedy_reference(model, ids))
    assert calls <= NEW


def test_early_exit_drafts_with_the_first_layers() -> None:
    model = make_model(num_hidden_layers=3)
    first, last = [], []
    model.model.layers[0].register_forward_hook(lambda *_: first.append(1))
    model.model.layers[2].register_forward_hook(lambda *_: last.append(1))
    text = model.generate(PROMPT[:1], **GREEDY, assistant_early_exit=1)
    assert len(first) > len(last), "the draft ran through every layer"
    assert model.config.num_hidden_layers == 3
    assert torch.equal(text, greedy_reference(model, PROMPT[:1]))


# Watermarks.


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_watermark_and_its_detector(model: MiniForCausalLM, scheme: str) -> None:
    watermark = WatermarkingConfig(bias=6.0, seeding_scheme=scheme, greenlist_ratio=0.25)
    detector = WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=watermark)
    arguments = {**ENDLESS, "max_new_tokens": 40, "do_sample": True, "temperature": 2.0, "top_k": 0}
    marked = model.generate(PROMPT, **arguments, watermarking_config=watermark)
    unmarked = model.generate(PROMPT, **arguments)
    assert detector(marked[:, 9:]).all()
    assert not detector(unmarked[:, 9:]).any()


# What generate returns.


def test_returned_scores_and_logits(model: MiniForCausalLM) -> None:
    outputs = model.generate(
        PROMPT, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.5
    )
    assert len(outputs.scores) == len(outputs.logits) == NEW
    for t in range(NEW):
        expected = next_scores(model, outputs.sequences[:, : 9 + t])
        torch.testing.assert_close(outputs.logits[t], expected, rtol=0, atol=1e-4)
        assert torch.equal(outputs.scores[t].argmax(-1), outputs.sequences[:, 9 + t])
        assert not torch.equal(outputs.scores[t], outputs.logits[t])


def test_returned_attentions_and_hidden_states() -> None:
    model = make_model("eager")
    outputs = model.generate(
        PROMPT, **GREEDY, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
    )
    with torch.no_grad():
        full = model(outputs.sequences[:, :-1], output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == len(outputs.hidden_states) == NEW
    for layer in range(2):
        prefill = outputs.attentions[0][layer]
        assert prefill.shape == (3, 4, 9, 9)
        torch.testing.assert_close(prefill, full.attentions[layer][:, :, :9, :9], rtol=0, atol=1e-4)
        for t in range(1, NEW):
            step = outputs.attentions[t][layer]
            assert step.shape == (3, 4, 1, 9 + t)
            torch.testing.assert_close(step[:, :, 0], full.attentions[layer][:, :, 8 + t, : 9 + t], rtol=0, atol=1e-4)
    for layer in range(3):
        states = torch.cat([step[layer] for step in outputs.hidden_states], dim=1)
        torch.testing.assert_close(states, full.hidden_states[layer], rtol=0, atol=1e-4)


# Continuous batching.


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_batch_equals_each_prompt_alone(attention: str) -> None:
    model = make_model(attention)
    prompts = [PROMPT[0, :length].tolist() for length in (9, 5, 2, 7, 1, 8)]
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**{**GREEDY, "eos_token_id": -1}),
        # The default makes room for a server, and takes half a minute for it.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
    )
    assert len(results) == len(prompts)
    answers = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    for prompt in prompts:
        expected = greedy_reference(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()
        assert answers[tuple(prompt)] == expected
    # The model is as it was before.
    assert model.config._attn_implementation == attention
    assert torch.equal(model.generate(PROMPT, **GREEDY), greedy_reference(model, PROMPT))
