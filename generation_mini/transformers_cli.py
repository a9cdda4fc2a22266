"""
The `transformers` command with Mini in it: `mini-transformers serve CHECKPOINT` is a server of OpenAI's protocol, and
`mini-transformers chat CHECKPOINT` talks to one.

The server looks the class of a checkpoint up in the module `transformers`, where no custom class is. This program puts
it there, and `serving/` adds to the server; all else is the stock command, with its flags.
"""

import sys
from pathlib import Path
from urllib.parse import urljoin

from entry_points_mini import one_sentence_errors, without_garbage_collection
from files_mini import BOX, find_checkpoint
from shape_mini import nearest_name

PROGRAM = "mini-transformers"
DEFAULT_SERVER = "http://localhost:8000"  # of transformers' commands
# The stock command loads torch before it prints this list, which takes seconds.
COMMANDS = {
    "serve": "A server of OpenAI's protocol for one or more checkpoints.",
    "chat": "A conversation with a server.",
    "download": "Download a model and its tokenizer from the Hub.",
    "env": "What is installed here, for a report of a bug.",
    "version": "The version of transformers.",
    "add-new-model-like": "The files of a new model, for developers of transformers.",
}


def main() -> None:
    with one_sentence_errors():
        run(sys.argv[1:])


def run(argv: list[str]) -> None:
    """
    Does one command.

    Raises:
        ValueError: for wrong input that can be seen before torch is loaded, or if a package is missing.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {name:20} {description}" for name, description in COMMANDS.items())
        print(f"usage: {PROGRAM} COMMAND ...\n", *lines, f"\n{PROGRAM} COMMAND --help lists the flags.", sep="\n")
        return
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        hint = nearest_name(argv[0], list(COMMANDS)) or "."
        raise ValueError(f"There is no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}{hint}")
    check(argv)
    try:
        with without_garbage_collection():
            needs_model = "--help" not in argv
            if needs_model:
                import modeling_mini  # noqa: F401  (before the command, which keeps the module `transformers` it finds)
            from transformers.cli.transformers import main as transformers_main

            if needs_model:
                add_mini()
        transformers_main()
    except ImportError as error:  # a package that only this command needs; the sentence says which
        raise ValueError(str(error)) from error


def add_mini() -> None:
    """
    Puts Mini where the server of transformers looks for it. Not before its command is imported, which fills the module
    `transformers` anew.
    """
    import modeling_mini
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.utils.import_utils import is_serve_available

    transformers.MiniForCausalLM = modeling_mini.MiniForCausalLM
    if is_serve_available():
        from .serving.server import install

        install()
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # without it, the server's list of models is an error


def check(argv: list[str]) -> None:
    """
    Raises:
        ValueError: if `serve` is given a folder without a model, or `chat` a server that is not there or no address.
    """
    command, name, *others = argv if len(argv) > 1 else [*argv, ""]
    if command == "serve" and (name in BOX or Path(name).is_dir()):
        find_checkpoint(name)
    if command == "chat" and name and "--help" not in argv:
        import httpx2

        server = others[0] if others and others[0].startswith("http") else DEFAULT_SERVER
        try:
            httpx2.get(urljoin(server, "/health"))
        except (httpx2.InvalidURL, ValueError) as error:
            raise ValueError(f"{server!r} is no address of a server: {error}.") from None
        except httpx2.TransportError:
            raise ValueError(
                f"No server answers at {server}: start it in another terminal by `mini-transformers serve {name}`, and "
                f"wait until it says that it runs."
            ) from None


if __name__ == "__main__":
    main()
