"""Shares a model on the Hub: `python push_to_hub.py RUN_OR_CHECKPOINT user/name`, or `--help` for every setting."""

import sys
from pathlib import Path

from entry_points_mini import one_sentence_errors, without_garbage_collection
from files_mini import BOX
from sharing_mini.arguments import parse_arguments


def main() -> None:
    with one_sentence_errors():
        source, repository, arguments = parse_arguments(sys.argv[1:])
        if source not in BOX and not Path(source).exists():
            raise ValueError(f"There is no run or checkpoint folder {source!r}.")
        with without_garbage_collection():
            # Not above: these load torch, which takes seconds.
            from sharing_mini.pushing import push
            from sharing_mini.reporting import report

        report(push(source, repository, arguments))


if __name__ == "__main__":
    main()
