"""What a run survives: kills, signals, damaged checkpoints, full disks, and gradients that are not finite."""

import json
import math
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import fork_server
from helpers.programs import ROOT, one_sentence, run_program, start_program
from helpers.runs import ENDLESS, QUICK, losses, metrics, run_on_a_full_disk, train, train_here, wait_for_steps, weights
from safetensors.torch import load_file
from training_mini.checkpoints import damage_of, states_of
from training_mini.model_folders import save_model


def run(cwd: Path, *arguments: object, kill_after: float | None = None) -> int:
    """The exit code of a trainer; minus the number of the signal if one ended it."""
    # Forked, so that the instants of a kill fall into training and saving, not into seconds of imports.
    process = fork_server.Program(
        [str(ROOT / "train_accelerate.py"), *map(str, arguments)], cwd, dict(fork_server.server().environment), None
    )
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    return process.wait(timeout=300)


KILLED = [*QUICK, "--max_steps", 200, "--save_steps", 1, "--eval_steps", 25, "--residual_dropout", 0.1]
KILLED += ["--max_eval_tokens", 1100]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody kills, and its seconds."""
    cwd = tmp_path_factory.mktemp("unbroken")
    fork_server.server()  # starts once, and its start is not the run's
    began = time.monotonic()
    assert run(cwd, *KILLED, "--output_dir", "whole") == 0
    return cwd / "whole", time.monotonic() - began


@pytest.mark.slow
@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
@pytest.mark.parametrize("async_save", ["false", "true"])
def test_fifty_kills(async_save: str, unbroken: tuple[Path, float], tmp_path: Path) -> None:
    """`kill -9` at 50 random instants of a run that saves at every step: it ends as an unbroken one, bit by bit."""
    settings = [*KILLED, "--async_save", async_save]
    whole, whole_seconds = unbroken
    generator = random.Random(0)
    parts, kills, while_saving, steps = tmp_path / "parts", 0, 0, []
    while kills < 50:
        has_state = bool(states_of(parts))
        how = ["--resume"] if has_state else [*settings, "--overwrite"]
        code = run(tmp_path, *how, "--output_dir", "parts", kill_after=generator.uniform(0.0, whole_seconds / 10))
        if code == 0:  # done before 50 kills: once more from the beginning, with other instants
            check_equal(parts, whole)
            shutil.rmtree(parts)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        states = states_of(parts)
        assert [damage_of(state) for state in states] == [""] * len(states), "what has its name is complete"
        while_saving += bool(list(parts.glob("checkpoints/.*"))) + bool(list(parts.glob(".best.*")))
        steps.append(json.loads((states[-1] / "trainer_state.json").read_text())["step"] if states else 0)
        for folder in (parts / "best", parts / ".best.previous"):
            if folder.is_dir():
                load_file(folder / "model.safetensors")
                break
    assert run(tmp_path, "--resume", "--output_dir", "parts") == 0
    check_equal(parts, whole)
    print(f"\n50 kills, {while_saving} while saving; checkpoints found at steps {steps}")
    assert while_saving >= 3 and len(set(steps)) >= 10, "the kills fell where they can hurt"


def check_equal(run: Path, whole: Path) -> None:
    for name in ("final", "best"):
        expected = weights(whole, name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(run, name).items())
    assert [(line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics(run)] == [
        (line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics(whole)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_of_schedulers_save_and_exit_with_75(number: signal.Signals, tmp_path: Path) -> None:
    process = start_program(
        "train_accelerate.py",
        *QUICK,
        "--max_steps",
        ENDLESS,
        "--output_dir",
        "run",
        cwd=tmp_path,
        fresh=number == signal.SIGTERM,
    )
    wait_for_steps(tmp_path / "run", 5, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and errors == "", errors
    step = int(output.split("Stopped at step ")[1].split(";")[0])
    assert [state.name for state in states_of(tmp_path / "run")] == [f"step_{step}"]


@pytest.mark.slow
def test_two_processes_never_train_into_one_folder(tmp_path: Path) -> None:
    settings = [*QUICK, "--max_steps", ENDLESS, "--save_steps", 5, "--output_dir", "run"]
    first = start_program("train_accelerate.py", *settings, cwd=tmp_path)
    wait_for_steps(tmp_path / "run", 6, first)
    first.send_signal(signal.SIGSTOP)  # it holds the folder, and leaves the processor to the others
    for how in (["--resume", "--output_dir", "run"], settings, [*settings, "--overwrite"]):
        sentence = one_sentence(run_program("train_accelerate.py", *how, cwd=tmp_path))
        if "--resume" in how or "--overwrite" in how:
            assert f"rocess {first.pid} on {socket.gethostname()} trains into 'run' at this moment" in sentence
    assert first.poll() is None, "the first is left in peace"
    # Killed, it leaves the file of its lock, and is in nobody's way.
    first.kill()
    first.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    step = len(losses(tmp_path / "run")) + 3
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "run", "--max_steps", step, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, step + 1))
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    settings = [*QUICK, "--max_steps", 30, "--output_dir", "run"]
    processes = [start_program("train_accelerate.py", *settings, cwd=tmp_path) for _ in range(2)]
    ended = [subprocess.CompletedProcess(p.args, None, *p.communicate(timeout=300)) for p in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], ended
    refused = ended[codes.index(2)].stderr
    assert "trains into 'run' at this moment" in refused or "There is a run in 'run' already" in refused
    assert len(losses(tmp_path / "run")) == 30


@pytest.mark.slow
def test_signal_inside_evaluation(tmp_path: Path) -> None:
    """It does not wait for the end of an evaluation, which the resumed run makes up for."""
    # One step, then an evaluation of a hundred thousand windows, which would take minutes.
    (tmp_path / "text.txt").write_text("0123456789 abcdef " * 400_000)
    arguments = [value if value != "sample" else "text.txt" for value in QUICK]
    arguments += "--validation_ratio 0.9 --eval_steps 3 --max_eval_tokens 0 --output_dir run --max_steps 6".split()
    process = start_program("train_accelerate.py", *arguments, cwd=tmp_path)
    wait_for_steps(tmp_path / "run", 3, process)
    time.sleep(1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 75 and "Stopped at step 3;" in output, errors
    assert time.monotonic() - asked < 20
    assert not any("eval_loss" in line for line in metrics(tmp_path / "run"))
    result = run_program(
        "train_accelerate.py", "--resume", "--output_dir", "run", "--max_eval_tokens", 5000, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == [3, 6]


def copy_of(quick_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quick_run, tmp_path / "run"))


def damage(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer_state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_damaged_checkpoint_is_recognised(name: str, how: str, quick_run: Path, tmp_path: Path) -> None:
    state = copy_of(quick_run, tmp_path) / "checkpoints" / "step_40"
    assert damage_of(state) == ""
    damage(state / name) if how == "changed" else (state / name).unlink()
    assert damage_of(state)


@pytest.mark.slow
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(quick_run: Path, tmp_path: Path) -> None:
    run = copy_of(quick_run, tmp_path)
    damage(run / "checkpoints" / "step_40" / "__0_0.distcp")
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 0 and "Resuming at step 20" in result.stdout
    warning = "checkpoints/step_40 is damaged (__0_0.distcp does not match its checksum); going back to the checkpoint"
    assert result.stderr.count("warning: ") == 1 and warning in result.stderr
    assert all(torch.equal(tensor, weights(quick_run)[name]) for name, tensor in weights(run).items())
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step_20", "step_40", "step_40.damaged"}


def test_nothing_but_damaged_checkpoints_is_a_sentence(quick_run: Path, tmp_path: Path) -> None:
    run = copy_of(quick_run, tmp_path)
    for step in (20, 40):
        damage(run / "checkpoints" / f"step_{step}" / "__0_0.distcp")
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "run", cwd=tmp_path)
    assert "Every checkpoint in 'run' is damaged" in one_sentence(result)


@pytest.mark.slow
def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    settings = "--max_steps 11 --save_steps 1 --keep_last 3 --keep_every 4 --output_dir run".split()
    assert train(tmp_path, *settings).returncode == 0
    assert [state.name for state in states_of(tmp_path / "run")] == [f"step_{n}" for n in (4, 8, 9, 10, 11)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_full_disk_can_be_survived(tmp_path: Path) -> None:
    assert train(tmp_path, "--max_steps", 4, "--save_steps", 4, "--output_dir", "run").returncode == 0
    result = run_on_a_full_disk(
        tmp_path, "--resume", "--output_dir", "run", "--max_steps", 12, "--save_steps", 2, "--eval_steps", 100,
        "--on_save_error", "continue",
    )  # fmt: skip
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: run/")]
    assert len(warnings) == 5, result.stderr  # steps 6, 8, 10, the best model, and step 12
    assert "step_6 could not be written (a file was cut short: the disk is full" in warnings[0]
    assert "best could not be written" in warnings[3] and "Training goes on" in warnings[3]
    assert len(losses(tmp_path / "run")) == 12, "it trained to the end"
    assert "final could not be written" in one_sentence(result), "the model itself must be"
    assert [state.name for state in states_of(tmp_path / "run")] == ["step_4"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written fills the disk"


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = train_here(tmp_path / "run", "--max_steps", 12, "--logging_steps", 2, bad_steps=range(3, 7))
    assert result.evaluation is not None and math.isfinite(result.evaluation.loss)
    assert result.run.state.skipped_steps == 4 and result.run.state.skipped_since is None
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if "eval_loss" not in line}
    assert "skipped_steps" not in lines[2] and lines[4]["skipped_steps"] == 2 and lines[12]["skipped_steps"] == 4
    assert "loss" not in lines[4] and "loss" not in lines[6] and math.isfinite(lines[8]["loss"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert capsys.readouterr().err.count("warning: Step 3 is skipped") == 1


@pytest.mark.slow
def test_many_such_steps_in_a_row_stop_the_run_and_say_what_is_sound(tmp_path: Path) -> None:
    settings = ("--max_steps", 40, "--save_steps", 4, "--max_skipped_steps", 5)
    with pytest.raises(ValueError) as error:
        train_here(tmp_path / "run", *settings, bad_steps=range(7, 100))
    assert "The gradients of 5 steps in a row, from step 7 on, are not finite" in str(error.value)
    assert "the checkpoint of step 4 is sound" in str(error.value)
    with pytest.raises(ValueError, match="there is no checkpoint from before; start anew"):
        train_here(tmp_path / "early", *settings, bad_steps=range(2, 100))


@pytest.mark.slow
def test_skipped_steps_are_remembered_over_a_resume(tmp_path: Path) -> None:
    settings = ("--save_steps", 4, "--max_skipped_steps", 5)
    train_here(tmp_path / "run", "--max_steps", 8, *settings, bad_steps=range(7, 100))
    with pytest.raises(ValueError, match="of 5 steps in a row, from step 7 on"):
        train_here(tmp_path / "run", "--resume", "--max_steps", 40, *settings, bad_steps=range(7, 100))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--save_steps", 1), ("--ema_decay", 0.5), ("--eval_steps", 2)], ids=str)
def test_a_run_that_left_the_finite_numbers_writes_no_model(flags: tuple[object, ...], tmp_path: Path) -> None:
    # With Muon, or with RMSNorm and QK-norm, even such a run stays finite.
    shape = ("--norm_type", "layernorm", "--qk_norm", "false")
    settings = (*shape, "--optimizer", "adamw", "--learning_rate", 1e6, "--max_steps", 4, "--warmup_steps", 0)
    with pytest.raises(ValueError) as error:
        train_here(tmp_path / "run", *settings, *flags)
    assert re.match(r"After step \d the (validation loss is nan|weights are not finite)", str(error.value)), error.value
    assert "a lower --learning_rate" in str(error.value)
    assert not (tmp_path / "run" / "final").exists()
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "final", "merged"])
def test_no_folder_has_weights_that_are_not_finite(name: str, tmp_path: Path) -> None:
    """Whatever made them so."""
    trainer, result = train_here(tmp_path / "run", "--max_steps", 3)
    before = weights(tmp_path / "run")
    with torch.no_grad():
        trainer.run.unwrapped_model.model.layers[1].mlp.up_proj.weight[3, 4] = math.inf
    trainer.state.step += 1
    with pytest.raises(
        ValueError, match=r"^After step 4 the weights are not finite \(\S*up_proj.weight\); the checkpoint"
    ):
        save_model(trainer.run, name, result.evaluation)
    with pytest.raises(ValueError, match=r"the checkpoint of step 3 is sound: go on from it with --resume"):
        trainer.saving.save()
    assert [state.name for state in states_of(tmp_path / "run")] == ["step_3"]
    assert not (tmp_path / "run" / "merged").exists()
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(tmp_path / "run").items())
