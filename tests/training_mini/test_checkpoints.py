"""What a state to resume from is compared with, and says; what it survives is in tests/test_reliability.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import losses, metrics, train_here
from training_mini.checkpoints import (
    CHECKSUMS,
    STATE,
    TrainerState,
    check_state,
    damage_of,
    find_state,
    read_state,
    sha256,
)
from training_mini.data.batches import Collator, TrainingBatches


def test_a_state_of_before_methods_were_written_down_is_not_refused(tmp_path: Path) -> None:
    state = TrainerState(corpus={}, architecture={})
    check_state(tmp_path, state, {}, {}, {"optimizer": "adamw"}, {"seed": 1})
    state.methods = {"optimizer": "muon"}
    with pytest.raises(ValueError, match=r"optimizer \(was muon, now adamw\)"):
        check_state(tmp_path, state, {}, {}, {"optimizer": "adamw"}, {"seed": 1})


def test_another_order_of_the_data_is_refused(tmp_path: Path) -> None:
    state = TrainerState(corpus={}, architecture={}, order={"seed": 42})
    check_state(tmp_path, state, {}, {}, {}, {"seed": 42, "assistant_only_loss": True})
    with pytest.raises(ValueError, match=r"another order of its data, .*: seed \(was 42, now 43\); leave"):
        check_state(tmp_path, state, {}, {}, {}, {"seed": 43})


def test_a_checkpoint_of_a_newer_version_is_not_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    state = json.dumps({"corpus": {}, "architecture": {}, "step": 2, "phase": "cooldown"})
    (folder / STATE).write_text(state)
    (folder / CHECKSUMS).write_text(json.dumps({STATE: sha256(folder / STATE)}))
    with pytest.raises(ValueError, match=r"step_2 was written by a newer version of Mini, which records phase: go on"):
        find_state(tmp_path)
    assert (folder / STATE).read_text() == state, "it stays where it is"


@pytest.mark.slow
@pytest.mark.parametrize("second", [2, 16])
def test_resumed_at_another_batch_size_nothing_is_left_out_or_read_twice(second: int, tmp_path: Path) -> None:
    flags = ["--max_steps", 10, "--train_batch_size", 8, "--lr_scheduler_type", "constant"]
    first, _ = train_here(tmp_path / "run", *flags)
    resume = ["--resume", "--max_steps", 20, "--train_batch_size", second, "--lr_scheduler_type", "constant"]
    trainer, _ = train_here(tmp_path / "run", *resume)
    reads = [first.run.batches.starts(step) for step in range(10)]
    reads += [trainer.run.batches.starts(step) for step in range(10, 20)]
    collator = Collator(64, 1)
    count = 80 + 10 * second
    unbroken = TrainingBatches(first.run.corpus.train, collator, batch_size=count, seed=42).starts(0)
    assert np.concatenate(reads).tolist() == unbroken.tolist()
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    expected = [64 * (8 * min(n, 10) + second * max(0, n - 10)) for n in range(1, 21)]
    assert [line["tokens"] for line in lines] == expected
    per_epoch = trainer.run.batches.windows_per_epoch
    assert [line["epoch"] for line in lines] == pytest.approx([tokens / 64 / per_epoch for tokens in expected])
    assert read_state(tmp_path / "run" / "checkpoints" / "step_20").sequences == count
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert f"20 steps with {64 * count:,} tokens in all, the last of {second} x 64 tokens" in card


@pytest.mark.slow
def test_a_checkpoint_of_before_sequences_were_counted_goes_on_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tmp_path / "whole", "--max_steps", 8, "--save_steps", 4)
    train_here(tmp_path / "parts", "--max_steps", 8, "--save_steps", 4)
    states = tmp_path / "parts" / "checkpoints"
    for path in (states / "step_8").iterdir():
        path.unlink()
    old = states / "step_4"
    state = json.loads((old / STATE).read_text())
    del state["sequences"], state["order"]
    (old / STATE).write_text(json.dumps(state))
    sums = json.loads((old / CHECKSUMS).read_text())
    (old / CHECKSUMS).write_text(json.dumps(sums | {STATE: sha256(old / STATE)}))
    assert damage_of(old) == "" and read_state(old).sequences is None
    capsys.readouterr()
    train_here(tmp_path / "parts", "--resume", "--max_steps", 8)
    assert "This run began with torch's Muon" in capsys.readouterr().err, "as every run by Muon of that time did"
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert read_state(states / "step_8").sequences == 64 and read_state(states / "step_8").order == {"seed": 42}
