"""Continuing text: streaming that is exact, windows beyond the context, and settings."""

import random

import pytest
import torch
from generation_mini.arguments import GenerationArguments, parse_arguments
from generation_mini.writing import CharacterStreamer, generation_config, write_on
from modeling_mini import MiniConfig, MiniForCausalLM
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


def write(model, tokenizer, prompt_ids: list[int], **settings) -> tuple[list[list[int]], list[str]]:
    notices: list[str] = []
    arguments = GenerationArguments(**{"temperature": 0.0, **settings})
    return write_on(model, tokenizer, prompt_ids, arguments, notices.append), notices


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
    (ids,) = write_on(model, tokenizer, prompt, arguments, print, streamer)
    streamer.finish()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_settings_of_the_model_hold_until_the_user_says_otherwise(model) -> None:
    config = generation_config(model, GenerationArguments())
    assert config.do_sample and config.temperature == 0.8 and config.top_p == 0.95
    config = generation_config(model, GenerationArguments(temperature=0.5, top_k=3))
    assert config.do_sample and config.temperature == 0.5 and config.top_k == 3 and config.top_p == 0.95
    assert not generation_config(model, GenerationArguments(temperature=0)).do_sample
    assert model.generation_config.temperature == 0.8, "the model's own are not changed"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "-1"], "temperature must not be negative"),
        (["--top_p", "0"], "top_p must be in (0, 1]"),
        (["--top_k", "-1"], "top_k must not be negative"),
        (["--max_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--num_return_sequences", "2", "--stream"], "num_return_sequences must be 1 with --stream"),
        (["--temprature", "1"], "did you mean 'temperature'?"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_settings(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_arguments(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
