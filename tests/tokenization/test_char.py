"""CharTokenizer: a vocabulary from data, unknown characters, and the raw path equal to the tokenizer itself."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from tokenization import SPECIAL_TOKENS, CharTokenizer, load_tokenizer
from transformers import AutoTokenizer

TEXT = "Hello wörld,\r\n\ttabs & nul \x00 — 漢字 🎉 e\u0301 \ufeff <|eos|> zz\x7f"


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer.from_text(TEXT)


def test_vocabulary_is_special_tokens_then_characters_in_code_point_order(tokenizer: CharTokenizer) -> None:
    expected = [*SPECIAL_TOKENS, *sorted(set(TEXT))]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == expected


def test_same_vocabulary_from_text_pieces_and_files(tokenizer: CharTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT[:20].encode())
    (tmp_path / "b.txt").write_bytes(TEXT[20:].encode())
    assert CharTokenizer.from_text(iter(TEXT)).get_vocab() == tokenizer.get_vocab()
    assert CharTokenizer.from_files([tmp_path / "a.txt", tmp_path / "b.txt"]).get_vocab() == tokenizer.get_vocab()


def test_round_trip(tokenizer: CharTokenizer) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True).input_ids
    assert len(ids) == len(TEXT)
    assert tokenizer.decode(ids) == TEXT


def test_raw_path_equals_the_tokenizer(tokenizer: CharTokenizer) -> None:
    generator = random.Random(0)
    texts = [TEXT, "", "<|pad|><|eos|>", "\r\n\r\n"]
    texts += ["".join(generator.choices(TEXT + "ÄQ☃", k=generator.randint(1, 50))) for _ in range(300)]
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = tokenizer.encode_corpus(text.encode())
        assert ids.tolist() == expected, text
        assert ids.dtype == np.uint16


def test_corpus_round_trip_and_byte_lengths(tokenizer: CharTokenizer) -> None:
    ids = tokenizer.encode_corpus(TEXT.encode())
    assert tokenizer.decode_corpus(ids) == TEXT.encode()
    assert tokenizer.decode_corpus(np.array([1, *ids[:5], 2])) == b"Hello"
    assert tokenizer.bytes_per_token()[ids].sum() == len(TEXT.encode())
    assert tokenizer.bytes_per_token()[:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_unknown_characters_become_unk_with_one_warning_that_lists_them(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = CharTokenizer.from_text("abc")
    with caplog.at_level(logging.WARNING):
        assert tokenizer("axbyx", add_special_tokens=False).input_ids == [8, 3, 9, 3, 3]
        tokenizer(["x", "yy"])
    assert [record.message for record in caplog.records] == [
        "Characters that are not in the vocabulary became <|unk|>: 'x' 'y'"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encode_corpus("azé".encode()).tolist() == [8, 3, 3]
    assert [record.message for record in caplog.records] == [
        "Characters that are not in the vocabulary became <|unk|>: 'z' 'é'"
    ]
    assert tokenizer.decode_corpus(np.array([8, 3])) == "a\ufffd".encode()


def test_a_warning_lists_fifty_characters_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    unknown = "".join(chr(0x4E00 + i) for i in range(53))
    with caplog.at_level(logging.WARNING):
        CharTokenizer.from_text("abc").encode_corpus(unknown.encode())
    (record,) = caplog.records
    assert record.message.endswith(f" {unknown[49]!r} and 3 more")
    assert unknown[50] not in record.message


def test_a_tokenizer_of_another_corpus_keeps_the_settings() -> None:
    first = CharTokenizer.from_text("abc", padding_side="right", truncation_side="left", model_max_length=7)
    second = first.train_new_from_iterator(iter([["de"], "f"]), new_special_tokens=["<|tool|>"])
    assert (second.padding_side, second.truncation_side, second.model_max_length) == ("right", "left", 7)
    assert second("fed", add_special_tokens=False).input_ids == [10, 9, 8]
    assert second.convert_tokens_to_ids("<|tool|>") == 11 and second.chat_template == first.chat_template


def test_known_text_warns_of_nothing(tokenizer: CharTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer(TEXT)
        tokenizer.encode_corpus(TEXT.encode())
    assert not caplog.records


def test_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xffc")
    with pytest.raises(ValueError, match=r"bad\.txt is not valid UTF-8"):
        CharTokenizer.from_files([tmp_path / "bad.txt"])
    replaced = CharTokenizer.from_files([tmp_path / "bad.txt"], errors="replace")
    assert "\ufffd" in replaced.get_vocab()
    assert replaced.encode_corpus(b"ab\xffc", errors="replace").tolist() == [8, 9, 11, 10]
    with pytest.raises(UnicodeDecodeError):
        replaced.encode_corpus(b"ab\xffc")


def test_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="The text is empty"):
        CharTokenizer.from_text("")
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800"):
        CharTokenizer.from_text("a\ud800")


def test_many_characters_need_a_wider_type() -> None:
    tokenizer = CharTokenizer.from_text("".join(chr(c) for c in range(0x10000, 0x10000 + 2**16)))
    ids = tokenizer.encode_corpus("\U0001ffff".encode())
    assert ids.dtype == np.uint32 and ids.tolist() == [2**16 + 7]
    just_fits = CharTokenizer.from_text("".join(chr(c) for c in range(0x10000, 0x10000 + 2**16 - 8)))
    assert len(just_fits) == 2**16 and just_fits.id_dtype == np.uint16


def test_saved_folder_loads_with_auto_tokenizer(tokenizer: CharTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert auto.decode(auto(TEXT).input_ids) == tokenizer.decode(tokenizer(TEXT).input_ids)
    assert auto.chat_template == tokenizer.chat_template
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is CharTokenizer
    assert loaded.encode_corpus(TEXT.encode()).tolist() == tokenizer.encode_corpus(TEXT.encode()).tolist()
