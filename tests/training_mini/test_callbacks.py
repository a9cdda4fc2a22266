"""Callbacks by the names and arguments of transformers' `TrainerCallback`."""

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import QUICK, losses, metrics
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import states_of, step_of
from training_mini.hooks import Hooks
from training_mini.trainer import Trainer
from transformers import TrainerCallback, TrainerControl, TrainerState


def run(folder: Path, *callbacks: object, flags: str = "--max_steps 4 --eval_steps 2") -> Trainer:
    arguments = parse_arguments([*QUICK, *flags.split(), "--output_dir", str(folder)])
    trainer = Trainer(arguments, Hooks(callbacks=callbacks))
    trainer.train()
    return trainer


class Recorder(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **about: Any) -> None:
            assert isinstance(state, TrainerState) and isinstance(control, TrainerControl)
            assert args.max_steps == state.max_steps == 4 and Path(args.output_dir).is_dir()
            assert about["model"] is about["run"].unwrapped_model and about["optimizer"].param_groups
            assert len(about["processing_class"]) == 264
            expected = {"on_log": "logs", "on_evaluate": "metrics", "on_sample": "samples"}
            assert name not in expected or about[expected[name]]
            self.events.append((name, state.global_step))

        return note


@pytest.mark.slow
def test_events_come_in_the_order_of_transformers(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = run(tmp_path / "run", recorder)
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    expected = [("on_train_begin", 0)]
    for number in range(4):
        expected += [(event, number + (event in step[3:])) for event in step]
        expected += [("on_evaluate", number + 1)] * (number % 2)
        expected += [("on_sample", number + 1)] * (number == 1)  # at the end, after the last checkpoint
    expected += [("on_save", 4), ("on_sample", 4), ("on_train_end", 4)]
    assert recorder.events == expected
    history = trainer.callbacks.state.log_history
    assert [line["loss"] for line in history if "loss" in line] == losses(tmp_path / "run")


@pytest.mark.slow
def test_what_a_callback_asks_for_is_done_before_the_next_step(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> TrainerControl:
            control.should_save = state.global_step == 1
            control.should_evaluate = control.should_log = state.global_step == 2
            control.should_training_stop = state.global_step == 3
            return control

    flags = "--max_steps 9 --eval_steps 8 --logging_steps 8 --save_steps 8 --keep_last 9"
    trainer = run(tmp_path / "run", Asks, flags=flags)
    assert [step_of(folder) for folder in states_of(tmp_path / "run")] == [1, 3]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3], (
        "the first step and the last are logged always"
    )
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 3], "a run that ends is evaluated"
    assert trainer.state.step == 3 and (tmp_path / "run" / "final").is_dir()


@pytest.mark.slow
def test_any_object_with_a_method_will_do_and_one_that_is_never_called_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Epochs(TrainerCallback):
        steps = 0

        def on_step_end(self, *arguments: Any, **about: Any) -> None:
            self.steps += 1

        def on_epoch_end(self, *arguments: Any, **about: Any) -> None:
            raise AssertionError

    class Plain:
        def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
            self.step = state.global_step

    epochs, plain = Epochs(), Plain()
    run(tmp_path / "run", epochs, plain)
    assert (epochs.steps, plain.step) == (4, 4)
    assert capsys.readouterr().err.count("Epochs.on_epoch_end is never called here") == 1


@pytest.mark.slow
def test_callbacks_change_nothing_of_the_run(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "watched", Recorder())
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
