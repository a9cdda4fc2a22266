"""Training from a stream: what is read, in which order, and how reading goes on from a position."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from training_mini.arguments import DataArguments
from training_mini.data import streaming
from training_mini.data.batches import Collator
from training_mini.data.corpus import Corpus, load_corpus
from training_mini.data.streaming import StreamBatches

LENGTHS = [5 + 37 * i % 90 for i in range(60)]
TEXTS = [f"{i}:" + "abcdefghij"[i % 10] * length for i, length in enumerate(LENGTHS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three files, with a record that has no text."""
    (tmp_path / "data").mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in TEXTS[20 * part : 20 * part + 20]]
        lines.insert(5, json.dumps({"text": None}))
        (tmp_path / "data" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def open_corpus(folder: Path, tokens: int = 100) -> Corpus:
    return load_corpus(DataArguments(dataset=str(folder), streaming=True), max_eval_tokens=tokens)


def all_ids() -> list[int]:
    return [byte for text in TEXTS for byte in [*(b + 8 for b in text.encode()), 2]]


def test_beginning_is_held_out_and_the_rest_comes_in_order_again_and_again(folder: Path) -> None:
    corpus = open_corpus(folder)
    ids = all_ids()
    assert corpus.validation.tolist() == ids[:100]
    ends = np.flatnonzero(np.array(ids) == 2)
    rest = ids[ends[ends >= 99][0] + 1 :]  # whole documents are held out
    read = [corpus.train.read(n) for n in (1, 7, 500, len(rest) - 508, 3, len(rest) - 3)]
    assert np.concatenate(read).tolist() == rest + rest
    assert corpus.train.epoch == 1


@pytest.mark.parametrize("read", [0, 1, 100, 777, 2500, 5000, 9000])
def test_position_is_exact(folder: Path, read: int) -> None:
    stream = open_corpus(folder).train
    if read:
        stream.read(read)
    position = json.loads(json.dumps(stream.state_dict()))
    expected = stream.read(4000).tolist()
    other = open_corpus(folder).train
    other.load_state_dict(position)
    assert other.read(4000).tolist() == expected
    assert other.epoch == stream.epoch
    # And once more from there: a run may be resumed twice.
    position = json.loads(json.dumps(other.state_dict()))
    third = open_corpus(folder).train
    third.load_state_dict(position)
    assert third.read(50).tolist() == other.read(50).tolist()


def make(folder: Path, batch_size: int = 4) -> StreamBatches:
    return StreamBatches(open_corpus(folder).train, Collator(16, 1), batch_size, seed=3)


def rows_of(batches: StreamBatches, step: int, **share: int) -> list[list[int]]:
    return torch.cat([batch.targets for batch in batches.micro_batches(step, **share)]).tolist()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_WINDOWS", 10)


def test_batches_are_the_stream_shuffled_in_blocks(folder: Path, small_blocks: None) -> None:
    batches = make(folder)
    rows = [row for step in range(15) for row in rows_of(batches, step)]
    stream = open_corpus(folder).train
    windows = [stream.read(16).tolist() for _ in range(60)]
    for block in range(6):
        part = slice(10 * block, 10 * block + 10)
        assert Counter(map(tuple, rows[part])) == Counter(map(tuple, windows[part]))
        assert rows[part] != windows[part]


@pytest.mark.parametrize(("processes", "parts"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_global_batch_does_not_depend_on_who_shares_it(
    folder: Path, small_blocks: None, processes: int, parts: int
) -> None:
    one, shared = make(folder), [make(folder) for _ in range(processes)]
    for step in range(6):
        rows = [
            row
            for process, batches in enumerate(shared)
            for row in rows_of(batches, step, process_index=process, num_processes=processes, count=parts)
        ]
        assert sorted(rows) == sorted(rows_of(one, step))


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 13])
def test_batches_go_on_from_any_step(folder: Path, small_blocks: None, stop: int) -> None:
    batches = make(folder)
    for step in range(stop):
        rows_of(batches, step)
    position = json.loads(json.dumps(batches.state_dict(stop)))
    resumed = make(folder)
    resumed.start_at(stop, 4 * stop)
    resumed.load_state_dict(position)
    for step in range(stop, stop + 12):
        assert rows_of(resumed, step) == rows_of(batches, step)


@pytest.mark.parametrize("second", [1, 2, 8])
def test_resumed_at_another_batch_size_the_stream_goes_on_where_it_was(
    folder: Path, small_blocks: None, second: int
) -> None:
    unbroken, batches, resumed = make(folder, 1), make(folder, 4), make(folder, second)
    reads = [row for step in range(5) for row in rows_of(batches, step)]
    resumed.start_at(5, 20)
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict(5))))
    reads += [row for step in range(5, 9) for row in rows_of(resumed, step)]
    assert reads == [row for step in range(len(reads)) for row in rows_of(unbroken, step)]


def test_a_position_that_does_not_say_how_much_was_read_is_refused_at_another_batch_size(
    folder: Path, small_blocks: None
) -> None:
    batches, resumed = make(folder, 4), make(folder, 1)
    for step in range(9):
        rows_of(batches, step)
    resumed.start_at(9, 9)  # as for a checkpoint of before sequences were counted
    with pytest.raises(ValueError, match="train_batch_size 1 is not the one that the run began with"):
        resumed.load_state_dict(batches.state_dict(9))


def test_hub_dataset_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = datasets.load_dataset
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, config, split, streaming))
        return real("json", data_files=[str(file) for file in sorted(folder.iterdir())], split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus(DataArguments(dataset="someone/poems", streaming=True), max_eval_tokens=100)
    assert corpus.validation.tolist() == all_ids()[:100]
    assert set(asked) == {("someone/poems", None, "train", True)}


@pytest.mark.parametrize(
    ("settings", "tokens", "message"),
    [
        ({"tokenizer": "char"}, 100, "--tokenizer char needs to read the whole text"),
        ({}, 0, "--max_eval_tokens cannot be 0"),
        ({}, 10**6, "has no more than the 1000000 tokens to hold out"),
        ({"dataset": "sample"}, 100, "leave --streaming out"),
        ({"text_column": "body"}, 100, "has no column 'body'"),
    ],
)
def test_what_cannot_be_streamed(folder: Path, settings: dict[str, str], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(DataArguments(**{"dataset": str(folder), "streaming": True, **settings}), max_eval_tokens=tokens)
    assert "\n" not in str(error.value)
