"""Continuing text: streaming that is exact, windows beyond the context, and settings."""

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_mini import program, text_generation
from generation_mini.arguments import SAMPLING, GenerationArguments, parse_arguments
from generation_mini.text_generation import (
    CharacterStreamer,
    Continuation,
    IncrementalDetokenizer,
    generation_config,
    own_processors,
    write_on,
)
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.compiled_decoding import NAME, SOURCE, CompiledDecoder
from modeling_mini.native_code import compile_library
from tokenization import ByteTokenizer, CharTokenizer
from transformers import GenerationConfig

CONTEXT = 32


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> MiniForCausalLM:
    torch.manual_seed(0)
    config = MiniConfig.preset("tiny", num_hidden_layers=1, max_position_embeddings=CONTEXT)
    model = MiniForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    return model


def stream(tokenizer, ids: list[int]) -> list[str]:
    pieces: list[str] = []
    streamer = CharacterStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1]]))
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    streamer.finish()
    return pieces


def test_stream_equals_decode_for_any_bytes(tokenizer: ByteTokenizer) -> None:
    generator = random.Random(0)
    for trial in range(500):
        whole = "né漢🎉\u0301 ".encode() * 3
        data = bytes(generator.choices(range(256), k=30)) if trial % 2 else whole[generator.randrange(9) :][:29]
        ids = tokenizer.encode_corpus(data).tolist()
        assert "".join(stream(tokenizer, ids)) == data.decode("utf-8", "replace")


def test_stream_never_shows_half_a_character_and_shows_each_at_once(tokenizer: ByteTokenizer) -> None:
    text = "aé漢🎉z"
    pieces: list[str] = []
    streamer = CharacterStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1]]))
    shown = []
    for token_id in tokenizer.encode_corpus(text.encode()).tolist():
        streamer.put(torch.tensor([token_id]))
        shown.append("".join(pieces))
    assert shown == ["a", "a", "aé", "aé", "aé", "aé漢", "aé漢", "aé漢", "aé漢", "aé漢🎉", "aé漢🎉z"]


def test_stream_ends_with_a_replacement_for_half_a_character(tokenizer: ByteTokenizer) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode_corpus("ab🎉".encode()[:-1]).tolist())) == "ab\ufffd"


def test_stream_of_characters() -> None:
    tokenizer = CharTokenizer.from_text("né漢🎉 ")
    assert stream(tokenizer, tokenizer("né漢🎉 ", add_special_tokens=False).input_ids) == list("né漢🎉 ")


def write_all(model, tokenizer, prompts: list[list[int]], **settings) -> tuple[list[Continuation], list[str]]:
    notices: list[str] = []
    arguments = GenerationArguments(**{"temperature": 0.0, **settings})
    return write_on(model, tokenizer, prompts, arguments, notices.append), notices


def write(model, tokenizer, prompt_ids: list[int], **settings) -> tuple[list[list[int]], list[str]]:
    results, notices = write_all(model, tokenizer, [prompt_ids], **settings)
    return [result.ids for result in results], notices


def test_within_the_context_it_is_plain_generate(model, tokenizer) -> None:
    prompt = tokenizer("abc").input_ids
    sequences, notices = write(model, tokenizer, prompt, max_new_tokens=20)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, use_cache=False)
    assert sequences == [expected[0, len(prompt) :].tolist()]
    assert notices == []


def test_text_goes_on_beyond_the_context(model, tokenizer) -> None:
    """Each window begins with <|bos|> and the last half context; checked against windows made by hand."""
    prompt = tokenizer("abc").input_ids
    (ids,), notices = write(model, tokenizer, prompt, max_new_tokens=100)
    assert len(ids) == 100 and notices == []
    expected, window = [], list(prompt)
    while len(expected) < 100:
        if len(window) >= CONTEXT:
            window = [1, *window[-(CONTEXT // 2 - 1) :]]
        with torch.no_grad():
            next_id = int(model(torch.tensor([window])).logits[0, -1].argmax())
        window.append(next_id)
        expected.append(next_id)
    assert ids == expected


def test_prompt_longer_than_the_context_says_what_was_done(model, tokenizer) -> None:
    prompt = tokenizer("x" * 50).input_ids
    (ids,), notices = write(model, tokenizer, prompt, max_new_tokens=5)
    assert notices == ["The prompt has 51 tokens and the context 32: only the last 15 tokens of the prompt are used."]
    assert ids == write(model, tokenizer, [1, *prompt[-15:]], max_new_tokens=5)[0][0]


def test_several_sequences_end_on_their_own(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(8, 40)))
    prompt = tokenizer("abc").input_ids
    sequences, _ = write(model, tokenizer, prompt, max_new_tokens=80, num_return_sequences=6, temperature=1.0)
    lengths = [len(ids) for ids in sequences]
    assert len(sequences) == 6 and len(set(lengths)) > 2
    assert not any(8 <= token_id < 40 for ids in sequences for token_id in ids), "the end is not part of the text"


def test_streaming_writes_the_same_text(model, tokenizer) -> None:
    prompt = tokenizer("abc").input_ids
    pieces: list[str] = []
    streamer = CharacterStreamer(tokenizer, pieces.append)
    arguments = GenerationArguments(max_new_tokens=90, temperature=0.0)
    (result,) = write_on(model, tokenizer, [prompt], arguments, print, streamer=streamer)
    streamer.finish()
    assert "".join(pieces) == tokenizer.decode(result.ids, skip_special_tokens=True) == result.text


def test_stop_strings_cut_at_the_character(tokenizer: ByteTokenizer) -> None:
    """Whatever the pieces, the text ends before the first stop string, and nothing of one is ever shown."""
    generator = random.Random(0)
    for trial in range(500):
        text = "".join(generator.choices("aabé漢", k=20))
        stop = ["".join(generator.choices("aabé漢", k=generator.randrange(1, 4))) for _ in range(trial % 3)]
        followed = IncrementalDetokenizer(tokenizer, stop)
        shown = ""
        for token_id in tokenizer.encode_corpus(text.encode()).tolist():
            shown += followed.add(token_id)
            assert not any(each in shown for each in stop)
        shown += followed.finish()
        places = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
        assert shown == followed.text == (text[: min(places)[1]] if places else text)
        assert followed.is_stopped == bool(places)


def test_stop_strings_end_each_text_on_its_own(model, tokenizer) -> None:
    """Each text is the one without stop strings, cut; also in a window after the first, and streamed."""
    prompts = [tokenizer(prompt).input_ids for prompt in ("abc", "x", "hello w")]
    settings = {"max_new_tokens": 60, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(0)
    plain, _ = write_all(model, tokenizer, prompts, **settings)
    stop = [plain[0].text[40:42], plain[1].text[3:5], "é漢"]
    assert all(stop)
    torch.manual_seed(0)
    stopped, _ = write_all(model, tokenizer, prompts, stop=stop, **settings)
    reasons = []
    for whole, cut in zip(plain, stopped, strict=True):
        places = [whole.text.find(each) for each in stop if each in whole.text]
        assert cut.text == (whole.text[: min(places)] if places else whole.text)
        assert cut.ids == whole.ids[: len(cut.ids)] and (places or cut.ids == whole.ids)
        reasons.append(cut.finish_reason)
        assert cut.finish_reason == ("stop" if places else whole.finish_reason)
    assert reasons.count("stop") >= 2

    (whole,), _ = write_all(model, tokenizer, [prompts[0]], max_new_tokens=60)
    pieces: list[str] = []
    stop = [whole.text[45:48]]
    streamer = CharacterStreamer(tokenizer, pieces.append, stop)
    arguments = GenerationArguments(max_new_tokens=60, temperature=0.0, stop=stop)
    (result,) = write_on(model, tokenizer, [prompts[0]], arguments, print, streamer=streamer)
    streamer.finish()
    assert "".join(pieces) == result.text == whole.text[: whole.text.find(stop[0])] and result.finish_reason == "stop"


def test_prompts_of_any_length_in_one_batch_get_the_texts_they_get_alone(model, tokenizer) -> None:
    prompts = [tokenizer("abcdefghijklmnopqrstuvwxyz"[:length]).input_ids for length in (1, 25, 7, 12)]
    together, _ = write_all(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, result in zip(prompts, together, strict=True):
        assert [result] == write_all(model, tokenizer, [prompt], max_new_tokens=6)[0]


def test_what_torch_cannot_draw_from_is_a_sentence(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokenizer("abc").input_ids
    with pytest.raises(ValueError, match=r"^No token can be drawn, because the probabilities are not numbers: [^\n]*$"):
        write(model, tokenizer, prompt, max_new_tokens=5, temperature=1e-45)

    def without_memory(**kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "generate", without_memory)
    with pytest.raises(ValueError, match=r"^There is not enough memory: lower batch_size"):
        write(model, tokenizer, prompt, max_new_tokens=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["--prompt", "a"], 1),
        (["--batch_file", "a", "--output", "b", "--batch_size", "1"], 1),
        (["--prompt", "a", "--num_return_sequences", "2"], 2),
        (["--batch_file", "a", "--output", "b"], 3),
        (["--batch_file", "a", "--output", "b", "--batch_size", "1", "--num_return_sequences", "3"], 3),
    ],
)
def test_compile_is_for_as_many_texts_as_are_written_at_once(
    argv: list[str], texts: int, model, tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("abc\nde\nf\n")
    step, sizes = CompiledDecoder.step, set()
    monkeypatch.setattr(program, "load_model", lambda *args, **kwargs: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(
        CompiledDecoder, "step", lambda self, ids, *rotary: (sizes.add(len(ids)), step(self, ids, *rotary))[1]
    )
    program.run(parse_arguments(["--compile", "--max_tokens", "3", *argv]))
    assert max(sizes) == texts


def test_what_was_compiled_once_is_used(
    model, tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    loaded: list[Any] = []
    monkeypatch.setattr(
        program, "load_model", lambda *args, **kwargs: (loaded.append(copy.deepcopy(model)), (loaded[-1], tokenizer))[1]
    )
    used = []
    for flags in ([], ["--compile"], [], ["--compile", "false"]):
        if flags == ["--compile"]:
            compile_library(NAME, SOURCE)  # a test before this one may have compiled it into another folder
        program.run(parse_arguments(["--prompt", "a", "--max_tokens", "3", *flags]))
        used.append(loaded[-1].compiled_step is not None)
    assert used == [False, True, True, False]
    capsys.readouterr()
    loaded[-1].bfloat16().compile_decoding(only_kept=True)
    assert loaded[-1].compiled_step is None and capsys.readouterr().err == ""


def test_beams(model, tokenizer) -> None:
    prompt = tokenizer("abc").input_ids
    results, _ = write_all(
        model, tokenizer, [prompt, prompt], max_new_tokens=20, num_beams=4, num_return_sequences=2, temperature=None
    )
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, num_beams=4, num_return_sequences=2, max_new_tokens=20,
        top_p=1.0, temperature=1.0,
    )[:, len(prompt) :].tolist()  # fmt: skip
    assert [result.ids for result in results] == [*expected, *expected]
    longer, _ = write_all(
        model, tokenizer, [prompt], max_new_tokens=70, num_beams=3, num_return_sequences=2, temperature=None
    )
    assert [len(result.ids) for result in longer] == [70, 70]


def test_least_number_of_tokens_counts_over_windows(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokenizer("abc").input_ids
    settings = {"max_new_tokens": 70, "temperature": 1.0}
    torch.manual_seed(0)
    (plain,), _ = write_all(model, tokenizer, [prompt], **settings)
    place = next(place for place in range(2, 40) if plain.ids.index(plain.ids[place]) == place)
    monkeypatch.setattr(model.generation_config, "eos_token_id", plain.ids[place])
    torch.manual_seed(0)
    (short,), _ = write_all(model, tokenizer, [prompt], **settings)
    assert short.ids == plain.ids[:place] and short.finish_reason == "end"
    (long,), _ = write_all(model, tokenizer, [prompt], min_new_tokens=50, **settings)
    assert len(long.ids) >= 50


def test_settings_of_the_model_hold_until_the_user_says_otherwise(model) -> None:
    config = generation_config(model, GenerationArguments())
    assert config.do_sample and config.temperature == 0.8 and config.top_p == 0.95
    config = generation_config(model, GenerationArguments(temperature=0.5, top_k=3))
    assert config.do_sample and config.temperature == 0.5 and config.top_k == 3 and config.top_p == 0.95
    assert not generation_config(model, GenerationArguments(temperature=0)).do_sample
    assert model.generation_config.temperature == 0.8, "the model's own are not changed"
    config = generation_config(model, GenerationArguments(num_beams=2))
    assert not config.do_sample and config.num_beams == 2, "beams search, they do not sample"
    config = generation_config(model, GenerationArguments(repetition_penalty=1.5, no_repeat_ngram_size=3))
    assert config.do_sample and config.temperature == 0.8, "these shape what the model does anyway"
    assert config.repetition_penalty == 1.5 and config.no_repeat_ngram_size == 3


@pytest.mark.parametrize("name", SAMPLING)
def test_each_sampling_setting_reaches_the_model(model, name: str) -> None:
    value = 3 if name == "top_k" else 0.25
    config = generation_config(model, GenerationArguments(**{name: value}))
    assert config.do_sample and getattr(config, name) == value
    config.validate(strict=True)
    generation_config(model, GenerationArguments(**{name: value, "temperature": 0})).validate(strict=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--top_p", "0"], "top_p must be in (0, 1]"),
        (["--top_k", "-1"], "top_k must be at least 0"),
        (["--max_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--num_return_sequences", "2", "--stream"], "num_return_sequences must be 1 with --stream"),
        (["--min_p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["--top_h", "0"], "top_h must be in (0, 1]"),
        (["--typical_p", "0"], "typical_p must be in (0, 1]"),
        (["--epsilon_cutoff", "1"], "epsilon_cutoff must be in [0, 1)"),
        (["--eta_cutoff", "-1"], "eta_cutoff must be in [0, 1)"),
        (["--repetition_penalty", "0"], "repetition_penalty must be above 0"),
        (["--no_repeat_ngram_size", "-1"], "no_repeat_ngram_size must be at least 0"),
        (["--num_beams", "0"], "num_beams must be at least 1"),
        (["--num_beams", "2", "--num_return_sequences", "3"], "num_return_sequences (3) must not exceed num_beams (2)"),
        (["--num_beams", "2", "--stream"], "num_beams goes with none of --stream"),
        (["--stop", ""], "stop must not hold an empty string"),
        (["--batch_file", "a.txt"], "batch_file and output belong together"),
        (["--compile", "--num_beams", "2"], "compile goes with neither --num_beams nor --assistant"),
        (["--compile", "--assistant", "a"], "compile goes with neither --num_beams nor --assistant"),
        (["--interactive", "--prompt", "a"], "interactive goes without --prompt"),
        (["--num_return_sequences", "2", "--temperature", "0"], "num_return_sequences must be 1 with --temperature 0"),
        (["--min_new_tokens", "9", "--max_tokens", "8"], "min_new_tokens (9) must not exceed max_new_tokens (8)"),
        (["--seed", "-1"], "seed must be from 0 to 4294967295, got -1"),
        (["--batch_file", "a", "--output", "b", "--prompt", "c"], "batch_file goes with none of --prompt"),
        (["--batch_file", "a", "--output", "b", "--assistant", "c"], "assistant drafts for one text at a time"),
        (["--dtype", "float8"], "dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        (["--load_in_8bit", "--load_in_4bit"], "Give load_in_8bit or load_in_4bit, not both"),
        (["--temprature", "1"], "did you mean 'temperature'?"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_settings(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_arguments(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


PROCESSORS = """
from transformers import LogitsProcessor

def only_x(input_ids, scores):
    scores = scores.clone()
    scores[:, :128] = scores[:, 129:] = float("-inf")  # "x" is 120 + 8
    return scores

class OnlyX(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return only_x(input_ids, scores)

number = 3
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These in a module of the current folder, which is found there and forgotten after the test."""
    (tmp_path / "rules_of_a_test.py").write_text(PROCESSORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("rules_of_a_test", None)


@pytest.mark.slow
@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("name", ["only_x", "OnlyX"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "loop"])
def test_a_rule_of_ones_own_decides_what_is_written(
    model: MiniForCausalLM, tokenizer: ByteTokenizer, name: str, fast: bool
) -> None:
    arguments = GenerationArguments(logits_processor=[f"rules_of_a_test:{name}"], max_new_tokens=2 * CONTEXT)
    (result,) = write_on(model, tokenizer, [tokenizer("ab").input_ids], arguments, lambda _: None, fast_decoding=fast)
    assert result.text == "x" * 2 * CONTEXT


@pytest.mark.parametrize(("name", "got"), [("builtins:print", "NoneType"), ("torch:kron", r"\(2, 528\)")])
def test_a_rule_that_returns_no_scores_is_one_sentence(name: str, got: str) -> None:
    (processor,) = own_processors(GenerationArguments(logits_processor=[name]))
    with pytest.raises(ValueError, match=rf"^logits_processor '{name}' must return scores \(1, 264\), got {got}\.$"):
        processor(torch.zeros(2, 2), torch.zeros(1, 264))


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("only_x", "must have the form package.module:NAME"),
        ("rules_of_a_test:only_y", "has no 'only_y', did you mean 'only_x'"),
        ("rules_of_a_test:number", r"must be a function of \(input_ids, scores\) or a LogitsProcessor, got 3"),
        (
            "os:getcwd",
            r"must be a function of \(input_ids, scores\) or a LogitsProcessor, got <built-in function getcwd>",
        ),
        ("decimal:Decimal", r"must be a function of .* got Decimal\('0'\)"),
        ("transformers:TopKLogitsWarper", "needs arguments: write a class of your own without"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_rule_that_is_none_is_one_sentence_before_a_model_is_loaded(
    name: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_model", lambda *arguments, **loading: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"^logits_processor.*{sentence}"):
        program.run(parse_arguments(["--prompt", "a", "--logits_processor", name]))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 10**9},
        {"num_beams": 10**9, "num_return_sequences": 10**8, "max_new_tokens": 1},
        {"num_return_sequences": 10**9},
    ],
)
def test_more_sequences_than_any_memory_holds_are_refused_at_once(
    settings: dict[str, int], model: MiniForCausalLM, tokenizer: ByteTokenizer
) -> None:
    reason = "^1,000,000,000 sequences at once need at least [0-9,]+ GiB of memory, and there are .* num_beams.$"
    with pytest.raises(ValueError, match=reason):
        write_on(model, tokenizer, [tokenizer("ab").input_ids], GenerationArguments(**settings), lambda _: None)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_only_what_is_hopeless_is_refused(
    name: str, model: MiniForCausalLM, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of the prompt, and two copies of the scores: with that much memory it is tried."""
    config, ids = model.config, tokenizer("ab").input_ids
    cache = len(ids) * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    needed = 3 * 4 * (cache + 2 * config.vocab_size)
    arguments = GenerationArguments(**{name: 3}, max_new_tokens=2)
    for there in (needed, needed - 1):
        monkeypatch.setattr(text_generation, "total_memory", lambda device, there=there: there)
        if there == needed:
            assert write_on(model, tokenizer, [ids], arguments, lambda _: None)
        else:
            with pytest.raises(ValueError, match="3 sequences at once need at least"):
                write_on(model, tokenizer, [ids], arguments, lambda _: None)
