"""ByteTokenizer: frozen ids, exact decoding, and the raw path of corpora equal to the tokenizer itself."""

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import fork_server
from tokenization import SPECIAL_TOKENS, ByteTokenizer, MiniTokenizer, load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ADVERSARIAL_TEXTS = [
    "",
    "plain ascii",
    "<|eos|> and <|pad|><|user|> look special",
    "<|eos|",
    "nul \x00 bell \x07 escape \x1b delete \x7f",
    "windows\r\nlines\r\n and old mac\r",
    "\ufeffbyte order mark",
    "e\u0301 combining, \u00e9 precomposed, Z\u0351\u036b\u0343",
    "astral \U0001f389 \U0001f468\u200d\U0001f469\u200d\U0001f467 plane",
    "  leading and trailing  spaces \t\n\n",
    "don't we'll I'M 12,345.67 __init__",
    "\u00a0\u2003\u3000 odd spaces \u2028 separators \u2029",
    "日本語のテキスト 한국어 العربية हिन्दी",
]


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def test_ids_are_frozen(tokenizer: ByteTokenizer) -> None:
    assert len(tokenizer) == 264
    assert tokenizer.convert_ids_to_tokens(list(range(8))) == [
        "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip
    for byte in range(256):
        assert tokenizer.decode_corpus(np.array([byte + 8])) == bytes([byte])
        assert tokenizer.decode([byte + 8]) == bytes([byte]).decode("utf-8", "replace")


def test_prompt_begins_with_bos_and_has_no_eos(tokenizer: ByteTokenizer) -> None:
    assert tokenizer("hé").input_ids == [1, 112, 203, 177]


def test_decoding_equals_python_for_any_bytes(tokenizer: ByteTokenizer) -> None:
    generator = random.Random(0)
    samples = [bytes(generator.choices(range(256), k=generator.randint(0, 24))) for _ in range(3000)]
    # Cut in the middle of characters, where replacement is subtle.
    whole = "é漢🎉".encode()
    samples += [whole[start:stop] for start in range(len(whole)) for stop in range(start, len(whole) + 1)]
    samples += [b"\xf0\x9f\x8e", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"a\xffb\xfe"]
    for data in samples:
        assert tokenizer.decode([byte + 8 for byte in data]) == data.decode("utf-8", errors="replace"), data


@pytest.mark.parametrize("text", ADVERSARIAL_TEXTS)
def test_raw_path_equals_the_tokenizer(tokenizer: ByteTokenizer, text: str) -> None:
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = tokenizer.encode_corpus(text.encode())
    assert ids.tolist() == expected
    assert ids.dtype == np.uint16
    assert tokenizer.decode_corpus(ids) == text.encode()
    assert not set(ids.tolist()) & set(range(8)), "text became a special token"


def test_raw_path_equals_the_tokenizer_on_random_text(tokenizer: ByteTokenizer) -> None:
    generator = random.Random(1)
    for _ in range(300):
        code_points = (generator.choice([generator.randrange(128), generator.randrange(0x110000)]) for _ in range(40))
        text = "".join(chr(c) for c in code_points if not 0xD800 <= c <= 0xDFFF)
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.encode_corpus(text.encode()).tolist() == expected


def test_ids_that_are_no_bytes_have_no_text(tokenizer: ByteTokenizer) -> None:
    # 264 and above are tokens that somebody added.
    assert tokenizer.decode_corpus(np.array([1, 112, 264, 113, 300, 2])) == b"hi"


def test_prefix_space_on_request() -> None:
    tokenizer = ByteTokenizer(add_prefix_space=True)
    assert tokenizer("a").input_ids == tokenizer(" a").input_ids == [1, 40, 105]


def test_invalid_utf8_survives_the_raw_path(tokenizer: ByteTokenizer) -> None:
    data = bytes(range(256)) * 3
    assert tokenizer.decode_corpus(tokenizer.encode_corpus(data)) == data


def test_special_tokens_in_a_prompt_are_special_unless_split(tokenizer: ByteTokenizer) -> None:
    assert tokenizer("<|eos|>", add_special_tokens=False).input_ids == [2]
    assert len(tokenizer("<|eos|>", add_special_tokens=False, split_special_tokens=True).input_ids) == 7


def test_bytes_per_token(tokenizer: ByteTokenizer) -> None:
    lengths = tokenizer.bytes_per_token()
    assert lengths[:8].sum() == 0 and lengths[8:].tolist() == [1] * 256


def test_chat_template(tokenizer: ByteTokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|>"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(spoken) == "Hello<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|end|><|assistant|>")
    with pytest.raises(Exception, match="role of a message must be system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


def test_padding_is_on_the_left(tokenizer: ByteTokenizer) -> None:
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch.input_ids[0] == [0, 0, 1, 105] and batch.attention_mask[0] == [0, 0, 1, 1]


def test_saved_folder_loads_without_this_repository(tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "".join(ADVERSARIAL_TEXTS)
    (tmp_path / "text.txt").write_bytes(text.encode())
    program = """
import importlib.util, sys
assert importlib.util.find_spec("tokenization") is None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("saved")
text = open("text.txt", newline="", encoding="utf-8").read()
print(tokenizer(text).input_ids, tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
"""
    result = subprocess.run(
        [fork_server.python(), "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert result.stdout.strip() == f"{tokenizer(text).input_ids} {chat}"
    assert "warn" not in result.stderr.lower()


def test_load_tokenizer_finds_the_class_again(tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert set(SPECIAL_TOKENS) == set(loaded.all_special_tokens)


def test_nobody_is_asked_about_code_beside_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    config = {"model_type": "own_kind", "auto_map": {"AutoConfig": "code.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", questions.append)
    assert type(load_tokenizer(tmp_path)) is ByteTokenizer and questions == []


def test_load_tokenizer_leaves_others_as_they_are(tmp_path: Path) -> None:
    """One with Mini's special tokens and words behind them reads by words, not by characters."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, "ab", "c"))}
    words = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS[3]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=SPECIAL_TOKENS[3]).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not isinstance(loaded, MiniTokenizer)
    assert loaded("ab c a").input_ids == [8, 9, 3]
