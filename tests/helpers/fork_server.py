"""
Starts a program of the repository in milliseconds, as a process of its own.

Most of the time of a test that runs a program went into importing torch and transformers, four seconds of a core each
time. A server, started once for each worker of pytest, has imported them, and forks for each program. It has imported
nothing of Mini, and neither peft nor bitsandbytes, which say things when they are imported: what a program imports of
those, it imports in its own process, as with plain `python`. Whoever tests the start itself asks for a fresh one.
"""

import atexit
import contextlib
import gc
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "accelerate.commands.config.config_args",
    "fsspec",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "rich.progress",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.generation.utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
IS_POSSIBLE = hasattr(os, "pidfd_open")  # on Linux
# Variables that are read by Mini, by what is not preloaded, or when processes find each other. Any other might have
# been read when the server started. torch's compiler sets two in the process of the tests, once it is used there.
READ_LATE = (
    "ACCELERATE_", "FSDP_", "LOCAL_RANK", "MASTER_", "MINI_", "PARALLELISM_CONFIG_", "PYTEST_", "RANK",
    "TORCHINDUCTOR_CACHE_DIR", "TRACKIO_", "WORLD_SIZE", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)  # fmt: skip


class Program:
    """A program that the server started: the part of `subprocess.Popen` that tests use."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], input: str | None) -> None:
        self.args, self.returncode, self._server = command, None, server()
        folder = tempfile.mkdtemp(prefix="mini-program-")
        weakref.finalize(self, shutil.rmtree, folder)
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(input or "", encoding="utf-8")
        for path in files[1:]:
            path.touch()
        self.output_files = files[1:]
        request = {"command": command, "cwd": str(cwd), "environment": environment, "files": list(map(str, files))}
        self.pid = self._server.start(request)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.exit_code_of(self.pid, timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._server.exit_code_of(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
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
    """This side of the server."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.environment = dict(os.environ)
        command = [sys.executable, __file__, str(theirs.fileno())]
        # In a session of its own: Ctrl-C is for pytest, whose end closes the channel and with it the server.
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._channel, self._lines, self._exit_codes = ours, b"", {}
        assert self._receive(timeout=None) == {"ready": True}

    def start(self, request: dict) -> int:
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive(timeout=None)
            if "started" in message:
                return message["started"]

    def exit_code_of(self, pid: int, timeout: float | None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self._exit_codes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._receive(left) is None:
                return None
        return self._exit_codes.pop(pid)

    def _receive(self, timeout: float | None) -> dict | None:
        while b"\n" not in self._lines:
            if not select.select([self._channel], [], [], timeout)[0]:
                return None
            data = self._channel.recv(65536)
            if not data:
                raise RuntimeError("The server that starts programs has ended.")
            self._lines += data
        line, self._lines = self._lines.split(b"\n", 1)
        message = json.loads(line)
        if "ended" in message:
            self._exit_codes[message["ended"]] = message["code"]
        return message


_servers: list[Server] = []


def server() -> Server:
    """The server of this worker, which ends with it."""
    if not _servers:
        _servers.append(Server())
    return _servers[0]


def can_start(environment: dict[str, str]) -> bool:
    """Whether the server was started with these variables, and forks."""
    if not IS_POSSIBLE:
        return False
    started_with = server().environment
    names = environment.keys() | started_with.keys()
    return all(environment.get(name) == started_with.get(name) for name in names if not name.startswith(READ_LATE))


def serve(descriptor: int) -> dict:
    """Forks for each request that comes over the channel; returns the request in the process that shall run it."""
    channel, waiting, children = socket.socket(fileno=descriptor), b"", {}
    channel.sendall(b'{"ready": true}\n')
    while True:
        ready, _, _ = select.select([channel, *children], [], [])
        for ended in set(ready) & set(children):
            _, status = os.waitpid(children[ended], 0)
            message = {"ended": children.pop(ended), "code": os.waitstatus_to_exitcode(status)}
            os.close(ended)
            channel.sendall(json.dumps(message).encode() + b"\n")
        if channel not in ready:
            continue
        data = channel.recv(65536)
        if not data:
            for child in children.values():
                os.kill(child, signal.SIGKILL)
            os._exit(0)
        waiting += data
        *lines, waiting = waiting.split(b"\n")
        for line in lines:
            child = os.fork()
            if child == 0:
                for open_descriptor in (*children, channel.detach()):
                    os.close(open_descriptor)
                return json.loads(line)
            children[os.pidfd_open(child)] = child
            channel.sendall(json.dumps({"started": child}).encode() + b"\n")


def become(request: dict) -> None:
    """Runs a program as `python PROGRAM ARGUMENTS` does, with its files, variables and folder."""
    for target, path in enumerate(request["files"]):
        source = os.open(path, os.O_RDWR | (os.O_APPEND if target else 0))
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed()
    program, *arguments = request["command"]
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


def end(code: int) -> NoReturn:
    """
    What Python does when a program ends, but for taking down every module: that would copy all of the memory that the
    process shares with the server, which takes two seconds of a core.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk
        code = 120
    os._exit(code)


def exit_code(stopped: SystemExit) -> int:
    """Of `sys.exit(...)`, which prints what is no number."""
    if stopped.code is None or isinstance(stopped.code, int):
        return stopped.code or 0
    print(stopped.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    # The collector of a program leaves alone what it shares with the server, for the same reason as `end`.
    gc.collect()
    gc.freeze()
    request = serve(int(sys.argv[1]))
    try:
        become(request)
    except SystemExit as stopped:
        end(exit_code(stopped))
    except Exception:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)
