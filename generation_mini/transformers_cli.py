"""
The `transformers` command with Mini in it: `mini-transformers serve CHECKPOINT` is a server of OpenAI's protocol, and
`mini-transformers chat CHECKPOINT` talks to one.

The server looks the class of a checkpoint up in the module `transformers`, where no custom class is. This program puts
it there, and `serving.py` adds to the server; all else is the stock command, with its flags.
"""

import sys
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import modeling_mini
import transformers
from entry_points_mini import one_sentence_errors
from files_mini import BOX
from huggingface_hub.constants import HF_HUB_CACHE
from modeling_mini.loading.checkpoints import find_checkpoint
from transformers.utils.import_utils import is_serve_available

DEFAULT_SERVER = "http://localhost:8000"  # of transformers' commands


def main() -> None:
    with one_sentence_errors():
        check(sys.argv[1:])
        try:
            # Before the class is put there: importing the command fills the module anew.
            from transformers.cli.transformers import main as transformers_main

            transformers.MiniForCausalLM = modeling_mini.MiniForCausalLM
            if is_serve_available():
                from . import serving

                serving.install()
            Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # without it, the server's list of models is an error
            transformers_main()
        except ImportError as error:  # a package that only this command needs; the sentence says which
            raise ValueError(str(error)) from error


def check(argv: list[str]) -> None:
    """
    Raises:
        ValueError: if `serve` is given a folder without a model, or `chat` a server that is not there.
    """
    command, name, *others = [*argv, ""] if len(argv) == 1 else argv or ["", ""]
    if command == "serve" and (name in BOX or Path(name).is_dir()):
        find_checkpoint(name)
    if command == "chat" and name and "--help" not in argv:
        server = others[0] if others and others[0].startswith("http") else DEFAULT_SERVER
        try:
            httpx2.get(urljoin(server, "/health"))
        except httpx2.TransportError:
            raise ValueError(
                f"No server answers at {server}: start it in another terminal by `mini-transformers serve {name}`, and "
                f"wait until it says that it runs."
            ) from None


if __name__ == "__main__":
    main()
