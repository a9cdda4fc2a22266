"""`python -m modeling_mini.export FORMAT CHECKPOINT OUT`: a checkpoint for another runtime."""

import sys
from dataclasses import dataclass

from entry_points_mini import ArgumentParser, Settings, checkpoint_and_out, one_sentence_errors, option, quiet_libraries
from files_mini import find_checkpoint

from . import FORMATS, check_format, export

PROGRAM = "python -m modeling_mini.export"


@dataclass
class ExportArguments(Settings):
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
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {name:8} {format.description}" for name, format in FORMATS.items())
        print(f"usage: {PROGRAM} FORMAT CHECKPOINT OUT ...\n\nA checkpoint in another format:\n", *lines, sep="\n")
        print(f"\n{PROGRAM} FORMAT --help lists the flags.")
        return
    name, *rest = argv
    check_format(name)
    format = FORMATS[name]
    program = f"{PROGRAM} {name} CHECKPOINT OUT"
    parser = ArgumentParser(
        [ExportArguments, format.options], prog=program, description=f"A checkpoint {format.description}."
    )
    places, flags = checkpoint_and_out(rest, program)
    arguments, options = parser.parse(flags)
    find_checkpoint(places[0])  # what is missing shows before a library is loaded
    quiet_libraries()
    folder = export(name, *places, overwrite=arguments.overwrite, **vars(options))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
