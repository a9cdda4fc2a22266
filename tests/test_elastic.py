"""Runs that come back by themselves: under torchrun, under Slurm, and when a process of them hangs."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import fork_server
from helpers.programs import ROOT, free_port, start_program
from helpers.runs import ON_CPU, QUICK, environments_of, forked, losses, metrics, train, train_here, wait_for_steps
from training_mini.arguments import RunArguments, after_restart, parse_arguments
from training_mini.checkpoints import states_of
from training_mini.launch import check_launch


@pytest.mark.slow
def test_what_a_restart_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    argv = [*QUICK, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(folder)]

    def again(*more: str) -> RunArguments:
        return after_restart(parse_arguments([*argv, *more]), [*argv, *more]).run

    train_here(folder, *argv[len(QUICK) : -2])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not again().resume, "the first start is refused: there is a run already"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert again().resume and again("--overwrite").resume, "what it has written itself is not replaced"
    other = again("--seed", "7")
    assert not (other.resume or other.overwrite), "the run in the folder is another one"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # of a torchrun that joins others on another machine
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert not again().resume, "there are no restarts"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert again().resume
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        check_launch()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_launch()
    for state in states_of(folder):
        state.rename(state.with_name(f".{state.name}.partial"))
    assert again().overwrite and not again().resume, "killed before its first checkpoint"


@pytest.mark.slow
def test_a_restart_says_that_it_does_not_overwrite_a_run_of_its_own_settings(tmp_path: Path) -> None:
    """The process that writes it again would lose what the start before it has learned."""
    flags = ["--max_steps", 4, "--save_steps", 2, "--output_dir", "run"]
    assert train(tmp_path, *flags).returncode == 0
    (tmp_path / "run" / "note").touch()
    again = train(tmp_path, *flags, "--overwrite", TORCHELASTIC_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert "The run in 'run' has the same settings and goes on: where torchrun restarts" in again.stdout
    assert (tmp_path / "run" / "note").exists() and "Resuming at step 4" in again.stdout
    other = train(tmp_path, *flags, "--overwrite", "--seed", 7, TORCHELASTIC_RESTART_COUNT="1")
    assert other.returncode == 0 and "goes on" not in other.stdout and "Resuming" not in other.stdout
    assert not (tmp_path / "run" / "note").exists()


ON_MACHINE = "tests/helpers/on_machine.py"


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["--standalone", "--master_port"])
def test_a_killed_worker_brings_all_back_from_the_newest_checkpoint(rendezvous: str, tmp_path: Path) -> None:
    forked("cpu.yaml", tmp_path, *QUICK, "--max_steps", 60, "--output_dir", "whole")  # on two processes too
    flags = ["--nproc_per_node", 2, "--max_restarts", 2, rendezvous]
    flags += [free_port()] if rendezvous == "--master_port" else []
    training = [ROOT / "train_accelerate.py", *QUICK, "--max_steps", 60, "--save_steps", 10, "--output_dir", "run"]
    process = start_program(ON_MACHINE, "", "torchrun", *flags, *training, cwd=tmp_path, **ON_CPU)
    wait_for_steps(tmp_path / "run", 15, process, seconds=300)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    workers[0].kill()
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert "Resuming at step" in output and "Trained 60 steps" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


ADDRESSES = ("10.213.7.1", "10.213.7.2")


def two_networks(names: list[str]) -> None:
    """Makes two network namespaces with a cable between them, whose ends are called as they are."""
    commands = [f"ip netns add {name}" for name in names]
    commands.append("ip link add {0} netns {0} type veth peer name {1} netns {1}".format(*names))
    for name, address in zip(names, ADDRESSES, strict=True):
        commands += [f"ip -n {name} addr add {address}/24 dev {name}", f"ip -n {name} link set {name} up"]
        commands.append(f"ip -n {name} link set lo up")
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str, str]]]:
    """
    Two machines: the network namespace of each, its address, and its network interface. Where this process may not make
    namespaces, they are two names for this machine.
    """
    names = [f"mini{os.getpid()}n{rank}" for rank in (0, 1)]
    try:
        two_networks(names)
        found = [(name, address, name) for name, address in zip(names, ADDRESSES, strict=True)]
    except (OSError, subprocess.CalledProcessError):
        found = [("", "127.0.0.1", "lo")] * 2
    yield found
    for name in names if shutil.which("ip") else []:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "goes_on"), [("1:2", "1 x cpu"), ("2", "2 x cpu")])
def test_a_machine_of_two_is_killed(nodes: str, goes_on: str, machines: list, tmp_path: Path) -> None:
    """With `--nnodes 1:2` the other one goes on alone; with 2 it waits until the killed one is started again."""
    # One process and two round differently, and a small rate does not let that grow.
    training = [*QUICK, "--max_steps", 60, "--learning_rate", 0.005]
    forked(None, tmp_path, *training, "--output_dir", "whole")
    keep_alive = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=4"
    flags = f"--nnodes {nodes} --nproc_per_node 1 --max_restarts 2 --rdzv_backend c10d --rdzv_id mini --rdzv_conf"
    settings = [ROOT / "train_accelerate.py", *training, "--save_steps", 10, "--output_dir", "run"]
    port, processes = free_port(), []

    def start(rank: int) -> subprocess.Popen | fork_server.Program:
        namespace, address, interface = machines[rank]
        torchrun = ["torchrun", *flags.split(), f"{keep_alive},is_host={rank == 0}"]
        torchrun += ["--rdzv_endpoint", f"{machines[0][1]}:{port}", "--local_addr", address]
        command = [ON_MACHINE, namespace, *torchrun, ROOT / ON_MACHINE, namespace, *settings]
        variables = {**ON_CPU, "GLOO_SOCKET_IFNAME": interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        process = start_program(*command, cwd=tmp_path, **variables)
        processes.append(process)
        return process

    try:
        first, second = start(0), start(1)
        wait_for_steps(tmp_path / "run", 15, second, seconds=300)
        workers = psutil.Process(second.pid).children(recursive=True)
        for process in [psutil.Process(second.pid), *workers]:
            process.kill()
        if nodes == "2":
            start(1)
        assert first.wait(timeout=400) == 0, first.communicate()
        assert all(process.wait(timeout=60) == 0 for process in processes[2:])
    finally:
        for process in processes:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()
    said = "".join(output for process in processes for output in process.communicate(timeout=60))
    assert re.search(rf"Resuming at step \d+: .* {goes_on}", said), said
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_hsdp.yaml"])
def test_a_process_that_hangs_ends_the_run_after_the_time_that_was_given(config: str, tmp_path: Path) -> None:
    settings = (*QUICK, "--max_steps", 100_000, "--ddp_timeout", 9, "--output_dir", "run")
    processes = [
        start_program("train_accelerate.py", *settings, cwd=tmp_path, **environment)
        for environment in environments_of(config)
    ]
    first, second, *_ = processes
    wait_for_steps(tmp_path / "run", 3, first)
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        assert first.wait(timeout=120) not in (0, None)
        assert 6 < time.monotonic() - stopped < 54
    finally:
        for process in processes:
            process.kill()
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


@pytest.mark.parametrize(
    ("there", "restarts", "flags"),
    [
        ([], "", ["--size", "tiny"]),
        (["config.yaml", "checkpoints/step_2"], "", ["--resume"]),
        (["config.yaml", "checkpoints/step_2"], "1", ["--resume"]),
        (["config.yaml"], "1", ["--size", "tiny", "--overwrite"]),
        # A run whose checkpoints were removed to make room, say: only the job that began a run may replace it.
        (["config.yaml", "final"], "", ["--size", "tiny"]),
    ],
)
def test_the_script_for_slurm_replaces_no_run_that_another_job_began(
    there: list[str], restarts: str, flags: list[str], tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / "run" / name).mkdir(parents=True)
    for name, text in (("srun", '#!/bin/bash\nprintf "%s\\n" "$@"\n'), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_RESTART_COUNT": restarts}
    script = ["bash", str(ROOT / "configs" / "slurm" / "train.sh"), "run", "--size", "tiny"]
    result = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[lines.index("mini") + 1 :] == [*flags, "--output_dir", "run"]


@pytest.mark.slow
def test_the_script_for_slurm_by_a_stand_in(tmp_path: Path) -> None:
    """Asked to stop, the job writes a checkpoint and is queued again; begun again, it goes on."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    python = f'#!/bin/bash\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(fork_server.python())} "$@"\n'
    (binaries / "python").write_text(python)  # as if Mini were installed: the job runs elsewhere
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
