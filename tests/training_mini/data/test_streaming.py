"""Training from a stream: what is read, in which order, and how reading goes on from a position."""

import itertools
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


def open_corpus(folder: Path, tokens: int = 100, parts: int = 1) -> Corpus:
    return load_corpus(DataArguments(dataset=str(folder), streaming=True, stream_parts=parts), max_eval_tokens=tokens)


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


@pytest.mark.parametrize("last", [[], ["x"]], ids=["gone", "shorter"])
def test_a_position_in_text_that_has_changed_is_refused(folder: Path, last: list[str]) -> None:
    """It is there no more, and to look for it would never end."""
    ids, stream = all_ids(), open_corpus(folder).train
    stream.read(len(ids) - 3 - (ids.index(2, 99) + 1))  # all but the end of the last document
    position = json.loads(json.dumps(stream.state_dict()))
    (folder / "2.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[40:59], *last]))
    with pytest.raises(ValueError, match=r"data' has changed: the document in which the run stood is shorter now"):
        open_corpus(folder).train.load_state_dict(position)


def make(folder: Path, batch_size: int = 4, parts: int = 1) -> StreamBatches:
    corpus = open_corpus(folder, parts=parts)
    return StreamBatches((corpus.train, *corpus.other_parts), Collator(16, 1), batch_size, seed=3)


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


def read_by(processes: list[StreamBatches], step: int, count: int = 1) -> list[list[int]]:
    """The sequences of a global batch that processes share."""
    share = {"num_processes": len(processes), "count": count}
    return [row for i, batches in enumerate(processes) for row in rows_of(batches, step, process_index=i, **share)]


@pytest.mark.parametrize(("processes", "count"), [(3, 1), (3, 2), (2, 1), (4, 1), (6, 1)])
def test_global_batches_of_parts_do_not_depend_on_who_reads_them(
    folder: Path, small_blocks: None, processes: int, count: int
) -> None:
    one, shared = make(folder, 12, parts=3), [make(folder, 12, parts=3) for _ in range(processes)]
    for step in range(6):
        assert sorted(read_by(shared, step, count)) == sorted(rows_of(one, step))


def test_a_process_reads_only_the_parts_that_it_needs(folder: Path, small_blocks: None) -> None:
    """Each part has a file of its own, and the file of another process need not even be there."""
    shared = [make(folder, 6, parts=3) for _ in range(3)]
    (folder / "0.jsonl").rename(folder / "gone")
    (folder / "1.jsonl").rename(folder / "0.jsonl")
    (folder / "0.jsonl").rename(folder / "1.jsonl")
    (folder / "2.jsonl").rename(folder / "away")
    texts = [row for step in range(5) for row in rows_of(shared[1], step, process_index=1, num_processes=3)]
    of_the_file = b"".join(text.encode() + b"\0" for text in TEXTS[20:40])
    for row in texts:
        assert bytes(id - 8 if id >= 8 else 0 for id in row) in 3 * of_the_file
    with pytest.raises(FileNotFoundError):
        rows_of(shared[2], 0, process_index=2, num_processes=3)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
@pytest.mark.parametrize("second", [1, 2, 3, 4])
def test_parts_go_on_from_any_step_on_any_number_of_processes(
    folder: Path, small_blocks: None, stop: int, second: int
) -> None:
    one, first = make(folder, 12, parts=3), [make(folder, 12, parts=3) for _ in range(3)]
    for step in range(stop):
        assert sorted(read_by(first, step)) == sorted(rows_of(one, step))
    state = json.loads(json.dumps(first[0].joined([batches.state_dict(stop) for batches in first])))
    resumed = [make(folder, 12, parts=3) for _ in range(second)]
    for batches in resumed:
        batches.start_at(stop, 12 * stop)
        batches.load_state_dict(state)
    for step in range(stop, stop + 6):
        assert sorted(read_by(resumed, step)) == sorted(rows_of(one, step))
    assert resumed[0].epoch_of(stop + 6) == one.epoch_of(stop + 6)


def test_parts_that_do_not_fit_are_one_sentence(folder: Path, small_blocks: None) -> None:
    with pytest.raises(ValueError, match="train_batch_size \\(4\\) must be divisible by stream_parts \\(3\\)"):
        make(folder, 4, parts=3)
    with pytest.raises(ValueError, match="which has 3 files of records: choose at most as many parts"):
        make(folder, 4, parts=4)
    with pytest.raises(ValueError, match="stream_parts divides a stream: add --streaming"):
        DataArguments(dataset=str(folder), stream_parts=2)
    with pytest.raises(ValueError, match="--stream_parts 1, and 3 would give other batches: leave it as it was"):
        make(folder, 6, parts=3).load_state_dict(make(folder, 6).state_dict(0))
    with pytest.raises(ValueError, match="--stream_parts 3, and 1 would give other batches"):
        make(folder, 6).load_state_dict(make(folder, 6, parts=3).state_dict(0))
    (folder / "2.jsonl").write_text('{"text": null}\n')
    with pytest.raises(ValueError, match="has no text: choose fewer --stream_parts"):
        rows_of(make(folder, 6, parts=3), 0)
    (note,) = open_corpus(folder, parts=2).notes[1:]
    assert note.startswith("The stream is read in 2 parts. Each begins again when it ends")


def test_parts_of_a_hub_dataset_are_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(file) for file in sorted(folder.iterdir())]
    whole = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    monkeypatch.setattr(streaming, "load_hub_dataset", lambda *_, **__: whole)
    settings = {"dataset": "someone/poems", "streaming": True}
    for part in range(3):
        documents = streaming.HubStream(DataArguments(**settings, stream_parts=3), part=part)
        texts = [b"".join(pieces).decode() for _, pieces in documents]
        assert texts == TEXTS[20 * part : 20 * part + 20]
    with pytest.raises(ValueError, match="has 3 files, which cannot be divided equally into --stream_parts 2"):
        streaming.HubStream(DataArguments(**settings, stream_parts=2))


def test_a_stream_of_the_hub_that_goes_on_knows_its_position_and_its_column() -> None:
    records = [{"content": str(number), "text": "other" if number else None} for number in range(4)]
    dataset = datasets.Dataset.from_list(records).to_iterable_dataset()
    arguments = DataArguments(dataset="someone/poems", streaming=True)
    stream = streaming.HubStream(arguments, dataset)
    assert [b"".join(pieces) for _, pieces in itertools.islice(stream, 2)] == [b"0", b"1"]
    resumed = streaming.HubStream(arguments, dataset)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.state_dict() == stream.state_dict(), "before it reads: a run may stop again before the next document"
    assert [b"".join(pieces) for _, pieces in resumed] == [b"2", b"3"]


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


def test_records_without_text_hold_nothing_out(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(ValueError, match="has no text to hold out: none of the records that were read has any"):
        open_corpus(folder)
