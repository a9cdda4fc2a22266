"""The order of the data is a pure function of (seed, step), whoever computes it."""

import numpy as np
import pytest
import torch
from training_mini.data.batches import Collator, TrainingBatches, key_of, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    for seed in range(3):
        images = permute(np.arange(size), size, key_of(seed))
        assert sorted(images.tolist()) == list(range(size))


def test_permute_mixes_and_depends_on_its_key() -> None:
    first, second = (permute(np.arange(1000), 1000, key_of(seed)) for seed in (1, 2))
    assert (first == second).mean() < 0.02
    # Neighbours are no longer neighbours, and positions and images are uncorrelated.
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1


def make(tokens: int = 10_007, context: int = 16, batch: int = 8, seed: int = 3) -> TrainingBatches:
    return TrainingBatches(np.arange(tokens, dtype=np.uint16), Collator(context, 1), batch, seed=seed)


def test_an_epoch_visits_every_window_once() -> None:
    batches = make(batch=7)
    windows = batches.windows_per_epoch
    starts = np.concatenate([batches.starts(step) for step in range(-(-windows // 7))])[:windows]
    assert len(set(starts.tolist())) == windows
    assert np.unique(starts % 16).size == 1, "the windows of one epoch have one offset, so they do not overlap"
    assert starts.min() >= 0 and starts.max() + 16 <= 10_007


@pytest.mark.slow
def test_epochs_differ_in_order_and_offset() -> None:
    batches = make(batch=1)
    windows = batches.windows_per_epoch
    epochs = [np.concatenate([batches.starts(e * windows + i) for i in range(windows)]) for e in range(6)]
    assert len({int(epoch[0] % 16) for epoch in epochs}) > 1
    assert not np.array_equal(np.argsort(epochs[0]), np.argsort(epochs[1]))


def test_seed_decides() -> None:
    assert np.array_equal(make().starts(5), make().starts(5))
    assert not np.array_equal(make(seed=3).starts(5), make(seed=4).starts(5))


def test_any_step_is_found_without_those_before_it() -> None:
    assert make().starts(10**12).shape == (8,)


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 4), (2, 2), (8, 1), (4, 2)])
def test_global_batch_does_not_depend_on_who_shares_it(processes: int, parts: int) -> None:
    batches = make()
    whole = torch.cat([batch.inputs["input_ids"] for batch in batches.micro_batches(11)])
    shared = [
        batch.inputs["input_ids"]
        for process in range(processes)
        for batch in batches.micro_batches(11, process_index=process, num_processes=processes, count=parts)
    ]
    assert len(shared) == processes * parts
    assert sorted(torch.cat(shared).tolist()) == sorted(whole.tolist())


def test_rows_begin_with_bos_and_lag_by_one() -> None:
    batch = Collator(5, bos_token_id=1).make(np.arange(100, 200, dtype=np.uint16), [0, 10])
    inputs, targets = batch.inputs["input_ids"], batch.targets
    assert list(batch.inputs) == ["input_ids"]
    assert targets.tolist() == [[100, 101, 102, 103, 104], [110, 111, 112, 113, 114]]
    assert inputs.tolist() == [[1, 100, 101, 102, 103], [1, 110, 111, 112, 113]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_documents_in_a_row_are_apart() -> None:
    ids = np.array([7, 8, 2, 9, 10, 11, 2, 2, 12, 13], dtype=np.uint16)  # 2 ends a document; one is empty
    batch = Collator(10, bos_token_id=1, separator_id=2).make(ids, [0])
    assert batch.targets.tolist() == [ids.tolist()], "every token is predicted, also the first of a document"
    assert batch.inputs["input_ids"].tolist() == [[1, 7, 8, 1, 9, 10, 11, 1, 1, 12]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1]]


@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 33, 47])
def test_short_corpora(tokens: int) -> None:
    batches = make(tokens=tokens)
    for step in range(20):
        starts = batches.starts(step)
        assert starts.min() >= 0 and starts.max() + 16 <= tokens


def test_corpus_shorter_than_one_context() -> None:
    with pytest.raises(ValueError, match="15 tokens, less than one context of 16"):
        make(tokens=15)
