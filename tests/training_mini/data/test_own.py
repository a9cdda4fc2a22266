"""Data of one's own: what it becomes, in which order it is read, and how a run on it goes on."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.runs import losses
from tokenization import ByteTokenizer
from training_mini import TrainingSettings, train
from training_mini.arguments import DataArguments
from training_mini.data.corpus import ExampleCorpus, StreamCorpus, TextCorpus
from training_mini.data.own import OWN_DATA, own_corpus
from transformers import BatchEncoding

IDS = np.random.default_rng(0).integers(8, 264, 6000)
ROWS = IDS.reshape(-1, 60)
RUN: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "train_batch_size": 4, "logging_steps": 1,
    "max_eval_tokens": 600, "max_steps": 6, "save_steps": 3,
}  # fmt: skip


class Again:
    """An iterable that begins anew each time."""

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from ROWS


def corpus_of(data: Any, **settings: Any) -> Any:
    return own_corpus(data, DataArguments(dataset=OWN_DATA, **settings), 600, show_progress=False)


@pytest.mark.parametrize(
    "data",
    [IDS, IDS.tolist(), torch.from_numpy(IDS), ROWS, list(ROWS), Dataset.from_dict({"input_ids": ROWS.tolist()})],
    ids=["array", "list", "tensor", "matrix", "rows", "dataset"],
)
def test_ids_that_are_all_there_are_one_text_with_its_end_held_out(data: Any) -> None:
    corpus = corpus_of(data, validation_ratio=0.2)
    assert type(corpus) is TextCorpus and corpus.problem == ""
    np.testing.assert_array_equal(corpus.train, IDS[:4800])
    np.testing.assert_array_equal(corpus.validation, IDS[4800:])


def records() -> Iterator[dict[str, list[int]]]:
    for row in ROWS:
        yield {"input_ids": row.tolist()}


@pytest.mark.parametrize(
    "make",
    [
        Again, lambda: iter(ROWS), lambda: iter(IDS), lambda: ({"input_ids": torch.from_numpy(row)} for row in ROWS),
        lambda: (BatchEncoding({"input_ids": row.tolist()}) for row in ROWS),
        lambda: IterableDataset.from_generator(records),
    ],
    ids=["iterable", "iterator", "single ids", "records", "what tokenizers give", "stream without named columns"],
)  # fmt: skip
def test_an_iterable_is_read_in_its_order_with_its_beginning_held_out(make: Callable[[], Iterable[Any]]) -> None:
    corpus = corpus_of(make())
    assert type(corpus) is StreamCorpus and "its order is that of the batches" in corpus.problem
    np.testing.assert_array_equal(corpus.validation, IDS[:600])
    first = len(IDS) - 1904 if isinstance(next(iter(make())), np.integer) else 600  # single ids come in groups of 4,096
    np.testing.assert_array_equal(corpus.train.read(900), IDS[first : first + 900])


def test_datasets_of_text_and_of_examples_are_read_as_those_of_the_hub() -> None:
    texts = [f"{i} and {i} is {2 * i}. " * 3 for i in range(100)]
    text = corpus_of(Dataset.from_dict({"text": texts}))
    assert type(text) is TextCorpus and text.text_of(text.train[:40]).startswith(b"0 and 0 is 0.")
    stream = corpus_of(Dataset.from_dict({"text": texts}).to_iterable_dataset())
    assert type(stream) is StreamCorpus and stream.problem == "" and stream.text_of(stream.validation)[:6] == b"0 and "
    examples = Dataset.from_dict({"prompt": texts, "completion": texts})
    assert type(corpus_of(examples)) is ExampleCorpus


@pytest.mark.slow
@pytest.mark.parametrize("data", [lambda: IDS, Again, lambda: iter(ROWS)], ids=["array", "iterable", "iterator"])
@pytest.mark.filterwarnings("ignore:The data is an iterable")
def test_a_run_on_it_goes_on_as_if_it_had_never_stopped(data: Callable[[], Any], tmp_path: Path) -> None:
    settings = {**RUN, "lr_scheduler_type": "constant", "warmup_steps": 0}  # the same for any number of steps
    train(TrainingSettings(**settings, output_dir=str(tmp_path / "whole")), data=data())
    train(TrainingSettings(**{**settings, "max_steps": 3}, output_dir=str(tmp_path / "parts")), data=data())
    train(TrainingSettings(resume=True, output_dir=str(tmp_path / "parts"), max_steps=6), data=data())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_on_it_does_not_go_on_without_it(tmp_path: Path) -> None:
    train(TrainingSettings(**{**RUN, "max_steps": 2}, output_dir=str(tmp_path / "run")), data=IDS)
    resumed = TrainingSettings(resume=True, output_dir=str(tmp_path / "run"), max_steps=3)
    with pytest.raises(ValueError, match=r"^This run learns from data that Python gave it"):
        train(resumed)
    with pytest.raises(ValueError, match="was trained on another corpus: another content"):
        train(resumed, data=IDS + 1 - 2 * (IDS == 263))


def test_epochs_of_an_iterable_begin_anew_and_an_iterator_ends() -> None:
    stream = corpus_of(Again()).train
    np.testing.assert_array_equal(stream.read(5400 + 100)[-100:], IDS[600:700])
    assert stream.epoch == 1
    with pytest.raises(ValueError, match=r"^The data ended after 100 items and does not begin again"):
        corpus_of(iter(ROWS)).train.read(5401)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("text.txt", "must be a datasets.Dataset or an iterable of token ids, got str"),
        (DatasetDict(), "one split of a DatasetDict"),
        (ByteTokenizer()(["a", "b"]), "an iterable of token ids, got BatchEncoding"),
        (lambda: iter(ROWS), "an iterable of token ids, got function"),
        ([{"text": "a"}], r"has a record without input_ids \(text\): give texts and examples as a datasets.Dataset"),
        ([1.5, 2.5], "must be token ids, which are integers, got 1.5|must be token ids, which are integers"),
        (["a text"], "which are integers, got 'a text' .*: give texts as a datasets.Dataset, or encode them"),
        ([8, 264], "has the token id 264, and the tokenizer has 264"),
        ([-1] * 9, "has the token id -1"),
        ([8], "has 1 token ids, too few"),
        (iter([[8, 9]]), "has no more than the 600 tokens to hold out"),
        (map(list, [[8] * 700, [], []]), "has no more than the 600 tokens to hold out"),
    ],
    ids=[
        *("path", "splits", "encoding", "function", "records of text", "floats", "texts", "too large", "negative"),
        *("too few", "too short", "nothing left"),
    ],
)
def test_what_is_no_data_is_one_sentence(data: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        corpus_of(data)


def test_ids_go_with_no_tokenizer_that_is_learned_and_data_with_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer 'char' is learned from text"):
        corpus_of(IDS, tokenizer="char")
    with pytest.raises(ValueError, match=r"^train\(data=...\) stands in the place of dataset"):
        train(TrainingSettings(dataset="sample", output_dir=str(tmp_path)), data=IDS)
