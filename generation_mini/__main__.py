"""The program behind `generate.py`, `mini-generate` and `python -m generation_mini`."""

import sys
from pathlib import Path

from entry_points_mini import one_sentence_errors, without_garbage_collection
from files_mini import find_checkpoint

from .arguments import parse_arguments


def main() -> None:
    with one_sentence_errors():
        arguments = parse_arguments(sys.argv[1:])
        # What is missing is an error before torch is loaded, which takes seconds.
        if arguments.model is not None or arguments.adapter is None:
            find_checkpoint(arguments.model)
        if arguments.batch_file is not None and not Path(arguments.batch_file).exists():
            raise ValueError(f"There is no file {arguments.batch_file!r} of prompts.")
        with without_garbage_collection():
            from .program import run

        run(arguments)


if __name__ == "__main__":
    main()
