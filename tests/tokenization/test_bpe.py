"""BpeTokenizer: the ids of bytes and merges behind them, exact for any bytes, the raw path equal to the tokenizer."""

import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenization import (
    SPECIAL_TOKENS,
    BpeTokenizer,
    ByteTokenizer,
    encode_messages,
    joins_last_space,
    load_tokenizer,
    raw_encoding,
)
from tokenization import bpe as bpe_module
from tokenizers import Regex, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

CODE = Path(bpe_module.__file__).read_text(encoding="utf-8")
PROSE = "Die größte Straße führt über die Brücke. 日本語のテキスト、漢字。 Ça va? C'est l'été 🎉\u00a0: 12 345,67 €\r\n"
CORPUS = [CODE, PROSE * 20, "spam and eggs, spam and ham\n" * 50]


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.train(CORPUS, 600)


def ids_of(tokenizer: BpeTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_the_ids_of_bytes_stay_and_merges_follow(tokenizer: BpeTokenizer) -> None:
    ours, bytes_alone = tokenizer.get_vocab(), ByteTokenizer().get_vocab()
    assert len(tokenizer) == 600
    assert {token: i for token, i in ours.items() if i < 264} == bytes_alone
    assert tokenizer.convert_ids_to_tokens(264) == "ĠĠ"  # of indentation, which the corpus has most
    assert all(len(tokenizer.convert_ids_to_tokens(i)) > 1 for i in range(264, 600))
    assert tokenizer("spam").input_ids[0] == 1 and len(tokenizer(" spam").input_ids) == 2


def test_same_text_gives_the_same_merges_in_any_form_and_on_any_threads(
    tokenizer: BpeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = tokenizer.get_vocab()
    assert BpeTokenizer.train([text.encode() for text in CORPUS], 600).get_vocab() == vocab
    monkeypatch.setattr(bpe_module, "PART_SIZE", 100)
    assert BpeTokenizer.train(iter(CORPUS), 600).get_vocab() == vocab
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert BpeTokenizer.train(CORPUS, 600).get_vocab() == vocab


def test_more_merges_begin_with_the_same(tokenizer: BpeTokenizer) -> None:
    more = BpeTokenizer.train(CORPUS, 700)
    assert [more.convert_ids_to_tokens(i) for i in range(600)] == [
        tokenizer.convert_ids_to_tokens(i) for i in range(600)
    ]


def test_white_space_of_code_is_one_token_and_words_carry_their_space() -> None:
    tokenizer = BpeTokenizer.train(["def f(x):\n        return x\n\n\n" * 50], 281)
    assert [tokenizer.decode([i]) for i in ids_of(tokenizer, "):\n        return x")] == [
        "):",
        "\n       ",
        " return",
        " x",
    ]


def test_a_last_space_that_belongs_to_the_next_word() -> None:
    tokenizer = BpeTokenizer.train(["def f(x):\n        return x\n\n\n" * 50, "def a(x): return a\n" * 50], 282)
    assert joins_last_space(tokenizer, "def ") and joins_last_space(tokenizer, "    def ")
    assert not joins_last_space(tokenizer, "def") and not joins_last_space(tokenizer, "")
    assert not joins_last_space(tokenizer, "def f(x):\n")
    for of_bytes in (ByteTokenizer(), ByteTokenizer(add_bos_token=False)):
        assert not joins_last_space(of_bytes, "def ")


def test_sizes_that_cannot_be(tokenizer: BpeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 265 \(the 264 special .*, got 264"):
        BpeTokenizer.train(CORPUS, 264)
    with pytest.raises(ValueError, match=r"The text can fill a vocabulary of (\d+), .*; vocab_size is 50000") as error:
        BpeTokenizer.train(CORPUS, 50_000)
    most = int(re.search(r"vocabulary of (\d+)", str(error.value)).group(1))
    assert len(BpeTokenizer.train(CORPUS, most)) == most
    with pytest.raises(ValueError, match="can fill a vocabulary of 264"):
        BpeTokenizer.train([""], 300)
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800"):
        BpeTokenizer.train(["a\ud800"], 300)


def random_texts(count: int) -> list[str]:
    """Any characters, and those where pieces of text begin and end."""
    draw = random.Random(0)
    edges = " \n\t\r\x0b\x0c'abstv19.,_é日本🎉\x00\x1c\x7f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b\u017f"
    texts = [text[start : start + 300] for text in CORPUS for start in range(0, min(len(text), 6000), 150)]
    for _ in range(count):
        kind = draw.randrange(3)
        if kind == 0:
            texts.append("".join(draw.choices(edges, k=draw.randrange(24))))
        elif kind == 1:
            texts.append("".join(map(chr, draw.choices(range(128), k=draw.randrange(24)))))
        else:
            code_points = (draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]) for _ in range(9))
            texts.append(draw.choice([" ", "a", "", "\n"]).join(map(chr, code_points)))
    return texts


@pytest.mark.slow
def test_raw_path_equals_the_tokenizer(tokenizer: BpeTokenizer) -> None:
    lengths = tokenizer.bytes_per_token()
    for text in [*random_texts(1_500), "<|eos|> <|pad|><|user|>", ""]:
        ids = tokenizer.encode_corpus(text.encode())
        assert ids.tolist() == ids_of(tokenizer, text), repr(text)
        assert tokenizer.decode_corpus(ids) == text.encode() and tokenizer.decode(ids.tolist()) == text
        assert ids.dtype == np.uint16 and not set(ids.tolist()) & set(range(8))
        assert lengths[ids].sum() == len(text.encode())


def test_wide_white_space_is_what_the_library_takes_for_it() -> None:
    """The raw path cuts text before white space, and has to know all that the library joins with it."""
    split = pre_tokenizers.Split(Regex(r"\s"), behavior="removed", invert=True)
    spaces = [piece for piece, _ in split.pre_tokenize_str("".join(map(chr, range(128, 0xD800))))]
    assert len(spaces) == 19
    for space in spaces:
        assert not raw_encoding.CUT.search(f"a{space} b".encode()), hex(ord(space))
    for character in "é日。、\u200b\u2018\u2060ÿ\U000e0020":
        assert raw_encoding.CUT.search(f"a{character} b".encode()), hex(ord(character))


def test_any_bytes_come_back(tokenizer: BpeTokenizer) -> None:
    draw = random.Random(1)
    whole = "é漢🎉 straße".encode()
    samples = [whole[start:stop] for start in range(len(whole)) for stop in range(start, len(whole) + 1)]
    samples += [bytes(draw.choices(range(256), k=draw.randrange(30))) for _ in range(500)]
    samples += [bytes(draw.choices(b"spam \n\xc3\xa9\xff\xe2\x82\xe3", k=20)) for _ in range(500)]
    samples += [b"a\xed\xa0\x80b", b"caf\xe9 au lait", "spam".encode("utf-16")]
    for data in samples:
        ids = tokenizer.encode_corpus(data)
        assert tokenizer.decode_corpus(ids) == data
        assert tokenizer.decode(ids.tolist()) == data.decode("utf-8", "replace"), data


def test_bytes_that_are_no_text_are_neither_lost_nor_merged() -> None:
    latin = "spät, später, am spätesten. ".encode("latin-1") * 40
    tokenizer = BpeTokenizer.train([latin, b"\xff\xfe" * 100], 270)
    assert "Ġsp" in tokenizer.get_vocab()  # of the text beside them
    ids = tokenizer.encode_corpus(latin)
    assert tokenizer.decode_corpus(ids) == latin and (ids == 0xE4 + 8).sum() == 120
    assert tokenizer.encode_corpus(b"\xff\xfe").tolist() == [0xFF + 8, 0xFE + 8]


def test_pieces_that_were_seen_are_forgotten_when_there_are_too_many(
    tokenizer: BpeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    monkeypatch.setattr(raw_encoding, "KEPT_PIECES", 7)
    for text in CORPUS:
        assert copy.encode_corpus(text.encode()).tolist() == tokenizer.encode_corpus(text.encode()).tolist()
    assert 0 < len(copy.raw_encoder.known) <= 7
    copy.encode_corpus(b"x" * 1_000)
    assert not any(len(piece) > raw_encoding.KEPT_PIECE_SIZE for piece in copy.raw_encoder.known)


def test_streaming_never_shows_half_a_character(tokenizer: BpeTokenizer) -> None:
    text = PROSE
    stream, shown = DecodeStream(skip_special_tokens=True), ""
    for token_id in ids_of(tokenizer, text):
        shown += stream.step(tokenizer.backend_tokenizer, token_id) or ""
        assert text.startswith(shown)
    assert shown == text


def test_chat_template_and_marks_of_the_assistant(tokenizer: BpeTokenizer) -> None:
    messages = [{"role": "user", "content": "spam<|end|>?"}, {"role": "assistant", "content": " eggs\n"}]
    ids, said = encode_messages(tokenizer, messages)
    assert tokenizer.decode(ids) == "<|bos|><|user|>spam<|end|>?<|end|><|assistant|> eggs\n<|end|>"
    assert [i for i in ids if i < 8] == [1, 5, 7, 6, 7]
    assert tokenizer.decode([i for i, is_learned in zip(ids, said, strict=True) if is_learned]) == " eggs\n<|end|>"


def test_saved_folder_loads_with_auto_tokenizer(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    auto, loaded = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert type(loaded) is BpeTokenizer and not isinstance(auto, BpeTokenizer)
    assert loaded.get_vocab() == auto.get_vocab() == tokenizer.get_vocab()
    assert set(SPECIAL_TOKENS) == set(loaded.all_special_tokens)
    for text in (*CORPUS, "<|eos|>"):
        assert auto(text).input_ids == loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.encode_corpus(text.encode()).tolist() == tokenizer.encode_corpus(text.encode()).tolist()
    assert auto.chat_template == tokenizer.chat_template and auto.padding_side == "left"


@pytest.mark.slow
def test_a_wide_vocabulary_has_wide_ids() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=14)) for _ in range(15_000)]
    tokenizer = BpeTokenizer.train([" ".join(words * 2)], 2**16 + 1)
    text = f" {words[0]} {words[-1]}".encode()
    ids = tokenizer.encode_corpus(text)
    assert ids.dtype == np.uint32 and tokenizer.decode_corpus(ids) == text
