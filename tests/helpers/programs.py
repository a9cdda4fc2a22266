"""Runs the programs of the repository as a user does, and reads what they say."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import fork_server

ROOT = Path(__file__).parents[2]
# Without the first, pip compiles every module that it installs, where a program compiles those that it imports. (This
# option of pip is turned on by a "no".) With the second these are kept, whatever the variables of the tests say.
INSTALLING = {"PIP_NO_COMPILE": "no", "PYTHONDONTWRITEBYTECODE": ""}


def start_program(
    name: str, *arguments: object, cwd: Path, input: str | None = None, fresh: bool = False, **environment: str
) -> subprocess.Popen | fork_server.Program:
    """
    Starts a program of the repository root as plain `python` does, in a process of its own and in a folder of the test;
    `fresh` with an interpreter of its own too, which takes seconds to import torch and transformers.
    """
    command = [str(ROOT / name), *map(str, arguments)]
    whole_environment = {**os.environ, **environment}
    if not fresh and fork_server.can_start(whole_environment):
        return fork_server.Program(command, cwd, whole_environment, input)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=whole_environment,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if input is not None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write(input)
            process.stdin.close()
        process.stdin = None
    return process


def run_program(name: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess:
    """`start_program`, and waits for its end."""
    process = start_program(name, *arguments, **settings)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def one_sentence_of(returncode: int, errors: str) -> str:
    """The error of a program, after checking that it is one line, without a traceback, with exit code 2."""
    assert returncode == 2, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.strip().splitlines()[-1] == lines[0], errors
    return lines[0].removeprefix("error: ")


def one_sentence(result: subprocess.CompletedProcess) -> str:
    return one_sentence_of(result.returncode, result.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
