"""
The `transformers` command with Mini in it: `mini-transformers serve CHECKPOINT` is a server of OpenAI's protocol, and
`mini-transformers chat CHECKPOINT` talks to one.

The server looks the class of a checkpoint up in the module `transformers`, where no custom class is. This program puts
it there; all else is the stock command, with its flags.
"""

import sys
from pathlib import Path

import modeling_mini
import transformers
from entry_points_mini import one_sentence_errors
from huggingface_hub.constants import HF_HUB_CACHE
from modeling_mini.loading.checkpoints import find_checkpoint


def main() -> None:
    with one_sentence_errors():
        sys.argv[1:] = with_checkpoint(sys.argv[1:])
        try:
            # Before the class is put there: importing the command fills the module anew.
            from transformers.cli.transformers import main as transformers_main

            transformers.MiniForCausalLM = modeling_mini.MiniForCausalLM
            Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # without it, the server's list of models is an error
            transformers_main()
        except ImportError as error:  # a package that only this command needs; the sentence says which
            raise ValueError(str(error)) from error


def with_checkpoint(argv: list[str]) -> list[str]:
    """The arguments, with the folder of a run replaced by that of its checkpoint, as `generate.py` finds it."""
    if len(argv) > 1 and argv[0] in ("serve", "chat") and Path(argv[1]).is_dir():
        return [argv[0], str(Path(find_checkpoint(argv[1])).resolve()), *argv[2:]]
    return argv


if __name__ == "__main__":
    main()
