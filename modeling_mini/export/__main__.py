"""`python -m modeling_mini.export FORMAT CHECKPOINT OUT`: a checkpoint for another runtime."""

import sys
from dataclasses import dataclass

from entry_points_mini import ArgumentParser, one_sentence_errors, option
from transformers.utils import logging

from . import FORMATS, export, module_of

PROGRAM = "python -m modeling_mini.export"


@dataclass
class ExportArguments:
    """What every format takes."""

    overwrite: bool = option(False, "replace OUT if there is something in it")


def main() -> None:
    with one_sentence_errors():
        run(sys.argv[1:])


def run(argv: list[str]) -> None:
    """
    Parses and does one export.

    Raises:
        ValueError: for wrong input, in one sentence.
    """
    logging.disable_progress_bar()
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {format:8} {description}" for format, description in FORMATS.items())
        print(f"usage: {PROGRAM} FORMAT CHECKPOINT OUT ...\n\nA checkpoint in another format:\n", *lines, sep="\n")
        print(f"\n{PROGRAM} FORMAT --help lists the flags.")
        return
    format, *rest = argv
    parser = ArgumentParser(
        [ExportArguments, module_of(format).Options],
        prog=f"{PROGRAM} {format} CHECKPOINT OUT",
        description=f"A checkpoint {FORMATS[format]}.",
    )
    places = rest[:2]
    if "--help" in rest or "-h" in rest:
        parser.parse(["--help"])
    if len(places) < 2 or any(place.startswith("-") for place in places):
        raise ValueError(f"The checkpoint and the folder to write come first: {PROGRAM} {format} CHECKPOINT OUT.")
    arguments, options = parser.parse(rest[2:])
    folder = export(format, *places, overwrite=arguments.overwrite, **vars(options))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
