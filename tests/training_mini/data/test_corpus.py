"""From what --dataset names to memory-mapped token ids."""

import gzip
import json
import os
import random
import re
import signal
import string
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import zstandard
from helpers.programs import ROOT, run_program, start_program
from tokenization import SPECIAL_TOKENS, BpeTokenizer, ByteTokenizer, CharTokenizer
from training_mini.arguments import (
    AdapterArguments,
    Arguments,
    DataArguments,
    ModelArguments,
    MonitoringArguments,
    OptimizationArguments,
    RunArguments,
    parse_arguments,
)
from training_mini.data import corpus as corpus_module
from training_mini.data import documents as documents_module
from training_mini.data import formats as formats_module
from training_mini.data import sources as sources_module
from training_mini.data.corpus import Corpus, load_corpus
from training_mini.data.formats import decoded
from training_mini.data.packing import ExampleCollator, HeldOutExamples
from training_mini.data.sources import open_source
from transformers import LlamaConfig, tokenization_utils_base


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(cache: Path):
    def load(dataset: object, **settings: object) -> Corpus:
        return load_corpus(DataArguments(dataset=str(dataset), cache_dir=str(cache), **settings))

    return load


def all_text(corpus: Corpus) -> bytes:
    return corpus.text_of(corpus.train[:]) + corpus.text_of(corpus.validation)


def documents_of(corpus: Corpus, split: str) -> list[bytes]:
    ids = getattr(corpus, split)[:]
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_token_id)
    return [corpus.text_of(part) for part in np.split(ids, ends + 1)[:-1]]


def test_one_document_is_split_by_position(load, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "one.txt").write_bytes(data)
    corpus = load(tmp_path / "one.txt")
    assert all_text(corpus) == data
    assert len(corpus.validation) == int(0.1 * (len(data) + 1))
    assert corpus.validation[-1] == 2, "<|eos|> follows the document"


def test_many_documents_are_split_whole(load, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    (folder / "deep").mkdir(parents=True)
    texts = [f"document {i} ".encode() * (10 + i % 7) for i in range(60)]
    for i, text in enumerate(texts):
        (folder / ("deep" if i % 2 else ".") / f"{i:03}.txt").write_bytes(text)
    (folder / "ignored.bin").write_bytes(b"not text")
    corpus = load(folder, validation_ratio=0.2)
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert sorted(train + validation) == sorted(texts)
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.15 < share < 0.25


def test_few_documents_fall_back_to_position(load, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.md").write_bytes(b"%d" % i * 1000)
    corpus = load(f"{tmp_path}/*.md")
    assert 250 < len(corpus.validation) < 350


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "txt.gz", "txt.zst", "utf-16"])
def test_long_files_are_split_by_position_however_short_their_pieces_are(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    for module in (documents_module, formats_module):
        monkeypatch.setattr(module, "PIECE_SIZE", 150_000)
    suffix, encoding = ("txt", form) if form.startswith("utf") else (form, "utf-8")
    compress = {"txt.gz": gzip.compress, "txt.zst": zstandard.compress}.get(form, bytes)
    generator, folder = random.Random(0), tmp_path / "long"
    folder.mkdir()
    for i in range(3):
        text = "".join(generator.choices(string.ascii_letters, k=400_000))
        (folder / f"{i}.{suffix}").write_bytes(compress(text.encode(encoding)))
    corpus = load(folder, encoding=encoding)
    assert len(corpus.validation) == int(0.1 * 3 * 400_001)


def test_a_prompt_that_is_longer_than_the_context_is_read_without_a_warning(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would speak of indexing errors; a sample is begun with what fits."""
    text, examples = load("sample"), load("instruction-sample")
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda message, *_: warned.append(message))
    for corpus in (text, examples):
        corpus.tokenizer.model_max_length = 4
        ((prompt, ids),) = corpus.make_prompts(None, ["longer than that"])
        assert prompt == "longer than that" and len(ids) > 4
    assert not warned


def test_ids_equal_the_tokenizer(load, tmp_path: Path) -> None:
    text = "<|eos|> é\r\n\x00 🎉 " * 50
    (tmp_path / "a.txt").write_bytes(text.encode())
    for name, tokenizer in (("byte", ByteTokenizer()), ("char", CharTokenizer.from_text(text))):
        corpus = load(tmp_path / "a.txt", tokenizer=name)
        expected = [*tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids, 2]
        assert [*corpus.train[:].tolist(), *corpus.validation.tolist()] == expected
        assert type(corpus.tokenizer) is type(tokenizer)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_text(load, tmp_path: Path, compress) -> None:
    text = b"some text to compress\n" * 100
    suffix = "gz" if compress is gzip.compress else "zst"
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(text))
    assert all_text(load(tmp_path / f"a.txt.{suffix}")) == text


def test_truncated_compressed_file(load, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(10_000))[:-500])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is not a complete gzip file"):
        load(tmp_path / "a.txt.gz")


RECORDS = [{"text": f"record {i} é\n", "number": i} for i in range(30)]


def write_records(path: Path) -> None:
    dataset = datasets.Dataset.from_list(RECORDS)
    suffix = path.name.split(".", 1)[1]
    if suffix.startswith("jsonl"):
        data = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
        path.write_bytes(
            gzip.compress(data)
            if suffix.endswith("gz")
            else zstandard.compress(data)
            if suffix.endswith("zst")
            else data
        )
    elif suffix == "csv":
        dataset.to_csv(str(path))
    else:
        dataset.to_parquet(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_records(load, tmp_path: Path, name: str) -> None:
    write_records(tmp_path / name)
    corpus = load(tmp_path / name)
    texts = documents_of(corpus, "train") + documents_of(corpus, "validation")
    assert sorted(texts) == sorted(record["text"].encode() for record in RECORDS)


def test_text_column_is_found_named_or_asked_for(load, tmp_path: Path) -> None:
    (tmp_path / "only.jsonl").write_text('{"id": 1, "poem": "roses are red, violets are blue"}\n' * 5)
    assert b"roses" in all_text(load(tmp_path / "only.jsonl"))
    (tmp_path / "two.jsonl").write_text('{"title": "one text", "poem": "another text"}\n' * 5)
    with pytest.raises(ValueError, match="has the columns title, poem; say with --text_column"):
        load(tmp_path / "two.jsonl")
    assert b"another" in all_text(load(tmp_path / "two.jsonl", text_column="poem"))
    with pytest.raises(ValueError, match="has no column 'pome', did you mean 'poem'"):
        load(tmp_path / "two.jsonl", text_column="pome")


def test_one_table_in_a_folder_of_prose_can_be_left_out(load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prose " * 50)
    (tmp_path / "b.md").write_text("more prose " * 50)
    (tmp_path / "c.md").write_text("and more prose " * 50)
    (tmp_path / "people.csv").write_text("name,town\nAda,London\n")
    pattern = f"{tmp_path}/**/*.md"
    for column in (None, "poem"):  # no column of one table is a column of another
        with pytest.raises(ValueError, match=r"people\.csv has .*; or leave that file out by a quoted glob") as error:
            load(tmp_path, text_column=column)
        assert f"--dataset '{pattern}'." in str(error.value)
    assert b"and more prose" in all_text(load(pattern))
    with pytest.raises(ValueError) as error:
        load(tmp_path / "people.csv")
    assert "leave" not in str(error.value), "there is no other file"


def test_broken_records_name_the_file(load, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": oops\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl could not be read as json"):
        load(tmp_path / "bad.jsonl")


def test_hub_dataset(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real loader, on a dataset folder where the Hub's name would stand.
    write_records(tmp_path / "train.parquet")
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split, streaming: real(
            "parquet", config, data_files=str(tmp_path / "train.parquet"), split=split, streaming=streaming
        ),
    )
    corpus = load("someone/poems")
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "validation")) == sorted(
        record["text"].encode() for record in RECORDS
    )


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.txt", "There is no file or directory 'missing.txt'."),
        ("./nowhere", "There is no file or directory './nowhere'."),
        ("*.nothing", "The glob '*.nothing' matches no file."),
        ("python-stdlb", "did you mean 'python-stdlib'?"),
        ("no/such-dataset", "could not be loaded from the Hub"),
    ],
)
def test_what_does_not_exist(load, dataset: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(dataset)
    assert "\n" not in str(error.value)


def test_empty_corpora(load, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="There is no text in"):
        load(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="empty"):
        load(tmp_path / "empty.txt", tokenizer="char")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="There is no file with text"):
        load(tmp_path / "folder")


def test_invalid_utf8_names_file_and_offset(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "PIECE_SIZE", 7)
    (tmp_path / "bad.txt").write_bytes("é".encode() * 10 + b"\xff tail")
    with pytest.raises(ValueError, match=r"bad\.txt is not valid UTF-8 at byte 20 .*--errors replace"):
        load(tmp_path / "bad.txt", tokenizer="char")
    assert b"\xff" in all_text(load(tmp_path / "bad.txt"))
    replaced = all_text(load(tmp_path / "bad.txt", tokenizer="char", errors="replace"))
    assert replaced.decode() == "é" * 10 + "\ufffd tail"


@pytest.mark.parametrize("size", range(1, 12))
def test_pieces_are_cut_between_characters(size: int) -> None:
    text = "aé漢🎉" * 5
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert "".join(decoded("x", pieces, "utf-8", "strict")) == text


def test_incomplete_character_at_the_end() -> None:
    with pytest.raises(ValueError, match="x is not valid UTF-8 at byte 1"):
        list(decoded("x", [b"a\xe6\xbc"], "utf-8", "strict"))
    assert "".join(decoded("x", [b"a\xe6", b"\xbc"], "utf-8", "replace")) == "a\ufffd"


def test_any_other_tokenizer(load, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "the quick brown fox, the quick brown dog 🎉. " * 40
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path / "bpe")
    (tmp_path / "a.txt").write_text(text)
    corpus = load(tmp_path / "a.txt", tokenizer=str(tmp_path / "bpe"))
    assert all_text(corpus).decode() == text
    ids = np.concatenate([corpus.train[:], corpus.validation])
    assert len(ids) < len(text) / 2
    assert corpus.bytes_per_token[ids].sum() == len(text.encode())


def test_tokenizer_that_does_not_exist(load) -> None:
    with pytest.raises(ValueError, match="--tokenizer 'bite' is neither byte, char nor bpe"):
        load("sample", tokenizer="bite")


def test_second_time_nothing_is_encoded_or_read(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    first = load(tmp_path / "a.txt")

    def forbidden(*arguments: object) -> None:
        raise AssertionError("the corpus was read again")

    monkeypatch.setattr(corpus_module, "encode_corpus", forbidden)
    monkeypatch.setattr(sources_module.hashlib, "file_digest", forbidden)
    second = load(tmp_path / "a.txt")
    assert second.settings == first.settings
    assert second.train[:].tolist() == first.train[:].tolist()


def test_cache_is_keyed_by_content_tokenizer_and_split(load, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100)
    first = load(path)
    assert load(path, tokenizer="char").settings != first.settings
    assert load(path, validation_ratio=0.2).settings != first.settings
    os.utime(path, ns=(1, 1))
    assert load(path).settings == first.settings, "touched, with the same content"
    path.write_text("other text" * 100)
    changed = load(path)
    assert changed.settings != first.settings
    assert b"other" in all_text(changed)


def test_memory_mapped(load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    corpus = load(tmp_path / "a.txt")
    for ids in (corpus.train[10:20], corpus.validation):
        assert isinstance(ids, np.memmap) and not ids.flags.writeable and ids.dtype == np.uint16


def test_shards(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, also where the held-out tail reaches over several of them, hold the ids of one file."""
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    whole = load(tmp_path / "a.txt", validation_ratio=0.3)
    monkeypatch.setattr(documents_module, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(corpus_module, "FORMAT", "sharded")  # another place in the cache
    sharded = load(tmp_path / "a.txt", validation_ratio=0.3)
    folder = next(path.parent for path in (tmp_path / "cache").glob("corpora/*/train-00007.bin"))
    assert not (folder / "train-00008.bin").exists()
    assert [(folder / f"train-0000{i}.bin").stat().st_size for i in (0, 6, 7)] == [
        2000,
        2000,
        2 * len(sharded.train[7000:]),
    ]
    assert len(sharded.train) == len(whole.train) == 10241 - int(0.3 * 10241)
    for window in (slice(None), slice(995, 1005), slice(0, 1000), slice(1500, 4500), slice(5, 5), slice(7000, 99999)):
        assert sharded.train[window].tolist() == whole.train[window].tolist()
    assert sharded.validation.tolist() == whole.validation.tolist()


def test_encoded_folder_is_a_dataset_anywhere(load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 1000)
    first = load(tmp_path / "a.txt")
    folder = next((tmp_path / "cache" / "corpora").glob("*/corpus.json")).parent
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "a.txt").unlink()
    second = load(moved)
    assert second.settings == first.settings and second.train[:].tolist() == first.train[:].tolist()
    with open(moved / "train-00000.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"train-00000\.bin has 100 bytes; [\d,]+ bytes belong there"):
        load(moved)
    facts = (moved / "corpus.json").read_text()
    (moved / "corpus.json").write_text(facts[:50])
    with pytest.raises(ValueError, match=r"corpus\.json is not valid JSON"):
        load(moved)
    (moved / "corpus.json").write_text(facts)
    (moved / "train-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00000\.bin is missing"):
        load(moved)
    # The file that is named is not always the one that is damaged, and in the cache nobody knows the folder.
    (moved / "tokenizer" / "tokenizer.json").write_text("")
    with pytest.raises(ValueError, match=r"^The encoded text in '.*moved' is damaged: remove that folder, and encode"):
        load(moved)


def test_text_that_cannot_be_encoded_leaves_nothing_in_the_cache(load, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some text " * 1000 + b"\xff")
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        load(tmp_path / "a.txt", tokenizer="char")
    assert not [path for path in (cache / "corpora").iterdir() if path.is_dir()]


def test_an_encoded_folder_goes_with_no_other_tokenizer(load, tmp_path: Path) -> None:
    """A model would learn ids that mean something else to it."""
    (tmp_path / "a.txt").write_text("some text " * 1000)
    load(tmp_path / "a.txt")
    encoded = next((tmp_path / "cache" / "corpora").glob("*/corpus.json")).parent
    assert load(encoded, tokenizer=str(encoded / "tokenizer")).settings == load(encoded).settings
    BpeTokenizer.train(["some text " * 9], 270).save_pretrained(tmp_path / "bpe")
    for other in ("char", str(tmp_path / "bpe")):
        with pytest.raises(ValueError, match=f"^'.*' was encoded by another tokenizer than '{other}': name the text"):
            load(encoded, tokenizer=other)
    load(tmp_path / "a.txt", tokenizer="char")
    by_char = next(path.parent for path in encoded.parent.glob("*/corpus.json") if path.parent != encoded)
    assert load(encoded, tokenizer="byte").settings == load(encoded).settings
    with pytest.raises(ValueError, match=r"^'.*' was encoded by another tokenizer than 'byte': name the text"):
        load(by_char, tokenizer="byte")
    assert parse_arguments(["--dataset", str(by_char)]).data.tokenizer is None, "nobody has named one"
    assert parse_arguments(["--dataset", str(by_char), "--tokenizer", "byte"]).data.tokenizer == "byte"
    # In the settings of an older run, the default stands as if somebody had named it.
    (tmp_path / "config.yaml").write_text(f"dataset: {by_char}\ntokenizer: byte\nseed: 1\n")
    assert parse_arguments(["--resume", "--output_dir", str(tmp_path)]).data.tokenizer is None
    arguments = parse_arguments(["--dataset", str(by_char)])
    arguments.save(tmp_path / "config.yaml")
    with open(tmp_path / "config.yaml", "a", encoding="utf-8") as file:
        file.write("tokenizer: byte\n")
    assert arguments.are_those_of(tmp_path)


def test_two_tokenizers_of_one_vocabulary_keep_what_they_differ_in(load, tmp_path: Path) -> None:
    """As those of a base model and of the model of instructions that was made of it."""
    ByteTokenizer().save_pretrained(tmp_path / "base")
    other = {"eos_token": "<|end|>", "extra_special_tokens": list(SPECIAL_TOKENS[2:]), "chat_template": "other"}
    ByteTokenizer(**other).save_pretrained(tmp_path / "chats")
    (tmp_path / "a.txt").write_text("some text " * 1000)
    base, chats = (load(tmp_path / "a.txt", tokenizer=str(tmp_path / name)) for name in ("base", "chats"))
    assert (base.validation[-1], chats.validation[-1]) == (2, 7)
    assert (base.tokenizer.eos_token_id, chats.tokenizer.eos_token_id, chats.tokenizer.chat_template) == (2, 7, "other")
    ByteTokenizer(chat_template="third").save_pretrained(tmp_path / "third")
    assert load(tmp_path / "a.txt", tokenizer=str(tmp_path / "third")).tokenizer.chat_template == "third"


def test_documents_end_and_windows_begin_as_the_tokenizer_says(load, tmp_path: Path) -> None:
    """The configuration of a model of others may name several ends, and no beginning."""
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": "a" * i}) + "\n" for i in range(1, 60)))
    corpus = load(tmp_path / "lines.jsonl")
    arguments = Arguments(
        *(ModelArguments(), AdapterArguments(), DataArguments(document_attention=True)),
        *(OptimizationArguments(train_batch_size=4), MonitoringArguments(), RunArguments()),
    )
    config = LlamaConfig(bos_token_id=None, eos_token_id=[7, 2], max_position_embeddings=64)
    (batch,) = corpus.make_batches(arguments, config)[0].micro_batches(0)
    ends = batch.targets[:, :-1] == 2
    assert ends.any() and torch.equal(batch.inputs["position_ids"][:, 1:] == 0, ends)
    assert (batch.inputs["input_ids"][:, 0] == 1).all()


def test_a_long_prompt_of_a_sample_is_no_warning(load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("some text " * 1000)
    corpus = load(tmp_path / "a.txt")
    corpus.tokenizer.model_max_length = 8
    ((_, ids),) = corpus.make_prompts(corpus.validation, ["x" * 20])
    assert len(ids) == 21 and not caplog.messages


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = tmp_path / "load.py"
    program.write_text(rf"""
import re, sys
sys.path.append({str(ROOT)!r})
from training_mini.arguments import DataArguments
from training_mini.data.corpus import load_corpus
load_corpus(DataArguments(dataset=sys.argv[1], cache_dir=sys.argv[2], tokenizer=sys.argv[3]))
# Not getrusage, whose peak includes that of the parent before exec.
print(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024)
""")
    peaks = {}
    for megabytes in (16, 160):
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(("abcdefghijklmné\n" * 65536)[: 1 << 20].encode() * megabytes)
        for tokenizer in ("byte", "char"):
            result = run_program(program, path, tmp_path / "cache", tokenizer, cwd=ROOT)
            peaks[megabytes, tokenizer] = int(result.stdout)
    for tokenizer in ("byte", "char"):
        assert peaks[160, tokenizer] - peaks[16, tokenizer] < 60, peaks


@pytest.mark.slow
def test_killed_while_encoding_starts_again_cleanly(load, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789abcdef" * (1 << 22))
    program = tmp_path / "load.py"
    program.write_text(f"""
import sys
sys.path.append({str(ROOT)!r})
from training_mini.arguments import DataArguments
from training_mini.data.corpus import load_corpus
load_corpus(DataArguments(dataset={str(tmp_path / "a.txt")!r}, cache_dir={str(cache)!r}))
""")
    process = start_program(program, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(cache.glob("corpora/*.partial/train-*.bin")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("corpora/*/corpus.json"))
    corpus = load(tmp_path / "a.txt")
    assert len(corpus.train) + len(corpus.validation) == (1 << 26) + 1
    assert not list(cache.glob("corpora/*.partial"))


def test_standard_library_leaves_tests_out() -> None:
    names = [name for name, _ in open_source(DataArguments(dataset="python-stdlib")).read()]
    assert len(names) > 300
    assert any(name.endswith("argparse.py") for name in names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)


def test_sample_is_the_same_everywhere(load) -> None:
    corpus = load("sample")
    text = all_text(corpus)
    assert len(text) > 300_000
    sums = re.findall(rb"(\d+) plus (\d+) is (\d+)\.", text)
    assert len(sums) > 1000 and all(int(a) + int(b) == int(c) for a, b, c in sums)


@pytest.mark.parametrize(("ratio", "change"), [(0.9, "smaller"), (1e-6, "larger")])
def test_a_ratio_that_leaves_nothing_is_named(load, tmp_path: Path, ratio: float, change: str) -> None:
    (tmp_path / "one.txt").write_text("A line of text.\n" * 200)
    with pytest.raises(ValueError, match=f"hold some out with a validation_ratio of {ratio:g}: give a {change} one"):
        load(tmp_path / "one.txt", validation_ratio=ratio)


def test_beginnings_are_of_the_held_out_text(load, tmp_path: Path) -> None:
    """Whole words, each from another line; and what the user says first, of conversations."""
    lines = [f"Zeile {number} der Geschichte vom kleinen Haus\n" for number in range(400)]
    (tmp_path / "one.txt").write_text("".join(lines), encoding="utf-8")
    corpus = load(tmp_path / "one.txt")
    found = corpus.beginnings(held_out=None)
    held_out = corpus.text_of(corpus.validation).decode()
    assert len(found) == 4 and all(re.fullmatch(r"Zeile \d+ der", beginning) for beginning in found)
    assert all(f"\n{beginning} " in held_out for beginning in found)
    (tmp_path / "empty.txt").write_text(".\n" * 100, encoding="utf-8")
    assert load(tmp_path / "empty.txt").beginnings(held_out=None) == []
    (tmp_path / "journal.txt").write_text("[12:30] started as usual\n" * 100, encoding="utf-8")
    assert load(tmp_path / "journal.txt").beginnings(held_out=None) == ["[12:30]"]
    (tmp_path / "code.py").write_text("x\nimport os as o\n" * 100, encoding="utf-8")
    assert load(tmp_path / "code.py").beginnings(held_out=None) == ["def ", "import"]
    # Each a document of one line, and one that is a single line.
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line.strip()}) + "\n" for line in lines))
    found = load(tmp_path / "lines.jsonl").beginnings(held_out=None)
    assert len(found) == 4 and all(re.fullmatch(r"Zeile \d+ der", beginning) for beginning in found)
    (tmp_path / "line.txt").write_text("vom kleinen Haus " * 200, encoding="utf-8")
    (found,) = load(tmp_path / "line.txt").beginnings(held_out=None)
    assert found in "vom kleinen Haus vom kleinen Haus vom kleinen Haus" and len(found) > 20

    turns = [{"role": "user", "content": "Hi <|end|>?"}, {"role": "assistant", "content": "Yes."}]
    long = [{"role": "user", "content": "x" * 100}, turns[1]]
    records = [{"messages": messages} for messages in [turns, long] * 20]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    chats = load(tmp_path / "chats.jsonl")
    held_out = HeldOutExamples(ExampleCollator(chats.validation, 64, 0, True), chats.bytes_per_token, 0)
    assert chats.beginnings(held_out) == ["Hi <|end|>?"]


def test_a_question_that_is_asked_often_gives_one_sample(load, tmp_path: Path) -> None:
    records = [{"prompt": f"Wo liegt {town}?", "completion": " Hier."} for town in ["Rom"] * 30 + ["Bonn"] * 30]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    pairs = load(tmp_path / "pairs.jsonl")
    held_out = HeldOutExamples(ExampleCollator(pairs.validation, 64, 0, True), pairs.bytes_per_token, 0)
    prompts = pairs.make_prompts(held_out, [])
    assert (
        sorted(text for text, _ in prompts) == sorted(pairs.beginnings(held_out)) == ["Wo liegt Bonn?", "Wo liegt Rom?"]
    )
    assert all(pairs.tokenizer.decode(ids, skip_special_tokens=True) == text for text, ids in prompts)
