"""Shares a model on the Hub: `python push_to_hub.py RUN_OR_CHECKPOINT user/name`, or `--help` for every setting."""

import sys

from entry_points_mini import one_sentence_errors
from sharing_mini.arguments import parse_arguments
from sharing_mini.pushing import push
from sharing_mini.reporting import report


def main() -> None:
    with one_sentence_errors():
        source, repository, arguments = parse_arguments(sys.argv[1:])
        report(push(source, repository, arguments))


if __name__ == "__main__":
    main()
