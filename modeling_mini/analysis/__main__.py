"""`python -m modeling_mini.analysis cost | attention | activations`: measures of a model in the terminal and as PNG."""

import importlib
import sys

from entry_points_mini import ArgumentParser, one_sentence_errors, quiet_libraries, without_garbage_collection
from files_mini import find_checkpoint
from shape_mini import nearest_name

from .arguments import ActivationsArguments, AttentionArguments, CostArguments, TextSettings

PROGRAM = "python -m modeling_mini.analysis"
# The flags of each command, the function of reports.py that does it, and its help.
COMMANDS: dict[str, tuple[type[CostArguments] | type[TextSettings], str, str]] = {
    "cost": (CostArguments, "show_cost", "Parameters, FLOPs and memory of a Llama-shaped model."),
    "attention": (AttentionArguments, "show_attention", "Entropy and maps of every attention head."),
    "activations": (ActivationsArguments, "show_activations", "Statistics of activations and gradients."),
}


def main() -> None:
    with one_sentence_errors():
        run(sys.argv[1:])


def run(argv: list[str]) -> None:
    """
    Parses and does one command.

    Raises:
        ValueError: for wrong input, in one sentence.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {name:12} {description}" for name, (_, _, description) in COMMANDS.items())
        print(f"usage: {PROGRAM} COMMAND ...\n", *lines, f"\n{PROGRAM} COMMAND --help lists the flags.", sep="\n")
        return
    if argv[0] not in COMMANDS:
        hint = nearest_name(argv[0], list(COMMANDS)) or "."
        raise ValueError(f"There is no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}{hint}")
    dataclass_type, command, description = COMMANDS[argv[0]]
    (arguments,) = ArgumentParser(dataclass_type, prog=f"{PROGRAM} {argv[0]}", description=description).parse(argv[1:])
    if isinstance(arguments, TextSettings) or not arguments.names_a_shape:
        find_checkpoint(arguments.model)  # what is missing shows before torch is loaded, which takes seconds
    with without_garbage_collection():
        quiet_libraries()
        reports = importlib.import_module(f"{__package__}.reports")
    getattr(reports, command)(arguments)


if __name__ == "__main__":
    main()
