"""Checkpoints that are written in the background; what both kinds survive is in tests/test_reliability.py."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import losses, metrics, train_here, weights
from training_mini import checkpoint_writer
from training_mini.checkpoints import damage_of, states_of
from training_mini.rehearsal import memory_of_step

SETTINGS = ("--max_steps", 12, "--save_steps", 2, "--keep_last", 9, "--async_save", "true", "--ema_decay", 0.9)


@pytest.mark.slow
def test_a_run_that_saves_in_the_background_equals_one_that_waits(tmp_path: Path) -> None:
    """Bit by bit, also where it goes on from a checkpoint that was written while training went on."""
    train_here(tmp_path / "waiting", *SETTINGS, "--async_save", "false")
    trainer, _ = train_here(tmp_path / "run", *SETTINGS)
    assert trainer.saving.in_background and trainer.saving.writer.pending is None
    states = states_of(tmp_path / "run")
    assert [state.name for state in states] == [f"step_{n}" for n in range(2, 13, 2)]
    assert [damage_of(state) for state in states] == [""] * 6
    for state in states[2:]:
        for path in state.iterdir():
            path.unlink()
        state.rmdir()
    train_here(tmp_path / "run", "--resume", "--max_steps", 12)
    expected = weights(tmp_path / "waiting")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())
    assert losses(tmp_path / "run") == losses(tmp_path / "waiting")


class Disk:
    """Stands for a disk on which a checkpoint takes as long as the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.may_write, self.error, self.threads = threading.Event(), error, set()
        self.save_tensors = checkpoint_writer.save_tensors
        monkeypatch.setattr(checkpoint_writer, "save_tensors", self.write)

    def write(self, tensors: dict[str, Any], *place: Any) -> None:
        self.threads.add(threading.current_thread())
        assert self.may_write.wait(60)
        if self.error is not None:
            raise self.error
        self.save_tensors(tensors, *place)


@pytest.mark.slow
def test_training_goes_on_meanwhile_and_a_second_save_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, folder, seen = Disk(monkeypatch), tmp_path / "run", []

    class Watch:
        def on_step_end(self, *arguments: Any, run: Any, **about: Any) -> None:
            states = [state.name for state in states_of(folder)]
            seen.append((run.state.step, states))
            if run.state.step == 4:
                assert states == [], "two steps were done while the first checkpoint waited for the disk"
                disk.may_write.set()  # or the second one would wait for ever

        def on_save(self, *arguments: Any, checkpoint: Path, **about: Any) -> None:
            assert damage_of(checkpoint) == "", "it is complete when this is called"
            seen.append(checkpoint.name)

    train_here(folder, *SETTINGS, callbacks=(Watch,))
    assert threading.current_thread() not in disk.threads and len(disk.threads) == 1
    assert [name for name in seen if isinstance(name, str)] == [f"step_{n}" for n in range(2, 13, 2)]
    step_5 = next(event for event in seen if isinstance(event, tuple) and event[0] == 5)
    assert seen.index("step_2") < seen.index(step_5), "the second save waited for the first"
    assert "step_2" in step_5[1]  # and step_4, where the disk is fast


@pytest.mark.slow
@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_an_error_in_the_background_is_an_error_of_the_run(
    on_save_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Disk(monkeypatch, OSError(28, "No space left on device")).may_write.set()
    folder = tmp_path / "run"
    settings = (*SETTINGS, "--on_save_error", on_save_error)
    if on_save_error == "stop":
        with pytest.raises(OSError, match=r"step_2 could not be written \(No space left on device\)"):
            train_here(folder, *settings)
        assert len(losses(folder)) in (3, 4), "noticed after the next step, or by the next checkpoint"
        assert states_of(folder) == [] and not (folder / ".lock").exists()
    else:
        train_here(folder, *settings)
        errors = capsys.readouterr().err
        assert [f"step_{n} could not be written" in errors for n in range(2, 13, 2)] == [True] * 5 + [False]
        assert [state.name for state in states_of(folder)] == ["step_12"], "training waits for the last one"
        assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 13))
    assert not list((folder / "checkpoints").glob(".*")), "nothing half-written fills the disk"


@pytest.mark.slow
def test_by_default_large_checkpoints_for_which_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = train_here(tmp_path / "run", "--max_steps", 3)
    run = trainer.run
    learned = sum(p.numel() for p in run.unwrapped_model.parameters())
    assert checkpoint_writer.bytes_of_copy(run) == 3 * 4 * learned
    assert not checkpoint_writer.is_in_background(run), "a small one"
    monkeypatch.setattr(checkpoint_writer, "LARGE", 1000)
    assert checkpoint_writer.is_in_background(run)
    with monkeypatch.context() as patched:  # of two processes, the other has a larger part of the model
        patched.setattr(checkpoint_writer, "LARGE", 3 * 4 * learned + 1)
        assert not checkpoint_writer.is_in_background(run)

        def larger(self: object, value: Any) -> list[Any]:
            return [value, value if isinstance(value, bool) else value + 1]

        patched.setattr(type(run.parallel), "gather", larger)
        assert checkpoint_writer.is_in_background(run), "both decide alike"
    copy, step = 3 * 4 * learned, memory_of_step(run, 1)
    assert step > 4 * learned, "the gradients and more"
    for free, has_room in ((copy + step, True), (copy + step - 1, False)):
        monkeypatch.setattr(checkpoint_writer, "free_memory", lambda free=free: free)
        assert checkpoint_writer.is_in_background(run) == has_room
    monkeypatch.setattr(checkpoint_writer, "free_memory", lambda: 1000)
    assert not checkpoint_writer.is_in_background(run)
    run.arguments.run.async_save = True
    with pytest.raises(ValueError, match=r"--async_save copies the weights .* 0.0 GiB of its memory are free; leave"):
        checkpoint_writer.is_in_background(run)
