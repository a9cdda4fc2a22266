"""
The process that `fork_server` starts: it imports what programs need, and forks for each program.

    python fork_server_process.py FOLDER DESCRIPTOR ROOT

It becomes three servers, each with a socket in FOLDER: `libraries` has imported torch, transformers and accelerate,
`torch` only what reads no variable of Hugging Face, for programs that set one, and `mini` also Mini as it is in ROOT,
for programs of Mini that import it from there. All end with the other end of DESCRIPTOR. A request is a dictionary
(`marshal`) behind its length, with the files of stdin, stdout and stderr.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import inspect
import io
import marshal
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import NoReturn

TORCH = (
    "fsspec",
    "httpx2",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "psutil",
    "regex",
    "rich.progress",
    "scipy.sparse",
    "sentencepiece",
    "tabulate",  # of what torch does at the end of a program
    "tokenizers",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",  # of bitsandbytes, and so of peft
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "yaml",
)
LIBRARIES = (
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.config.config_args",
    "datasets",
    "transformers.generation.utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
# What trainings, generation and sharing import, and nothing that says things when it is imported.
MINI = (
    "generation_mini.program",
    "modeling_mini.analysis.figures",
    "sharing_mini.pushing",
    "sharing_mini.reporting",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "training_mini.from_python",
    "training_mini.trainer",
)
TRAINERS = ("train_accelerate.py", "resume_worker.py")
PROGRAMS = (*TRAINERS, "generate.py", "push_to_hub.py")
PACKAGES = ("box_mini", "generation_mini", "modeling_mini", "sharing_mini", "training_mini")
# Variables that are read by Mini, by what is not preloaded, by shells, or when processes find each other. Any other
# might have been read when the server started. torch's compiler sets two in the process of the tests, once it is used,
# and scikit-learn, of assisted decoding, two for Intel's OpenMP (KMP_), which torch does not have on Linux. CXX is
# given where there shall be no compiler, so that torch's, which has read it, is not called.
READ_LATE = (
    "ACCELERATE_", "COLUMNS", "CUDA_VISIBLE_DEVICES", "CXX", "FSDP_", "GLOO_SOCKET_IFNAME", "GROUP_", "JPY_", "KMP_",
    "LOCAL_", "MASTER_", "MINI_", "OLDPWD", "PARALLELISM_CONFIG_", "PATH", "PS1", "PWD", "PYTEST_",
    "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHON_EXEC", "RANK", "ROLE_", "SHLVL", "SLURM_",
    "TORCHELASTIC_", "TORCHINDUCTOR_CACHE_DIR", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_NCCL_", "TRACKIO_",
    "WORLD_SIZE", "_",
)  # fmt: skip
MOST_FILES = 32  # as in forked_python.py
OF_HUGGING_FACE = ("HF_", "TRANSFORMERS_", "DATASETS_")


def is_like(environment: dict[str, str], other: dict[str, str], read_late: tuple[str, ...] = READ_LATE) -> bool:
    """Whether what was imported with one set of variables is what would be imported with the other."""
    names = environment.keys() | other.keys()
    return all(environment.get(name) == other.get(name) for name in names if not name.startswith(read_late))


def searched(request: dict) -> list[str]:
    """Where the program looks for modules before it looks where `python` is installed."""
    flags, kind = request["flags"], request["kind"]
    paths = []
    if not flags & {"I", "P"}:
        script = Path(request["cwd"], request["program"])
        paths = [{"-c": "", "-m": request["cwd"], "script": str(script.resolve().parent)}[kind]]
    if "I" not in flags and (listed := request["environment"].get("PYTHONPATH")):
        paths += [os.path.join(request["cwd"], path) for path in listed.split(os.pathsep)]
    return paths


def is_of_mini(request: dict, files: list[int], root: str) -> bool:
    """
    Whether the program is one of Mini, which imports Mini from this root. With a terminal, or another width of one, it
    needs a console that is made for it.
    """
    kind, program = request["kind"], request["program"]
    is_known = {"script": Path(program).name in PROGRAMS, "-m": program.split(".")[0] in PACKAGES, "-c": False}[kind]
    if not is_known or any(map(os.isatty, files)) or request["environment"].get("COLUMNS") != os.environ.get("COLUMNS"):
        return False
    has_mini = (path for path in searched(request) if os.path.exists(f"{path}/modeling_mini"))
    return os.path.realpath(next(has_mini, "")) == os.path.realpath(root)


def serve(address: str, life: socket.socket, can_run: Callable[[dict, list[int]], bool]) -> dict:
    """Forks for each request that it can run; returns the request in the process that shall run it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    life.sendall(b".")
    processes: dict[int, int] = {}  # by the descriptor that tells of its end
    clients: dict[int, socket.socket] = {}  # of each process
    while True:
        waiting = {client: process for process, client in clients.items()}
        ready, _, _ = select.select([life, listener, *processes, *waiting], [], [])
        if life in ready:
            for process in processes.values():
                os.kill(process, signal.SIGKILL)
            os._exit(0)
        for ended in set(ready) & set(processes):
            process = processes.pop(ended)
            os.close(ended)
            _, status = os.waitpid(process, 0)
            if client := clients.pop(process, None):
                with contextlib.suppress(OSError):
                    client.sendall(number(os.waitstatus_to_exitcode(status)))
                client.close()
        for client in set(ready) & set(waiting):
            if clients.get(waiting[client]) is client:  # whoever asked for the process is gone
                os.kill(waiting[client], signal.SIGKILL)
                clients.pop(waiting[client]).close()
        if listener in ready:
            client, _ = listener.accept()
            request, files = receive(client)
            process = 0
            if request is not None and can_run(request, files):
                process = os.fork()
                if process == 0:
                    for connection in (life, listener, client, *clients.values()):
                        connection.close()
                    for descriptor in processes:
                        os.close(descriptor)
                    take_files(files, request["descriptors"])
                    return request
                processes[os.pidfd_open(process)], clients[process] = process, client
            with contextlib.suppress(OSError):
                client.sendall(number(process))
            for descriptor in files:
                os.close(descriptor)
            if not process:
                client.close()


def take_files(files: list[int], descriptors: list[int]) -> None:
    """Gives the files these numbers. First all of them get higher ones, or one would overwrite another."""
    above = max(descriptors) + 1
    higher = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for source, target in zip(higher, descriptors, strict=True):
        os.dup2(source, target)
        os.close(source)


def number(value: int) -> bytes:
    """As `forked_python.receive_number` reads it: this file runs alone, and imports nothing from beside it."""
    return value.to_bytes(4, "little", signed=True)


def receive(client: socket.socket) -> tuple[dict | None, list[int]]:
    data, files, _, _ = socket.recv_fds(client, 65536, MOST_FILES)
    while data and len(data) < 4 + int.from_bytes(data[:4], "little"):
        more = client.recv(65536)
        if not more:
            return None, files
        data += more
    return (marshal.loads(data[4:]), files) if data else (None, files)


def become(request: dict) -> None:
    """What `python ARGUMENTS` does, with the variables and the folder of the request."""
    environment = request["environment"]
    of_server = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    random.seed()
    signal.signal(signal.SIGINT, signal.SIG_IGN if request["ignores_ctrl_c"] else signal.default_int_handler)
    sys.executable = request["executable"]
    spawn.set_executable(sys.executable)  # it remembers that of the server
    kind, program, sys.argv = request["kind"], request["program"], request["arguments"]
    sys.path[:] = [*searched(request), *(path for path in sys.path[1:] if path not in of_server)]
    if kind == "script":
        sys.argv[0] = program
        runpy.run_path(program, run_name="__main__")
    elif kind == "-m":
        sys.modules.pop(program, None)  # or it warns that somebody has imported it
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(module))


def end(code: int) -> NoReturn:
    """
    What Python does when a program ends, but for taking down every module: that would copy all of the memory that the
    process shares with the server, which takes two seconds of a core.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:  # as the one of multiprocessing's resource tracker is
                stream.flush()
    except OSError:  # a full disk
        code = 120
    os._exit(code)


def exit_code(stopped: SystemExit) -> int:
    """Of `sys.exit(...)`, which prints what is no number."""
    if stopped.code is None or isinstance(stopped.code, int):
        return stopped.code or 0
    print(stopped.code, file=sys.stderr)
    return 1


def preload(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # whoever needs it will say so
            importlib.import_module(name)


def draw() -> bytes:
    """Draws a figure: the first one of a process loads fonts and more, which takes as long as to draw one."""
    from matplotlib.figure import Figure

    figure, content = Figure(), io.BytesIO()
    figure.subplots().plot([1, 2], label="a line")
    figure.legend()
    figure.savefig(content, format="png")
    return content.getvalue()


def find_conversions() -> None:
    """Makes the table that transformers makes when a process loads its first model, in a third of a second."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def use_picture(picture: bytes) -> None:
    """
    A training writes this picture in the place of its curves: to draw them takes a third of a run of three steps. With
    PYTEST_DRAWS it draws them.
    """
    from files_mini import write_bytes
    from training_mini import monitoring, trainer

    def draw_curves(folder: Path, title: str, compressors: dict[str, float]) -> None:
        if any("bits_per_byte" in line for line in monitoring.read_metrics(folder)):
            write_bytes(folder / "curves.png", picture)

    trainer.draw_curves = draw_curves


def preload_mini(root: str) -> None:
    """Imports Mini. Its consoles are those of a program without a terminal, whatever the server has."""
    outputs = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for number, _ in outputs:
            os.dup2(nowhere.fileno(), number)
        sys.path.insert(1, root)
        preload(MINI)
        sys.path.remove(root)
        for number, original in outputs:
            os.dup2(original, number)
            os.close(original)


def main(folder: str, descriptor: int, root: str) -> None:
    life = socket.socket(fileno=descriptor)
    started_with = dict(os.environ)
    gc.disable()  # nothing of what is imported here is garbage
    preload(TORCH)
    picture = draw()
    kind, read_late = "torch", READ_LATE + OF_HUGGING_FACE
    if os.fork() == 0:
        kind, read_late = "libraries", READ_LATE
        preload(LIBRARIES)
        find_conversions()
        if os.fork() == 0:
            kind = "mini"
    # What is imported beyond this, most of it Mini, is compiled once, whatever the variables say, and nothing of it is
    # left beside the sources. All workers share it.
    sys.dont_write_bytecode, sys.pycache_prefix = False, f"{os.environ.get('MINI_CACHE', folder)}/bytecode"
    if kind == "mini":
        preload_mini(root)
    # torch asks which module a frame is of when Mini defines an operator: this looks up the files of all modules once.
    # For a file that has no module: for another, the look-up ends before that.
    inspect.getmodule(compile("", "a file without a module", "exec"))
    # What ends with the server does not end with each program: torch takes back its thousands of operators, one by one.
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    # The collector of a program leaves alone what it shares with the server, for the same reason as `end`, and looks
    # more rarely at what the program imports, which all stays.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()

    def can_run(request: dict, files: list[int]) -> bool:
        is_possible = is_like(request["environment"], started_with, read_late)
        return is_possible and (kind != "mini" or is_of_mini(request, files, root))

    request = serve(f"{folder}/{kind}", life, can_run)
    if kind == "mini" and request["program"].endswith(TRAINERS) and "PYTEST_DRAWS" not in request["environment"]:
        use_picture(picture)
    try:
        become(request)
    except SystemExit as stopped:
        end(exit_code(stopped))
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
