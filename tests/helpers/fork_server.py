"""
Starts a program of the repository in milliseconds, as a process of its own.

Most of the time of a test that runs a program went into importing torch and transformers, four seconds of a core each
time. A server, started once for each worker of pytest, has imported them, and forks for each program: a program of Mini
from a process that has imported Mini as well, from the folder where the program would find it, and any other from one
that has imported nothing of Mini. None has imported peft or bitsandbytes, which say things when they are imported: what
a program imports of those, it imports in its own process, as with plain `python`. Whoever tests the start itself asks
for a fresh one.

`python()` is an interpreter that does the same, for commands that a shell or another program starts.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from helpers import forked_python
from helpers.fork_server_process import OF_HUGGING_FACE, READ_LATE, is_like

IS_POSSIBLE = hasattr(os, "pidfd_open")  # on Linux


class Program:
    """A program that the server started: the part of `subprocess.Popen` that tests use. It ends with this object."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], input: str | None) -> None:
        self.args, self.returncode = command, None
        folder = tempfile.mkdtemp(prefix="mini-program-")
        weakref.finalize(self, shutil.rmtree, folder)
        stdin, *self.output_files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        stdin.write_text(input or "", encoding="utf-8")
        request = {"flags": set(), "kind": "script", "program": command[0], "arguments": command} | {
            "cwd": str(cwd), "environment": environment, "executable": str(server().executable),
            "ignores_ctrl_c": signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "descriptors": [0, 1, 2],
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(stdin, "rb"))]
            files += [stack.enter_context(open(path, "ab")) for path in self.output_files]
            started = forked_python.start(server().folder, request, [file.fileno() for file in files])
        if started is None:
            raise ValueError("A process with these variables is not forked: see can_start.")
        self._connection, self.pid = started

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = forked_python.receive_number(self._connection)
            assert self.returncode is not None, "the server that starts programs has ended"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(path.read_text(encoding="utf-8") for path in self.output_files)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """
    This side of the server.

    Attributes:
        folder: of its sockets.
        executable: the interpreter whose programs it forks; it is called `python`, in a folder of its own.
    """

    def __init__(self, python: str, environment: dict[str, str], root: Path) -> None:
        self.environment = environment
        self.folder = tempfile.mkdtemp(prefix="mini-server-")
        weakref.finalize(self, shutil.rmtree, self.folder)
        self.executable = Path(self.folder, "bin", "python")
        self.executable.parent.mkdir()
        stub = f'{python} -I -S {forked_python.__file__} {self.folder} {self.executable} {python} "$@"'
        self.executable.write_text(f"#!/bin/sh\nexec {stub}\n")
        self.executable.chmod(0o755)
        self._life, theirs = socket.socketpair()
        program = Path(__file__).with_name("fork_server_process.py")
        command = [python, str(program), self.folder, str(theirs.fileno()), str(root)]
        # In a session of its own: Ctrl-C is for pytest, whose end closes the channel and with it the server.
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        ready = b""
        while len(ready) < 3:  # servers
            message = self._life.recv(3)
            assert message, "the server that starts programs has ended"
            ready += message

    def close(self) -> None:
        """Ends it, and what it has started."""
        self._life.close()
        self.process.wait()


# Of the server: conftest.py sets it, when everything is imported and no test has changed anything.
environment: dict[str, str] = {}
_servers: list[Server] = []


def server() -> Server:
    """The server of this worker, which ends with it."""
    if not _servers:
        assert environment, "a test module must not start programs while it is imported"
        _servers.append(Server(sys.executable, dict(environment), Path(__file__).parents[2]))
    return _servers[0]


def python() -> str:
    """An interpreter whose programs start in milliseconds, where that is possible."""
    return str(server().executable) if IS_POSSIBLE else sys.executable


def can_start(variables: dict[str, str]) -> bool:
    """Whether the server was started with these variables, and forks."""
    return IS_POSSIBLE and are_of_server(variables, server().environment)


def are_of_server(variables: dict[str, str], of_server: dict[str, str]) -> bool:
    """Whether programs with these variables can be forked by a server that has those."""
    return is_like(variables, of_server, READ_LATE + OF_HUGGING_FACE)
