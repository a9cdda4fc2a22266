"""
A page on which one understands a model: `python -m generation_mini.demo --model runs/NAME`.

The text appears as it is written, each character in the colour of how unsure the model was before it, or how much it
was surprised by what it then drew. Choosing a character shows what else was likely, goes on from there with another,
and shows where the model looked and what each of its layers would have said.

    page.*      the page itself: modeling_mini/web, which an ONNX export has too
    writer.js   connects the page with the server
    server.py   answers the page
    writing.py  writes a text, token by token, with what the model thought of each
    inside.py   what happens within the model before one token
"""

import errno
import socket
import sys

from entry_points_mini import ArgumentParser, one_sentence_errors, without_garbage_collection
from files_mini import find_checkpoint

from .arguments import DemoArguments


def listen(host: str, port: int) -> socket.socket:
    """
    A socket that listens at an address. Whoever opens the page while the model is loaded waits for the answer.

    Raises:
        ValueError: if another program has the port, or this machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        held.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is taken by another program: choose another one by --port.") from None
        raise ValueError(f"The page cannot be at host {host!r} and port {port} ({error.strerror}).") from None
    return held


def main() -> None:
    with one_sentence_errors():
        (arguments,) = ArgumentParser(DemoArguments, description="A page to try a model.").parse(sys.argv[1:])
        # What is wrong shows before torch is imported and a model is loaded.
        if arguments.model is not None or arguments.adapter is None:
            find_checkpoint(arguments.model)
        held = listen(arguments.host, arguments.port)
        try:
            import starlette  # noqa: F401  (only whether it is there)
            import uvicorn  # noqa: F401  (likewise)
        except ImportError as error:
            raise ValueError(f"The page needs {error.name}: pip install starlette uvicorn.") from None
        with without_garbage_collection():
            from .server import serve

        serve(arguments, held)
