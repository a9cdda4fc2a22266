"""Learned merges, encoding in several processes, and what each token stands for in bytes."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenization import BpeTokenizer, ByteTokenizer, CharTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_mini.arguments import DataArguments
from training_mini.data import encoding, formats
from training_mini.data.corpus import Corpus, load_corpus
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

WORDS = "def return self value € größe 日本語 None \n    \n\n import numbers 1234 == (x) [i]: 'don't'".split(" ")


def text_of_words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture
def load(tmp_path: Path):
    def load(dataset: object, cache: str = "cache", **settings: object) -> Corpus:
        return load_corpus(DataArguments(dataset=str(dataset), cache_dir=str(tmp_path / cache), **settings))

    return load


def all_ids(corpus: Corpus) -> list[int]:
    return [*corpus.train[:].tolist(), *corpus.validation.tolist()]


def test_corpus_of_learned_merges(load, tmp_path: Path) -> None:
    text = text_of_words(0, 3_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    corpus = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=300)
    assert type(corpus.tokenizer) is BpeTokenizer and len(corpus.tokenizer) == 300
    ids = corpus.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert all_ids(corpus) == [*ids, 2]
    assert corpus.text_of(corpus.train[:]) + corpus.text_of(corpus.validation) == text.encode()
    for part in (corpus.train[:], corpus.validation):
        assert corpus.bytes_per_token[part].sum() == len(corpus.text_of(part))
    # The last tenth of the bytes is held out, to the token.
    share = len(text.encode()) * 0.1
    assert share - 12 < len(corpus.text_of(corpus.validation)) <= share


def test_merges_do_not_depend_on_what_is_held_out(load, tmp_path: Path) -> None:
    """Of one document its end, and of many whole ones."""
    text = text_of_words(0, 3_000).encode()
    learned = []
    for number, end in enumerate((b" qq" * 300, b" jj" * 300)):
        (tmp_path / f"{number}.txt").write_bytes(text + end)
        corpus = load(tmp_path / f"{number}.txt", tokenizer="bpe", vocab_size=300)
        assert end[:6] not in corpus.text_of(corpus.train[:])
        learned.append(corpus.tokenizer.get_vocab())
    assert learned[0] == learned[1]
    learned.clear()
    for held_out in ("q", "j"):
        folder = tmp_path / held_out
        folder.mkdir()
        for number in range(20):
            # Of documents of equal length, the fifth and the fifteenth are held out.
            words = held_out * 400 if number % 10 == 4 else text_of_words(number, 200)
            (folder / f"{number:02}.txt").write_bytes(words.encode()[:400])
        corpus = load(folder, tokenizer="bpe", vocab_size=300)
        assert held_out.encode() * 400 in corpus.text_of(corpus.validation)
        learned.append(corpus.tokenizer.get_vocab())
    assert learned[0] == learned[1]


def test_merges_are_learned_once_and_kept_with_the_corpus(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(text_of_words(0, 2_000), encoding="utf-8")
    one = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=290)
    other = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=300)
    assert one.settings["tokenizer"] != other.settings["tokenizer"]
    monkeypatch.setattr(BpeTokenizer, "train", None)
    again = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=300)
    assert again.settings == other.settings and all_ids(again) == all_ids(other)
    assert len(list((tmp_path / "cache" / "corpora").glob("*/corpus.json"))) == 2


def test_text_that_is_not_utf8_is_kept_and_noted(load, tmp_path: Path) -> None:
    data = ("größe und straße " * 300).encode("latin-1")
    (tmp_path / "a.txt").write_bytes(data)
    corpus = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=270)
    assert corpus.text_of(corpus.train[:]) + corpus.text_of(corpus.validation) == data
    assert any("Not UTF-8, and learned byte by byte as it is" in note for note in corpus.notes)


def test_vocabularies_that_cannot_be(load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabc abc " * 20)
    with pytest.raises(ValueError, match=r"can fill a vocabulary of 26\d, .* vocab_size is 2048"):
        load(tmp_path / "a.txt", tokenizer="bpe")
    with pytest.raises(ValueError, match="vocab_size must be at least 265, got 264"):
        load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=264)
    for tokenizer in (None, "byte", "char", "gpt2"):
        with pytest.raises(
            ValueError, match=r"vocab_size is the size that --tokenizer bpe learns: .* --vocab_size 300"
        ):
            load(tmp_path / "a.txt", tokenizer=tokenizer, vocab_size=300)
    with pytest.raises(ValueError, match="--tokenizer bpe needs to read the whole text first, so it cannot go with"):
        load(tmp_path / "a.txt", tokenizer="bpe", streaming=True)
    (tmp_path / "empty.txt").write_bytes(b"\n")
    with pytest.raises(ValueError, match="can fill a vocabulary of 264"):
        load(tmp_path / "empty.txt", tokenizer="bpe")
    corpus = load(tmp_path / "a.txt")
    (encoded,) = (tmp_path / "cache" / "corpora").glob("*/corpus.json")
    with pytest.raises(ValueError, match="is encoded and has a tokenizer of its own: leave out --tokenizer"):
        load(encoded.parent, tokenizer="bpe")
    assert all_ids(load(encoded.parent)) == all_ids(corpus)


def test_a_tokenizer_in_python_is_refused_in_a_sentence(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a program in Python \(ByT5Tokenizer\): Mini needs one that has"):
        encoding.make_tokenizer(DataArguments(tokenizer=str(tmp_path)))


def test_a_sample_is_bounded_and_lies_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "LEARNED_BYTES", 1_000)
    monkeypatch.setattr(encoding, "SAMPLED_BYTES", 10)
    pieces = [bytes([number % 256]) * 95 for number in range(100)]
    taken = b"".join(encoding.sampled(pieces, 9_500))
    assert 950 <= len(taken) <= 1_000
    assert len(set(taken)) > 70
    assert b"".join(encoding.sampled(pieces[:10], 950)) == b"".join(pieces[:10])


def foreign_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level, with merges, a special token outside of its vocabulary and tokens that were added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("d", "e"), ("Ġ", "r"), ("Ã", "¶")]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>")
    tokenizer.add_tokens(["日本", "€"])
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_tokenizer_with_a_token(folder: Path) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["日本", "€"])
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def several_processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Encoding in three processes, with small batches; gives their ids."""
    started = []

    class Recorded(encoding.EncoderProcess):
        def __init__(self, encoder: encoding.RawEncoder) -> None:
            super().__init__(encoder)
            started.append(self._process.pid)

    monkeypatch.setattr(encoding, "EncoderProcess", Recorded)
    monkeypatch.setattr(encoding, "number_of_processors", lambda: 3)
    monkeypatch.setattr(encoding, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 700)
    return started


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", foreign_tokenizer, byte_tokenizer_with_a_token])
def test_several_processes_give_the_ids_of_one(
    kind: object, load, tmp_path: Path, several_processes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(text_of_words(number, 20 + 40 * (number % 5)), encoding="utf-8")
    if kind == "bpe":
        settings = {"tokenizer": "bpe", "vocab_size": 290}
    else:
        kind(tmp_path / "tokenizer")
        settings = {"tokenizer": str(tmp_path / "tokenizer")}
    parallel = load(folder, **settings)
    assert len(several_processes) == 3 and not any(map(is_running, several_processes))
    monkeypatch.setattr(encoding, "number_of_processors", lambda: 1)
    alone = load(folder, "other-cache", **settings)
    assert len(several_processes) == 3
    assert all_ids(alone) == all_ids(parallel)
    assert alone.train.dtype == parallel.train.dtype
    assert (alone.train[:] == alone.tokenizer.eos_token_id).sum() > 20


def test_bytes_need_no_processes(load, tmp_path: Path, several_processes: list[int]) -> None:
    (tmp_path / "a.txt").write_text(text_of_words(0, 3_000), encoding="utf-8")
    for name in ("byte", "char"):
        load(tmp_path / "a.txt", tokenizer=name)
    assert not several_processes


def test_processes_end_with_the_run_that_an_error_ends(load, tmp_path: Path, several_processes: list[int]) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(text_of_words(number, 100), encoding="utf-8")
    (folder / "20.txt").write_bytes(b"caf\xe9")
    foreign_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"20\.txt is not valid UTF-8 at byte 3"):
        load(folder, tokenizer=str(tmp_path / "tokenizer"))
    assert len(several_processes) == 3 and not any(map(is_running, several_processes))


def test_a_process_that_is_ended_is_said_in_a_sentence(
    load, tmp_path: Path, several_processes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(text_of_words(0, 3_000), encoding="utf-8")
    send = encoding.EncoderProcess.encode
    monkeypatch.setattr(
        encoding.EncoderProcess, "encode", lambda self, texts: (os.kill(self._process.pid, 9), send(self, texts))[1]
    )
    with pytest.raises(ValueError, match=r"A process that encodes text was ended from outside \(exit code -9\)"):
        load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=290)
    assert not list((tmp_path / "cache" / "corpora").glob("*/corpus.json"))


def test_pieces_of_any_size_have_the_same_ids(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of_words(0, 2_000) + " " + "x" * 3_000 + "\n" + text_of_words(1, 500)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    whole = load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=290)
    monkeypatch.setattr(formats, "PIECE_SIZE", 1_001)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 500)
    cut = load(tmp_path / "a.txt", "other-cache", tokenizer="bpe", vocab_size=290)
    assert all_ids(cut) == all_ids(whole)
    monkeypatch.setattr(encoding, "PIECE_SIZE", 100)
    chunks = list(encoding.cut_between_words(text.encode()[i : i + 90] for i in range(0, len(text.encode()), 90)))
    assert b"".join(chunks) == text.encode() and max(map(len, chunks)) < 1_000


def test_added_tokens_survive_training_from_their_folder(load, tmp_path: Path) -> None:
    """The folder was once taken for a tokenizer of characters, and all white space was lost."""
    text = "the fox\né € 日本 日 " * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    for make in (byte_tokenizer_with_a_token, foreign_tokenizer):
        tokenizer = make(tmp_path / make.__name__)
        corpus = load(tmp_path / "a.txt", tokenizer=str(tmp_path / make.__name__))
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert all_ids(corpus) == [*expected, tokenizer.eos_token_id]
        assert corpus.text_of(corpus.train[:]) + corpus.text_of(corpus.validation) == text.encode()
        lengths = corpus.bytes_per_token
        assert lengths[np.array(expected)].sum() == len(text.encode())
        assert lengths[tokenizer.convert_tokens_to_ids("日本")] == 6
        assert lengths[tokenizer.eos_token_id] == 0
    assert lengths[tokenizer.convert_tokens_to_ids("<tool>")] == 0


def test_bytes_of_added_tokens_of_characters() -> None:
    tokenizer = CharTokenizer.from_text("ab ")
    tokenizer.add_tokens(["日本"])
    lengths = encoding.bytes_per_token(tokenizer)
    assert lengths[tokenizer("a日本b", add_special_tokens=False).input_ids].tolist() == [1, 6, 1]


def test_bytes_of_tokens_that_have_the_space_before_them() -> None:
    """As Llama 2 and Gemma have them: alone, such a token is decoded without its space."""
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a")]
    tokens = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrst", *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    text = "aha, there and the é\n  these  "
    assert encoding.bytes_per_token(tokenizer)[tokenizer(text).input_ids].sum() == len(text.encode())
