"""Several runs in one process, and their comparison."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.programs import ROOT
from helpers.runs import QUICK
from training_mini import from_python, trainer
from training_mini.monitoring import Monitor, read_metrics
from training_mini.sweep import main, plan

FLAGS = dict(zip((flag.removeprefix("--") for flag in QUICK[::2]), QUICK[1::2], strict=True))
COMMON = {**FLAGS, "max_steps": 6, "warmup_steps": 1, "eval_steps": 3, "save_steps": 3}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    content = {"common": COMMON, "runs": {"with": None, "without": {"qk_norm": False}}}
    (tmp_path / "norms.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "norms.yaml"


def test_the_sweep_of_the_recipe_that_comes_with_mini() -> None:
    planned = plan(ROOT / "benchmarks" / "recipe.yaml", [1, 2], Path("runs"))
    settings = [(run.label.partition(",")[0], run.arguments.optimization) for run in planned[: len(planned) // 2]]
    assert len(planned) == 2 * len(settings) and settings[0][0] == "recipe"
    tokens = {each.max_steps * each.train_batch_size for _, each in settings}
    assert tokens == {300 * 16}, "as many tokens for each"
    assert dict(settings)["adamw"].optimizer == "adamw" and dict(settings)["recipe"].optimizer == "muon"


def test_the_sweep_of_the_rates_that_comes_with_mini() -> None:
    planned = plan(ROOT / "benchmarks" / "rates.yaml", [1], Path("runs"))
    settings = [(run.arguments.model.hidden_size or 128, run.arguments.optimization.learning_rate) for run in planned]
    assert settings == [(width, rate) for width in (32, 64, 128) for rate in (0.01, 0.02, 0.04, 0.08)]


def test_the_sweep_of_adamw_that_comes_with_mini() -> None:
    planned = plan(ROOT / "benchmarks" / "adamw.yaml", [1], Path("runs"))
    settings = [(run.arguments.optimization.optimizer, run.arguments.optimization.learning_rate) for run in planned]
    assert settings == [("adamw", rate) for rate in (0.001, 0.002, 0.004, 0.008)]


@pytest.mark.slow
def test_runs_take_turns_and_are_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(file), "--seeds", "1", "2"])
    printed = capsys.readouterr().out
    assert re.findall(r"Run \d of 4: (.*)", printed) == [
        "with, seed 1", "without, seed 1", "with, seed 2", "without, seed 2",
    ]  # fmt: skip
    folder = Path("runs/norms")
    assert (folder / "comparison.png").is_file()
    assert sorted(path.name for path in folder.glob("*-seed-*")) == [
        "with-seed-1", "with-seed-2", "without-seed-1", "without-seed-2",
    ]  # fmt: skip
    assert "qk_norm" in printed and "±" in printed, "one table with the setting that differs, and the spread over seeds"
    paths = [folder / name / "config.yaml" for name in ("with-seed-1", "without-seed-2")]
    settings = [yaml.safe_load(path.read_text()) for path in paths]
    assert [(each["qk_norm"], each["seed"]) for each in settings] == [(True, 1), (False, 2)]

    main([str(file), "--seeds", "1", "2"])  # nothing is trained again
    assert capsys.readouterr().out.count("(finished before)") == 4
    other = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**other, "common": {**COMMON, "max_steps": 7}}))
    with pytest.raises(ValueError, match="There is a run in 'runs/norms/with-seed-1' whose settings are others"):
        main([str(file), "--seeds", "1"])


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics_of(file, "whole")
    train, calls = from_python.train, []

    def killed(settings: object) -> object:
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(settings)

    monkeypatch.setattr(from_python, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        main([str(file), "--folder", "parts"])
    assert Path("parts/with-seed-42/final").is_dir() and not Path("parts/without-seed-42").exists()
    assert metrics_of(file, "parts") == whole
    assert len(calls) == 3, "the finished one was not trained again"


@pytest.mark.slow
def test_a_run_that_diverges_does_not_end_the_sweep(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As the run of test_reliability.py that leaves the finite numbers.
    diverges = {"norm_type": "layernorm", "qk_norm": False, "optimizer": "adamw", "learning_rate": 1e6}
    file.write_text(yaml.safe_dump({"common": {**COMMON, "warmup_steps": 0}, "runs": {"wild": diverges, "tame": None}}))
    main([str(file), "--folder", "runs"])
    printed = capsys.readouterr()
    assert re.search(r"warning: wild, seed 42 has diverged: After step \d the .* a lower learning_rate", printed.err)
    assert Path("runs/tame-seed-42/final").is_dir() and not Path("runs/wild-seed-42/final").exists()
    table = [line for line in printed.out.splitlines() if line.strip().startswith(("wild", "tame"))]
    assert len(table) == 2 and Path("runs/comparison.png").is_file()


def test_brackets_in_a_name_are_no_markup(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump({"common": COMMON, "runs": {"one[bold]": None}}))
    monkeypatch.setattr(from_python, "train", lambda settings: SimpleNamespace(stopped_by=2))
    with pytest.raises(SystemExit):
        main([str(file), "--folder", "parts"])
    assert "Run 1 of 1: one[bold], seed 42" in capsys.readouterr().out


def test_a_run_whose_settings_are_damaged_is_another(file: Path) -> None:
    file.write_text(yaml.safe_dump({"common": COMMON, "runs": {"one": None}}))
    (run,) = plan(file, [], Path("parts"))
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("learning_rate: [0.02\nseed: 42\n")
    with pytest.raises(ValueError, match="whose settings are others"):
        main([str(file), "--folder", "parts"])


@pytest.mark.slow
def test_minutes_are_the_steps_that_fitted(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "fix_max_steps", lambda run, *about: (run.arguments.with_max_steps(6), ""))
    common = {name: value for name, value in COMMON.items() if name not in ("max_steps", "warmup_steps")}
    file.write_text(yaml.safe_dump({"common": common, "runs": {"timed": {"max_minutes": 1}}}))
    main([str(file)])
    main([str(file)])
    assert "timed, seed 42 (finished before)" in capsys.readouterr().out
    final = Path("runs/norms/timed-seed-42/final")
    shutil.rmtree(final)
    main([str(file)])
    assert final.is_dir(), "it goes on where it stopped"
    file.write_text(yaml.safe_dump({"common": common, "runs": {"timed": {"max_minutes": 1, "train_batch_size": 4}}}))
    with pytest.raises(ValueError, match="whose settings are others"):
        main([str(file)])


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_first_evaluation_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump({"common": {**COMMON, "eval_steps": 6, "save_steps": 6}, "runs": {"one": None}}))
    folder = Path("runs/norms/one-seed-42")
    stop_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        main([str(file)])
    assert (folder / "final").is_dir(), "a model to write with"
    main([str(file)])
    assert "(finished before)" not in capsys.readouterr().out
    assert read_metrics(folder)[-1]["step"] == 6
    main([str(file)])
    assert "(finished before)" in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints")
    main([str(file)])
    assert "(finished before)" in capsys.readouterr().out, "somebody made room"


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(yaml.safe_dump({"common": COMMON, "runs": {"one": None}}))
    folder = Path("runs/norms/one-seed-42")

    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        stop_at(patched, 2, die)
        main([str(file)])
    assert (folder / "config.yaml").is_file() and not (folder / "checkpoints").exists()
    main([str(file)])
    assert read_metrics(folder)[-1]["step"] == 6 and (folder / "final").is_dir()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], None]) -> None:
    """Something happens to the process of a run at the end of a step."""
    advance = Monitor.advance

    def advance_or_stop(self: Monitor, done: int) -> None:
        advance(self, done)
        if done == step:
            stop()

    monkeypatch.setattr(Monitor, "advance", advance_or_stop)


def metrics_of(file: Path, folder: str) -> list[float]:
    main([str(file), "--folder", folder])
    names = ("with-seed-42", "without-seed-42")
    return [line["loss"] for name in names for line in read_metrics(Path(folder, name)) if "loss" in line]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("runs: [1, 2]", "must say under 'runs' what to train"),
        ("{", "is not valid YAML"),
        ("runs: {a: {}}\nseed: 1", "has the key 'seed'.*did you mean 'seeds'"),
        ("runs: {a: {}}\nseeds: [one]", r"seeds in .* must be a list of whole numbers, got \['one'\]"),
        ("runs: {a: 3}", "'a' in .* must hold settings and their values, got 3"),
        ("runs: {a: {output_dir: b}}", "output_dir in 'a' of .*: a sweep chooses that for each run"),
        ("runs: {a: {learning_rte: 1}}", "The run 'a' in .*: TrainingSettings has no setting 'learning_rte'"),
        ("runs: {a: {}, b: {num_processes: 2}}", "The run 'b' in .*: a sweep trains in one process"),
        ("runs:\n  a: {}\n  a: {seed: 2}", "is not valid YAML: 'a' stands there a second time .*line 3, column 3"),
        ("runs: {../../a: {}}", "The run '../../a' in .* would lie outside of 'runs/norms'"),
        ("runs: {/tmp/a: {}}", "The run '/tmp/a' in .* would lie outside of 'runs/norms'"),
        ("runs: {a: {}}\nseeds: [1, 2, 1]", "has 2 times the run a, seed 1: name each run and each seed once"),
        ("runs: {1: {}, '1': {}}", "has 2 times the run 1, seed 42"),
        ("runs: {a: {max_steps: 0}}", "The run 'a' in .*: max_steps must be at least 1, got 0"),
    ],
)
def test_what_is_no_sweep(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        main([str(file)])
    assert not Path("runs").exists()


def test_a_file_that_is_missing_and_several_processes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"There is no file 'none\.yaml'"):
        main(["none.yaml"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="A sweep trains in one process"):
        main([str(file)])
