"""`--max_minutes`: how many steps fit, and a run that is as one to which the number of steps was given."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.runs import QUICK, forked, losses, metrics, train_here, weights
from training_mini import rehearsal, time_limit
from training_mini.arguments import parse_arguments
from training_mini.optimization import share_of_peak
from training_mini.time_limit import Costs, steps_that_fit
from training_mini.trainer import Trainer

COSTS = Costs(step=0.1, evaluation=3.0, checkpoint=1.0, model_folder=0.5, samples=2.0)
# QUICK says how long the warmup is.
WITHOUT_WARMUP = [
    flag for flag, before in zip(QUICK, ["", *QUICK], strict=False) if "--warmup_steps" not in (flag, before)
]


def test_costs_are_those_of_all_that_is_due() -> None:
    arguments = parse_arguments("--eval_steps 10 --save_steps 20 --sample_every 15 --max_steps 30".split())
    # 30 steps; evaluations after 10, 20 and 30, each the best so far; checkpoints after 20 and 30; samples after 15 and
    # at the end; the last model.
    assert COSTS.of(30, arguments) == pytest.approx(30 * 0.1 + 3 * (3 + 1) + 2 * 1 + 2 * 2 + 4 * 0.5)


@pytest.mark.parametrize("seconds", [0.0, 9.0, 9.2, 20.0, 77.7, 1000.0])
def test_as_many_steps_as_fit(seconds: float) -> None:
    arguments = parse_arguments("--eval_steps 10 --save_steps 20 --sample_every 15".split())
    steps = steps_that_fit(seconds, COSTS, arguments)
    assert COSTS.of(steps + 1, arguments) > seconds
    assert steps == 0 or COSTS.of(steps, arguments) <= seconds


def test_the_clock_starts_when_a_gpu_has_finished_the_steps_that_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which the first steps take 100 seconds and the others one, while the calls return at once."""
    clock, steps, queued = 0.0, itertools.count(), 0.0

    def step(_: int) -> None:
        nonlocal queued
        queued += 100.0 if next(steps) < rehearsal.UNTIMED_STEPS else 1.0

    def synchronize() -> None:
        nonlocal clock, queued
        clock, queued = clock + queued, 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=lambda: clock))
    run = SimpleNamespace(
        optimizers=[],
        accelerator=SimpleNamespace(device=torch.device("cuda")),
        parallel=SimpleNamespace(from_main=lambda decision: decision),
    )
    assert rehearsal.seconds_of_step(run, step, seconds=3.0) == 1.0


@pytest.mark.slow
def test_rehearsing_leaves_the_weights_and_the_optimizers_as_they_are(tmp_path: Path) -> None:
    """Also where a gradient is not finite, whose step the trainer would skip."""
    for optimizer, factor in (("muon", 1.0), ("adamw", 1.0), ("muon", math.nan), ("adamw", math.inf)):
        flags = ["--output_dir", str(tmp_path / f"{optimizer} {factor}"), "--max_minutes", "1"]
        trainer = Trainer(parse_arguments([*WITHOUT_WARMUP, *flags, "--optimizer", optimizer]))
        for parameter in trainer.run.unwrapped_model.parameters():
            parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        before = {name: tensor.clone() for name, tensor in trainer.run.unwrapped_model.state_dict().items()}
        rates = [group["lr"] for one in trainer.run.optimizers for group in one.param_groups]
        costs = time_limit.measure(trainer.run, trainer.forward_and_backward, trainer.micro_batches, seconds=0.2)
        assert costs.step > 0 and costs.evaluation > 0 and costs.samples > 0
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in trainer.run.unwrapped_model.state_dict().items()
        )
        assert rates == [group["lr"] for one in trainer.run.optimizers for group in one.param_groups]
        assert all(not one.state for one in trainer.run.optimizers)


@pytest.mark.slow
def test_a_run_of_minutes_is_the_run_of_the_steps_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--residual_dropout", "0.1", "--ema_decay", "0.5", "--save_steps", "20"]
    trainer = Trainer(
        parse_arguments([*WITHOUT_WARMUP, *flags, "--output_dir", str(tmp_path / "minutes"), "--max_minutes", "0.5"])
    )
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: trainer.started + 0.3 * next(ticks))
    for module in (time_limit, rehearsal):
        monkeypatch.setattr(module, "time", clock)
    trainer.train()
    settings = yaml.safe_load((tmp_path / "minutes" / "config.yaml").read_text())
    steps = settings["max_steps"]
    assert 20 < steps < 30 / 0.3 and "max_minutes" not in settings and settings["warmup_steps"] == steps // 10
    assert f"0.5 minutes are enough for {steps} steps of 0.3 s, with evaluation and saving." in capsys.readouterr().out
    rates = [line["learning_rate"] for line in metrics(tmp_path / "minutes") if "loss" in line]
    optimization = trainer.arguments.optimization
    assert rates[-1] == pytest.approx(optimization.learning_rate * share_of_peak(steps - 1, optimization))
    # The rehearsal has left nothing behind; and a resume goes on to the same end.
    train_here(tmp_path / "steps", *flags, "--max_steps", steps, "--warmup_steps", steps // 10)
    assert losses(tmp_path / "minutes") == losses(tmp_path / "steps")
    for path in (tmp_path / "minutes" / "checkpoints" / f"step_{steps}").iterdir():
        path.unlink()
    Trainer(parse_arguments(["--resume", "--output_dir", str(tmp_path / "minutes")])).train()
    assert losses(tmp_path / "minutes") == losses(tmp_path / "steps")
    assert all(
        torch.equal(tensor, weights(tmp_path / "steps")[n]) for n, tensor in weights(tmp_path / "minutes").items()
    )


def test_too_little_time_is_a_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--max_minutes", "0.001"]
    with pytest.raises(
        ValueError, match=r"max_minutes \(0.001\) is too short for one step: .* take about 0\.\d+ minutes"
    ):
        Trainer(parse_arguments([*WITHOUT_WARMUP, *flags])).train()
    assert not (tmp_path / "run").exists()


def test_minutes_and_steps_are_two_ways_to_say_one_thing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give one of max_steps and max_minutes"):
        parse_arguments(["--max_steps", "10", "--max_minutes", "1"])
    with pytest.raises(ValueError, match="max_minutes must be"):
        parse_arguments(["--max_minutes", "0"])
    # A flag wins over the file, whichever way each says it.
    (tmp_path / "steps.yaml").write_text("max_steps: 1200\nwarmup_steps: 100\ntrain_batch_size: 4\n")
    optimization = parse_arguments(["--config", str(tmp_path / "steps.yaml"), "--max_minutes", "2"]).optimization
    assert (optimization.max_minutes, optimization.max_steps, optimization.train_batch_size) == (2, None, 4)
    (tmp_path / "minutes.yaml").write_text("max_minutes: 2\n")
    optimization = parse_arguments(["--config", str(tmp_path / "minutes.yaml"), "--max_steps", "50"]).optimization
    assert (optimization.max_minutes, optimization.max_steps, optimization.warmup_steps) == (None, 50, 5)
    parse_arguments(["--seed", "1"]).save(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="max_minutes is for new runs"):
        parse_arguments(["--resume", "--output_dir", str(tmp_path), "--max_minutes", "2"])


@pytest.mark.slow
def test_processes_agree_on_the_number_of_steps(tmp_path: Path) -> None:
    output = forked("cpu.yaml", tmp_path, *WITHOUT_WARMUP, "--max_minutes", 0.15, "--output_dir", "run")
    steps = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"]
    assert f"0.15 minutes are enough for {steps:,} steps" in output and f"Trained {steps} steps" in output
