"""Runs that come back by themselves: under torchrun, under Slurm, and when a process of them hangs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import fork_server
from helpers.programs import ROOT, free_port, start_program
from helpers.runs import ON_CPU, QUICK, forked, losses, metrics, train_here, wait_for_steps
from training_mini.arguments import after_restart, parse_arguments
from training_mini.checkpoints import states_of


def test_what_a_restart_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    argv = [*QUICK, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(folder)]
    again = lambda *more: after_restart(parse_arguments([*argv, *more]), [*argv, *more]).run  # noqa: E731
    train_here(folder, *argv[len(QUICK) : -2])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not again().resume, "the first start is refused: there is a run already"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert again().resume and again("--overwrite").resume, "what it has written itself is not replaced"
    other = again("--seed", "7")
    assert not (other.resume or other.overwrite), "the run in the folder is another one"
    for state in states_of(folder):
        state.rename(state.with_name(f".{state.name}.partial"))
    assert again().overwrite and not again().resume, "killed before its first checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["--standalone", "--master_port"])
def test_a_killed_worker_brings_all_back_from_the_newest_checkpoint(rendezvous: str, tmp_path: Path) -> None:
    forked("cpu.yaml", tmp_path, *QUICK, "--max_steps", 60, "--output_dir", "whole")  # on two processes too
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "2"]
    torchrun += [rendezvous, *([str(free_port())] if rendezvous == "--master_port" else [])]
    torchrun += [str(ROOT / "train_accelerate.py")]
    process = subprocess.Popen(
        [*torchrun, *QUICK, "--max_steps", "60", "--save_steps", "10", "--output_dir", "run"],
        cwd=tmp_path, env={**os.environ, **ON_CPU, "PYTHON_EXEC": fork_server.python()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_steps(tmp_path / "run", 15, process, seconds=300)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    workers[0].kill()
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert "Resuming at step" in output and "Trained 60 steps" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_time_that_was_given(tmp_path: Path) -> None:
    environment = {**ON_CPU, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = (*QUICK, "--max_steps", 100_000, "--ddp_timeout", 15, "--output_dir", "run")
    first, second = (
        start_program("train_accelerate.py", *settings, cwd=tmp_path, **environment, RANK=rank, LOCAL_RANK=rank)
        for rank in "01"
    )
    wait_for_steps(tmp_path / "run", 3, first)
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        assert first.wait(timeout=120) not in (0, None)
        assert 10 < time.monotonic() - stopped < 60
    finally:
        second.kill()
        first.kill()
        second.wait()


SRUN = """#!{python}
# Stands for srun: starts the processes of the job with the variables that Slurm sets, and passes a signal on to them.
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:] if argument != "--kill-on-bad-exit=1"]
processes = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [process.send_signal(signal.SIGUSR1) for process in processes])
sys.exit(max(process.wait() for process in processes))
"""
SCONTROL = """#!/bin/bash
# Stands for scontrol.
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> requeued; fi
"""


@pytest.mark.slow
def test_the_script_for_slurm_by_a_stand_in(tmp_path: Path) -> None:
    """Asked to stop, the job writes a checkpoint and is queued again; begun again, it goes on."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    python = f'#!/bin/bash\nexec {shlex.quote(fork_server.python())} {shlex.quote(str(ROOT))}/"$@"\n'
    (binaries / "python").write_text(python)  # the program lies in the repository, and the job runs elsewhere
    (binaries / "python").chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "17"}
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **ON_CPU, **slurm, "MASTER_PORT": str(free_port()), "PATH": path}
    script = ["bash", str(ROOT / "configs" / "slurm" / "train.sh"), "run", *QUICK, "--max_steps"]

    def job(steps: int) -> subprocess.Popen:
        return subprocess.Popen(
            [*script, str(steps)], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    first = job(100_000)
    wait_for_steps(tmp_path / "run", 5, first, seconds=300)
    srun = next(child for child in psutil.Process(first.pid).children() if "srun" in " ".join(child.cmdline()))
    srun.send_signal(signal.SIGUSR1)
    output, errors = first.communicate(timeout=300)
    assert first.returncode == 75 and "2 x cpu" in output, errors
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    (state,) = states_of(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    step = int(state.name.removeprefix("step_")) + 3
    config.write_text(config.read_text().replace("max_steps: 100000", f"max_steps: {step}"))
    second = job(100_000)
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0 and "Resuming at step" in output, errors
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, step + 1))
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "a job that is done is not queued again"
