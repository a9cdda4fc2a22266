"""What the entry points share: arguments from flags and YAML, and errors that end in one sentence."""

import contextlib
import logging
import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from configuration_mini import nearest_name
from transformers import HfArgumentParser

# Where a CPU has AVX512-BF16, bitsandbytes warns on import that it does without a kernel of a further library; and
# peft, which transformers and TRL import, imports it. Set here, because every program imports this file before those.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# And in INT8 it says for every product that it computes in float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141  # as the shell says it of a program that SIGPIPE ended
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field with the help text of its flag."""
    metadata = {"help": help, **kwargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not `None` or nothing: there the help text says what happens."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=32)

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class ArgumentParser(HfArgumentParser):
    """
    `HfArgumentParser` with two habits of Mini: a mistake is one sentence that names the nearest right flag, and a YAML
    file goes through the same checks as flags, so that `1e-3` is a number and `tru` an error in both.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        for action in self._actions:
            # The names in YAML, in Python and in transformers have underscores; their dashed twins would only fill
            # the help text.
            action.option_strings = [o for o in action.option_strings if "-" not in o[2:]] or action.option_strings

    @property
    def known_fields(self) -> list[str]:
        """The names of all fields, which are the flags and the YAML keys."""
        return [name for dataclass in self.dataclass_types for name in dataclass.__dataclass_fields__]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}; --help lists the flags.")

    def parse(
        self, argv: list[str], yaml_path: str | Path | None = None, defaults: dict[str, Any] | None = None
    ) -> tuple[Any, ...]:
        """
        The dataclasses from a YAML file and flags; a flag wins over the file, and the file over `defaults`, which take
        the place of those of the fields.

        Raises:
            ValueError: for an unknown name or a value that does not fit, in one sentence.
        """
        from_yaml = self._yaml_as_flags(yaml_path) if yaml_path is not None else []
        first = [f"--{name}={value}" for name, value in (defaults or {}).items()]
        *parsed, unknown = self.parse_args_into_dataclasses([*first, *from_yaml, *argv], return_remaining_strings=True)
        for argument in unknown:
            if argument.startswith("-"):
                name = argument.split("=")[0].lstrip("-").replace("-", "_")
                flags = [option.lstrip("-") for action in self._actions for option in action.option_strings]
                raise ValueError(f"There is no flag {argument.split('=')[0]!r}{nearest_name(name, flags) or '.'}")
            # The shell put the names of files in the place of a pattern.
            hint = "; if it comes of a pattern such as *.txt, put the pattern in quotes" * os.path.exists(argument)
            raise ValueError(f"The argument {argument!r} belongs to no flag{hint}.")
        return tuple(parsed)

    def _yaml_as_flags(self, path: str | Path) -> list[str]:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ValueError(f"There is no configuration file {str(path)!r}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"{path} is not valid YAML: {detail}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold lines of the form 'name: value'.")
        flags = []
        for name, value in values.items():
            if name not in self.known_fields:
                hint = nearest_name(str(name), self.known_fields) or "."
                raise ValueError(f"{path} has an unknown key {name!r}{hint}")
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)] if value else []
            elif value is not None:
                flags.append(f"--{name}={value}")
        return flags


def checkpoint_and_out(argv: list[str], program: str) -> tuple[list[str], list[str]]:
    """
    The two places that a command begins with, and its flags; the places are missing where help is asked for.

    Raises:
        ValueError: if a place is missing.
    """
    if "--help" in argv or "-h" in argv:
        return [], ["--help"]
    places, flags = argv[:2], argv[2:]
    if len(places) < 2 or any(place.startswith("-") for place in places):
        raise ValueError(f"The checkpoint and the folder to write come first: {program}.")
    return places, flags


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """
    Ends the program with exit code 2 and one sentence for wrong input, with 130 for Ctrl-C, and with 141 and no word
    where its output is read no further (`| head`). Set MINI_TRACEBACK=1 to see where an error came from.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # a stream that is no file has nothing to be flushed at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_NOBODY_READS)
    except (ValueError, OSError) as error:
        if os.environ.get("MINI_TRACEBACK") == "1":
            raise
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        else:
            sentence = " ".join(str(error).split())
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
