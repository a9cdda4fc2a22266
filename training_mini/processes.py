"""
Starts a run on several processes of this machine (`--num_processes`), and ends with all of them.

`accelerate launch` and torchrun end with a traceback of their own when processes stop for Ctrl-C. Here, Ctrl-C reaches
the processes, which write a checkpoint, and this one waits. torch is not imported, because the processes do that.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

import psutil
from entry_points_mini import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_STOPPED

# Set for the processes: on CPUs they find each other over gloo, without more variables.
STARTED_BY_MINI = "MINI_PROCESSES"
# How long the others go on after a process has failed. They notice it in the next exchange, as a rule at once.
SECONDS_TO_NOTICE = 30


def check_count(count: int) -> None:
    """Raises `ValueError` if this process is one of another number of processes that were started."""
    started = int(os.environ.get("WORLD_SIZE", count))
    if started != count > 1:
        raise ValueError(f"--num_processes {count} starts processes, and {started} were started: leave it out.")


def start_processes(count: int, command: list[str]) -> int:
    """
    Runs a command in `count` processes that know each other, and returns the exit code of the first that failed, or 0.
    SIGTERM and SIGUSR1 are passed on. What the main process writes is shown, and the errors of the others that differ.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, STARTED_BY_MINI: str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (psutil.cpu_count(logical=False) or 1) // count)))
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    # A handler, and not SIG_IGN, because processes inherit that. The terminal sends Ctrl-C to them too.
    signal.signal(signal.SIGINT, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    errors: list[IO[bytes]] = []
    for rank in range(count):
        errors.append(tempfile.TemporaryFile())  # noqa: SIM115 (open until the process has ended)
        processes.append(
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else errors[rank],
            )
        )
    first = wait_for(processes)
    for process, file in zip(processes[1:], errors[1:], strict=True):
        is_known = process.returncode == processes[0].returncode == EXIT_BAD_INPUT
        if process.returncode not in (0, EXIT_INTERRUPTED, EXIT_STOPPED, -signal.SIGKILL) and not is_known:
            file.seek(0)
            sys.stderr.write(file.read().decode(errors="replace"))
    return first if first >= 0 else 128 - first  # as a shell says it of a signal


def wait_for(processes: list[subprocess.Popen]) -> int:
    """Waits for all; kills those that hang when one has failed. Returns the first exit code that is not 0."""
    first, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]):
        failed = [code for code in codes if code]
        if failed and not first:
            first = failed[0]
            if first not in (EXIT_INTERRUPTED, EXIT_STOPPED):
                deadline = time.monotonic() + SECONDS_TO_NOTICE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return first or next((process.returncode for process in processes if process.returncode), 0)
