"""
A `python` that starts in milliseconds: it asks a server for a process, and stands for it until it ends.

    python -I -S forked_python.py FOLDER_OF_SERVER EXECUTABLE PYTHON [ARGUMENT...]

EXECUTABLE is the script that starts this one, PYTHON the interpreter, which runs the program itself where the server
may not: when it was started with other variables, or when there are arguments that only it knows.
"""

import contextlib
import marshal
import os
import signal
import socket
import sys

FLAGS = {"-B": "B", "-I": "I", "-P": "P", "-u": "u"}
NUMBER = 4  # bytes, of what the server sends
MOST_FILES = 32  # that the server takes
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def parse(arguments: list[str]) -> dict | None:
    """What to run, in the words of a request, or `None` if it is nothing that the server knows."""
    flags = set()
    while arguments and arguments[0] in FLAGS:
        flags.add(FLAGS[arguments[0]])
        arguments = arguments[1:]
    if arguments and arguments[0] in ("-c", "-m") and len(arguments) > 1:
        kind, program, rest = arguments[0], arguments[1], arguments[2:]
    elif arguments and not arguments[0].startswith("-") and os.path.isfile(arguments[0]):
        kind, program, rest = "script", arguments[0], arguments[1:]
    else:
        return None
    return {"flags": flags, "kind": kind, "program": program, "arguments": ["", *rest]}


def start(folder: str, request: dict, files: list[int]) -> tuple[socket.socket, int] | None:
    """
    A process of the server that may start it, and the connection over which its exit code comes. It has the files under
    the numbers that `descriptors` in the request gives.
    """
    data = marshal.dumps(request)
    for server in ("mini", "libraries", "torch"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{folder}/{server}")
        socket.send_fds(connection, [len(data).to_bytes(4, "little")], files)
        connection.sendall(data)
        if process := receive_number(connection):
            return connection, process
        connection.close()
    return None


def receive_number(connection: socket.socket) -> int | None:
    """
    The next number that the server sent, or `None` where it closed the connection. Of a process that ends at once, its
    id and its exit code lie here together.
    """
    data = connection.recv(NUMBER)
    return int.from_bytes(data, "little", signed=True) if data else None


def open_files() -> list[int]:
    """Those that the program would inherit."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.get_inheritable(int(name)):
                descriptors.append(int(name))
    return sorted(descriptors)


def main() -> None:
    folder, executable, python, *arguments = sys.argv[1:]
    request = parse(arguments)
    started = None
    files = open_files()
    if request is not None and {0, 1, 2} <= set(files) and len(files) <= MOST_FILES:
        request |= {"cwd": os.getcwd(), "environment": dict(os.environ), "executable": executable}
        request["ignores_ctrl_c"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        request["descriptors"] = files
        with contextlib.suppress(OSError):
            started = start(folder, request, files)
    if started is None:
        os.execv(python, [python, *arguments])
    connection, process = started
    for descriptor in files:  # whoever reads from the program waits until all ends are closed
        if descriptor > 2:
            os.close(descriptor)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(process, number))
    code = receive_number(connection)
    if code is None:
        sys.exit("The server that starts programs has ended.")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
