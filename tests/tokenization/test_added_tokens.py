"""Tokens that somebody added, on each of the tokenizers: ids, text and bytes stay right, also when saved and loaded."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenization import BpeTokenizer, ByteTokenizer, CharTokenizer, MiniTokenizer, load_tokenizer
from transformers import AddedToken, AutoTokenizer

TEXT = "the fox\né €<|eos|> 日本 日 São Paulo, q<tool>\u3000€€ the €the"
ADDED = ["€", "日本", "São Paulo", "q", " the"]
KINDS: dict[str, Callable[[], MiniTokenizer]] = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer.from_text(TEXT.replace("€", "").replace("本", "")),
    "bpe": lambda: BpeTokenizer.train([TEXT, "the fox the fox"], 270),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> MiniTokenizer:
    return KINDS[request.param]()


@pytest.fixture
def extended(tokenizer: MiniTokenizer) -> MiniTokenizer:
    """With the tokens of `ADDED` and a special one."""
    tokenizer.encode_corpus(b"the ")  # what is remembered of this must not outlive the tokens that come
    tokenizer.add_tokens(ADDED)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    return tokenizer


def ids_of(tokenizer: MiniTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_raw_path_finds_added_tokens_as_the_tokenizer_does(extended: MiniTokenizer) -> None:
    added = {token: extended.convert_tokens_to_ids(token) for token in ADDED}
    for text in (TEXT, "", "€", "no such", "日日本本", "<|eos|><tool>€", "thethe the"):
        ids = extended.encode_corpus(text.encode())
        assert ids.tolist() == ids_of(extended, text)
        assert ids.dtype == np.uint16
        for token in ("€", "日本", "São Paulo"):
            assert (ids == added[token]).sum() == text.count(token)
        assert not set(ids.tolist()) & {0, 1, 2, 4, 5, 6, 7, extended.convert_tokens_to_ids("<tool>")}


def test_bytes_of_added_tokens_are_those_of_their_text(extended: MiniTokenizer) -> None:
    lengths = extended.bytes_per_token()
    assert lengths.shape == (len(extended),)
    for token in ADDED:
        assert lengths[extended.convert_tokens_to_ids(token)] == len(token.encode())
    assert lengths[extended.convert_tokens_to_ids("<tool>")] == 0
    ids = extended.encode_corpus(TEXT.encode())
    if not isinstance(extended, CharTokenizer):
        assert lengths[ids].sum() == len(TEXT.encode())
        assert extended.decode_corpus(ids) == TEXT.encode()
        assert extended.decode(ids.tolist()) == TEXT


def test_a_saved_tokenizer_is_known_again_with_its_tokens(extended: MiniTokenizer, tmp_path: Path) -> None:
    extended.save_pretrained(tmp_path)
    auto, loaded = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert type(loaded) is type(extended) and len(loaded) == len(extended)
    assert loaded.get_vocab() == auto.get_vocab() == extended.get_vocab()
    for text in (TEXT, "<tool>", "€"):
        assert loaded(text).input_ids == auto(text).input_ids == extended(text).input_ids
        assert loaded.encode_corpus(text.encode()).tolist() == extended.encode_corpus(text.encode()).tolist()
    assert loaded.bytes_per_token().tolist() == extended.bytes_per_token().tolist()
    assert load_tokenizer(tmp_path).get_vocab() == loaded.get_vocab()


def test_one_added_token_does_not_make_bytes_characters(tmp_path: Path) -> None:
    """Every token of this one is a single character, which once made it a character tokenizer that lost all spaces."""
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["€"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is ByteTokenizer
    text = "the fox\né €"
    assert loaded.decode_corpus(loaded.encode_corpus(text.encode())) == text.encode()
    assert loaded.encode_corpus(text.encode())[-1] == 264


def test_tokens_that_take_white_space_along(extended: MiniTokenizer) -> None:
    extended.add_tokens([AddedToken("fox", lstrip=True, rstrip=True), AddedToken("日", single_word=True)])
    for text in (TEXT, "the fox  fox", "日 a日b"):
        assert extended.encode_corpus(text.encode()).tolist() == ids_of(extended, text)


def test_invalid_bytes_beside_added_tokens_stay(tmp_path: Path) -> None:
    for name in ("byte", "bpe"):
        tokenizer = KINDS[name]()
        tokenizer.add_tokens(["€"])
        data = b"\xe2\x82 caf\xe9 \xe2\x82\xac\xff the"
        ids = tokenizer.encode_corpus(data)
        assert tokenizer.decode_corpus(ids) == data and (ids == len(tokenizer) - 1).sum() == 1


def test_no_space_comes_into_a_corpus(tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(add_prefix_space=True), BpeTokenizer.train([TEXT], 266, add_prefix_space=True)):
        assert tokenizer("the").input_ids == tokenizer(" the").input_ids
        tokenizer.add_tokens(["€"])
        tokenizer.save_pretrained(tmp_path)
        for text in ("the fox", "a€b"):
            for one in (tokenizer, load_tokenizer(tmp_path)):
                assert type(one) is type(tokenizer)
                assert one.decode_corpus(one.encode_corpus(text.encode())) == text.encode()


@pytest.mark.parametrize("token", ["é", "café", "ÿ", "Ġthe"])
def test_tokens_that_would_be_decoded_as_bytes_are_refused(token: str) -> None:
    for name in ("byte", "bpe"):
        tokenizer = KINDS[name]()
        for tokens in ([token], token, [AddedToken(token)]):
            with pytest.raises(ValueError, match=f"The token '{token}' cannot be added: a byte-level tokenizer"):
                tokenizer.add_tokens(tokens)
        assert token not in tokenizer.get_added_vocab()
    characters = KINDS["char"]()
    characters.add_tokens([token])
    assert characters.decode(ids_of(characters, f" {token},")) == f" {token},"


def test_a_folder_with_such_a_token_still_loads(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.backend_tokenizer.add_tokens(["café"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is ByteTokenizer
    ids = loaded.encode_corpus("un café".encode())
    assert ids[-1] == 264 and loaded.decode_corpus(ids) == "un café".encode()


def test_copies_carry_the_tokens_and_nothing_that_can_be_computed(extended: MiniTokenizer) -> None:
    before = len(pickle.dumps(extended))
    ids = extended.encode_corpus((TEXT * 100).encode())
    assert len(pickle.dumps(extended)) == before
    for copied in (copy.deepcopy(extended), pickle.loads(pickle.dumps(extended))):
        assert copied.encode_corpus((TEXT * 100).encode()).tolist() == ids.tolist()


def test_characters_of_added_tokens_are_not_unknown(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = CharTokenizer.from_text("abc")
    tokenizer.add_tokens(["日本"])
    with caplog.at_level(logging.WARNING):
        tokenizer("a日本b")
        assert not caplog.records
        assert tokenizer.encode_corpus("a日本x".encode()).tolist() == [8, 11, 3]
    assert [record.message for record in caplog.records] == [
        "Characters that are not in the vocabulary became <|unk|>: 'x'"
    ]


def test_a_tokenizer_without_bos_stays_without(tokenizer: MiniTokenizer, tmp_path: Path) -> None:
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("the").input_ids == tokenizer("the").input_ids == ids_of(tokenizer, "the")


@pytest.mark.parametrize("names", [{}, {"<|bos|>": "<s>", "<|eos|>": "</s>"}])
def test_a_tokenizer_with_bos_and_eos_keeps_them(
    tokenizer: MiniTokenizer, names: dict[str, str], tmp_path: Path
) -> None:
    tokenizer.add_eos_token = True
    trained = tokenizer.train_new_from_iterator(["the fox the fox"], 270, special_tokens_map=names)
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(trained)
    assert trained("the").input_ids == [trained.bos_token_id, *ids_of(trained, "the"), trained.eos_token_id]
    assert loaded("the").input_ids == trained("the").input_ids


@pytest.mark.parametrize("size", [100, 300])
def test_training_on_another_corpus_gives_a_tokenizer_that_stays_the_same_when_saved(
    tokenizer: MiniTokenizer, size: int, tmp_path: Path
) -> None:
    tokenizer.padding_side, tokenizer.model_max_length = "right", 77
    source = Path(__file__).read_text(encoding="utf-8")
    trained = tokenizer.train_new_from_iterator(
        iter([[source, "the cat"], source]), size, new_special_tokens=["<tool>"]
    )
    trained.save_pretrained(tmp_path)
    auto, loaded = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert len(trained) == len(auto) == len(loaded)
    assert trained.get_vocab() == auto.get_vocab() == loaded.get_vocab()
    assert (trained.padding_side, trained.model_max_length) == ("right", 77)
    assert trained.chat_template == tokenizer.chat_template
    text = "the cat on the dog<tool>"
    assert trained(text).input_ids == auto(text).input_ids == loaded(text).input_ids
    assert trained(text).input_ids[-1] == trained.convert_tokens_to_ids("<tool>") == len(trained) - 1
    if not isinstance(tokenizer, CharTokenizer):
        assert type(trained) is BpeTokenizer
        assert trained.vocab_size == (264 if size == 100 else 300)
        assert (len(trained("the tokens").input_ids) < 11) == (size == 300)
