"""What the entry points share: settings from flags and YAML, and errors that end in one sentence."""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from shape_mini import PRESETS, check_numbers, nearest_name
from shape_mini import option as option  # what groups of settings are made with, beside `Settings`

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141  # as the shell says it of a program that SIGPIPE ended
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again

# What a program of the repository is called where Mini is installed.
COMMANDS = {"train_accelerate.py": "mini-train", "generate.py": "mini-generate", "push_to_hub.py": "mini-push"}

# The help of `--model` where `find_checkpoint` of files_mini.py reads it.
WHICH_MODEL = (
    "run, checkpoint folder, Hub name or box (default: the newest run under runs/, else box, the model that comes with "
    "Mini)"
)

# Names of settings in nanoGPT, transformers and llama.cpp, and the flags that they have here. A message names the first
# that the program has.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "batch": ("train_batch_size", "batch_size"),
    "batch_size": ("train_batch_size",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "block_size": ("max_position_embeddings", "length"),
    "compile": ("torch_compile",),
    "context": ("max_position_embeddings", "length"),
    "context_length": ("max_position_embeddings", "length"),
    "corpus": ("dataset",),
    "ctx_size": ("max_position_embeddings", "length"),
    "d_model": ("hidden_size",),
    "data": ("dataset",),
    "dataset_name": ("dataset",),
    "depth": ("num_hidden_layers",),
    "dropout": ("residual_dropout",),
    "epochs": ("max_steps",),
    "eval_interval": ("eval_steps",),
    "eval_every": ("eval_steps",),
    "ffn_dim": ("intermediate_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "heads": ("num_attention_heads",),
    "init_from": ("model",),
    "init_std": ("initializer_range",),
    "iters": ("max_steps",),
    "layers": ("num_hidden_layers",),
    "log_interval": ("logging_steps",),
    "lora_rank": ("lora_r",),
    "lr": ("learning_rate",),
    "max_iters": ("max_steps",),
    "max_length": ("max_new_tokens", "max_position_embeddings"),
    "max_seq_length": ("max_position_embeddings",),
    "min_lr": ("min_lr_rate",),
    "model_name_or_path": ("model",),
    "n": ("num_return_sequences",),
    "n_embd": ("hidden_size",),
    "n_head": ("num_attention_heads",),
    "n_kv_head": ("num_key_value_heads",),
    "n_layer": ("num_hidden_layers",),
    "n_predict": ("max_new_tokens",),
    "num_epochs": ("max_steps",),
    "num_heads": ("num_attention_heads",),
    "num_layers": ("num_hidden_layers",),
    "num_samples": ("num_return_sequences",),
    "num_train_epochs": ("max_steps",),
    "out": ("output_dir", "output"),
    "out_dir": ("output_dir",),
    "per_device_train_batch_size": ("train_batch_size",),
    "precision": ("bf16", "dtype"),
    "resume_from_checkpoint": ("resume",),
    "save_total_limit": ("keep_last",),
    "seq_len": ("max_position_embeddings", "length"),
    "start": ("prompt",),
    "steps": ("max_steps",),
    "temp": ("temperature",),
    "tokens": ("max_new_tokens", "length"),
    "train_file": ("dataset",),
    "warmup_iters": ("warmup_steps",),
    "wd": ("weight_decay",),
    "width": ("hidden_size",),
}
# What is counted in another unit here needs more than a name.
EPOCHS = (
    " (one epoch takes as many steps as the tokens of the corpus divided by train_batch_size x max_position_embeddings)"
)
REMARKS = dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), EPOCHS)


@dataclass
class Settings:
    """
    A group of settings: fields made by `option` are the flags of a program and the keys of its YAML file.

    Raises:
        ValueError: for a number outside of the interval of its field, which NaN and infinity always are.
    """

    def __post_init__(self) -> None:
        check_numbers(self)


def quantization_of(settings: Any) -> str | None:
    """
    What the flags `load_in_8bit` and `load_in_4bit` of a group ask for: "8bit", "4bit" or `None`.

    Raises:
        ValueError: for both.
    """
    if settings.load_in_8bit and settings.load_in_4bit:
        raise ValueError("Give load_in_8bit or load_in_4bit, not both.")
    return "8bit" if settings.load_in_8bit else "4bit" if settings.load_in_4bit else None


def optional_settings(name: str, shape: type, defaults: dict[str, Any] | None = None) -> type[Settings]:
    """
    A group that has every setting of the dataclass `shape`, and `None` for each that was not given; a field that is
    added there is a setting here. The help names the default of the preset, of `defaults`, or of the field.
    """
    fields = []
    for given in dataclasses.fields(shape):
        words, default = given.metadata["help"], (defaults or {}).get(given.name, given.default)
        if given.name in PRESETS["tiny"]:
            words += " (default: the preset's)"
        elif default not in (None, False):
            words += f" (default: {as_yaml(default)})"
        metadata = {**given.metadata, "help": words}
        fields.append((given.name, given.type | None, dataclasses.field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass(name, fields, bases=(Settings,), namespace={"__doc__": shape.__doc__})


class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal; a value is named by its kind, and a default is shown where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS, []) or "(default: " in (action.help or ""):
            return action.help
        return f"{action.help} (default: {as_yaml(action.default).replace('%', '%%')})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?":  # the value may be left out, and nearly always is
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # a name stays in one piece

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs != "+":
            return super()._format_args(action, default_metavar)
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        return f"{action.metavar or choices} ..."


class HelpAction(argparse.Action):
    """`--help` prints what most people need, and `--help all` every flag."""

    def __call__(self, parser: "ArgumentParser", *arguments: Any) -> NoReturn:
        parser.print_help_of(everything=arguments[1] == "all")
        sys.exit(0)


class VersionAction(argparse.Action):
    """`--version` prints what a report of a fault needs."""

    def __call__(self, *arguments: Any) -> NoReturn:
        from installation_mini import report

        print(report())
        sys.exit(0)


class ArgumentParser(argparse.ArgumentParser):
    """
    A parser made from groups of settings. A mistake is one sentence that names the right flag, and a YAML file goes
    through the same checks as flags, so that `1e-3` is a number and `tru` an error in both.

    transformers' `HfArgumentParser` is not used: importing it takes 0.85 seconds, and help is there in 0.1.

    Args:
        groups: one class or several; the first line of its docstring is the heading of its flags, after its name.
    """

    def __init__(self, groups: type[Settings] | Sequence[type[Settings]], **kwargs: Any) -> None:
        kwargs.setdefault("prog", name_of_program())
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, add_help=False, **kwargs)
        self.groups = [groups] if isinstance(groups, type) else list(groups)
        self.others = self.add_argument_group("other")
        self.others.add_argument(
            "-h", "--help", action=HelpAction, nargs="?", default=argparse.SUPPRESS,
            help="show this; --help all shows every flag",
        )  # fmt: skip
        self.others.add_argument(
            "--version", action=VersionAction, nargs=0, default=argparse.SUPPRESS,
            help="show the versions of Mini and its libraries, and the machine",
        )  # fmt: skip
        self.common = set()
        for group in self.groups:
            section = self.add_argument_group(heading_of(group), first_line(group.__doc__))
            hints = typing.get_type_hints(group)
            # What a group says itself stands before what it has from another.
            for field in sorted(dataclasses.fields(group), key=lambda field: field.name not in group.__annotations__):
                names = [f"--{field.name}", *field.metadata.get("aliases", [])]
                dashed = [name.replace("_", "-") for name in names if "_" in name]
                action = section.add_argument(*names, *dashed, **argument_of(field, hints[field.name]))
                # The names in YAML, in Python and in transformers have underscores; their dashed twins would only
                # fill the help text.
                action.option_strings = names
                if field.metadata.get("common"):
                    self.common.add(action)

    @property
    def known_fields(self) -> list[str]:
        """The names of all fields, which are the flags and the YAML keys."""
        return [field.name for group in self.groups for field in dataclasses.fields(group)]

    def print_help_of(self, everything: bool) -> None:
        """The flags by group: all of them, or those that most people need."""
        sections = [section for section in self._action_groups if section._group_actions and section is not self.others]
        sections.append(self.others)
        flags = [action for section in sections for action in section._group_actions if action.option_strings]
        places = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(" ".join([self.prog, *places, "[--FLAG VALUE ...]"]), [], [])
        formatter.add_text(self.description)
        shown = set(self._actions) if everything or not self.common else self.common | set(self.others._group_actions)
        for section in sections:
            actions = [action for action in section._group_actions if action in shown or not action.option_strings]
            if actions:
                formatter.start_section(section.title)
                if everything:
                    formatter.add_text(section.description)
                formatter.add_arguments(actions)
                formatter.end_section()
        switches = [action for action in flags if action in shown and action.nargs == "?"]
        if name := next((action.option_strings[0] for action in switches if action.default in (None, True)), None):
            formatter.add_text(f"A flag that is shown without a value may be on by default; {name} false turns it off.")
        if hidden := len(set(flags) - shown):
            formatter.add_text(f"{self.prog} --help all shows {hidden} more flags.")
        print(formatter.format_help(), end="")

    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, ListItem) else super()._parse_optional(arg_string)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError, where argparse would print the usage and end the program."""
        raise ValueError(f"{message[0].upper()}{message[1:]}; --help all lists the flags.")

    def parse(
        self,
        argv: Sequence[str],
        yaml_path: str | Path | None = None,
        defaults: dict[str, Any] | None = None,
        replaced: Collection[str] = (),
    ) -> tuple[Any, ...]:
        """
        The groups from a YAML file and flags, and the namespace of other arguments where there are any; a flag wins
        over the file, and the file over `defaults`, which take the place of those of the fields. Keys of the file that
        are among `replaced` are passed over.

        Raises:
            ValueError: for an unknown name or a value that does not fit, in one sentence.
        """
        from_yaml = self._yaml_as_flags(yaml_path, replaced) if yaml_path is not None else []
        first = [f"--{name}={value}" for name, value in (defaults or {}).items()]
        namespace, unknown = self.parse_known_args([*first, *from_yaml, *argv])
        for argument in unknown:
            if argument.startswith("-"):
                flag = argument.split("=")[0]
                raise ValueError(f"There is no flag {flag!r}{self.right_name(flag)}")
            # The shell put the names of files in the place of a pattern.
            hint = "; if it comes of a pattern such as *.txt, put the pattern in quotes" * os.path.exists(argument)
            raise ValueError(f"The argument {argument!r} belongs to no flag{hint}.")
        values = vars(namespace)
        parsed = [
            group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for group in self.groups
        ]
        return (*parsed, namespace) if values else tuple(parsed)

    def right_name(self, name: str) -> str:
        """What somebody who wrote `name` may have meant, as the end of a sentence."""
        plain = name.lstrip("-").replace("-", "_")
        flags = [option_string.lstrip("-") for action in self._actions for option_string in action.option_strings]
        for other in OTHER_NAMES.get(plain, ()):
            if other in flags:
                return f", did you mean {other!r}?{REMARKS.get(plain, '')}"
        return nearest_name(plain, flags) or "."

    def _yaml_as_flags(self, path: str | Path, replaced: Collection[str]) -> list[str]:
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ValueError(f"There is no configuration file {str(path)!r}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"{path} is not valid YAML: {detail}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold lines of the form 'name: value'.")
        for name in values:
            if name not in self.known_fields:
                raise ValueError(f"{path} has an unknown key {name!r}{self.right_name(str(name))}")
        values = {name: value for name, value in values.items() if name not in replaced}
        self.check_lists(values)
        return as_flags(values)

    def check_lists(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError for a list where a setting is one value; of flags, the rest would belong to none."""
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for name, value in values.items():
            if isinstance(value, list | tuple) and name not in lists:
                raise ValueError(f"{name} takes one value, got {list(value)}.")


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping. Others take the last one, and a setting or a run is lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<` brings in keys that may be replaced
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    message = f"{key.value!r} stands there a second time"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def load_yaml(text: str) -> Any:
    """What a YAML file of a person says; raises `yaml.YAMLError` where it is wrong, or says one thing twice."""
    return yaml.load(text, UniqueKeys)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The values in YAML, in their order."""
    form = {"sort_keys": False, "allow_unicode": True}
    # libyaml takes a quarter of the time. Some installations lack it, and it has no names of files that are not UTF-8.
    with contextlib.suppress(AttributeError, UnicodeEncodeError):
        text = yaml.dump(values, Dumper=yaml.CSafeDumper, **form)
        if "\\U" not in text:  # as which it writes an emoji
            return text
    return yaml.safe_dump(values, **form)


class ListItem(str):
    """An item of a list, which for an `ArgumentParser` is no flag, whatever it begins with."""


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that say the same as these settings, by name; `None` and an empty list are not given."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            flags += [f"--{name}", *map(ListItem, value)] if value else []
        elif isinstance(value, dict):
            flags.append(f"--{name}={yaml.safe_dump(value, default_flow_style=True)}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def heading_of(group: type[Settings]) -> str:
    """`lm_eval` for `LmEvalOptions`; `flags` where the name is that of the only group of a program."""
    name = re.sub("(Arguments|Settings|Options)$", "", group.__name__)
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower() or "flags"


def name_of_program() -> str:
    """How the program that runs is called in its help: `python -m training_mini.compare`, and not `compare.py`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name


def as_yaml(value: Any) -> str:
    """A value of a setting as one writes it in a flag or in YAML."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def first_line(docstring: str | None) -> str:
    return (docstring or "").strip().split("\n")[0]


def argument_of(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """What `argparse.ArgumentParser.add_argument` takes for a field of this type; `None` means "not given"."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        hint = float if set(kinds) == {int, float} else kinds[0]
    is_list = field.default is dataclasses.MISSING
    default = field.default_factory() if is_list else field.default
    argument = {"help": field.metadata["help"].replace("%", "%%"), "default": default}
    if "choices" in field.metadata:
        argument["choices"] = field.metadata["choices"]
    if typing.get_origin(hint) is Literal:
        return {**argument, "choices": typing.get_args(hint)}
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
        argument["nargs"] = "+"
    if hint is bool:
        return {**argument, "type": boolean, "nargs": "?", "const": True}
    kind, name = KINDS.get(typing.get_origin(hint) or hint, (hint, "VALUE"))
    return {**argument, "type": kind, **({} if "choices" in argument else {"metavar": name})}


def boolean(text: str) -> bool:
    """As YAML writes it, and people."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def mapping(text: str) -> dict[str, Any]:
    """A mapping in JSON or YAML; `1e4`, which is text in YAML, is a number here as everywhere."""

    def with_numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: with_numbers(item) for name, item in value.items()}
        if isinstance(value, list):
            return [with_numbers(item) for item in value]
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping, such as '{{name: value}}', got {text!r}")
    return with_numbers(value)


# What reads the value of a flag, and what the help text calls it.
KINDS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "N"), float: (float, "X"), str: (str, "TEXT"), dict: (mapping, "MAPPING")
}  # fmt: skip


def command_of(program: str) -> str:
    """
    How a program of the repository, such as `generate.py`, is started from the folder of the user: beside the program
    that runs now, or as the command that an installed Mini has for it.
    """
    path = Path(sys.argv[0]).with_name(program)
    if not path.is_file():
        return COMMANDS[program]
    return f"{'python' if shutil.which('python') else 'python3'} {shlex.quote(str(path))}"


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """
    Programs import torch and transformers within this context. That makes half a million objects, which all stay until
    the end of the program. While they are made, Python looks for garbage among them again and again (0.6 of 4 seconds
    of the processor), and once more at the end (1 second). Here it does not look, and later it leaves them out. Where
    torch is loaded already, the process may belong to somebody else, and nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """
    Turns off what libraries print beside the output of a program and nobody can act on. Every program calls it before
    it loads a model; it loads transformers.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for each file breaks into the live display
    for name in (
        "torch.distributed.checkpoint",
        # Without AVX512-BF16 kernels of a further library it warns on import, and peft imports it.
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.autograd._functions",  # in INT8, it says for every product that it computes in float16
        "torch.utils.cpp_extension",  # where a CUDA compiler and no GPU is installed, the first compilation warns of it
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The first step of a run may be skipped, and the schedule goes on all the same.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    # Under autocast, the norms of queries and keys get bfloat16 and have weights in float32. The result is right.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def imported(name: str, setting: str) -> Any:
    """
    What `package.module:NAME` names. Modules in the current folder are found too.

    Raises:
        ValueError: if there is no such thing, naming the setting.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{setting} must have the form package.module:NAME, got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a command that was installed does not look there
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{setting} {name!r} cannot be imported: {error}.") from error
    if not hasattr(found, attribute):
        raise ValueError(
            f"{setting}: the module {module!r} has no {attribute!r}{nearest_name(attribute, dir(found)) or '.'}"
        )
    return getattr(found, attribute)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch says so; on a CPU, torch has no type for it."""
    kinds = (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError))
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """
    Ends the program with exit code 2 and one sentence for wrong input or too little memory, with 130 for Ctrl-C, and
    with 141 and no word where its output is read no further (`| head`). Set MINI_TRACEBACK=1 to see where an error came
    from.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # a stream that is no file has nothing to be flushed at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_NOBODY_READS)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        no_memory = is_out_of_memory(error)
        if os.environ.get("MINI_TRACEBACK") == "1" or (isinstance(error, RuntimeError) and not no_memory):
            raise
        if no_memory:
            sentence = "There is not enough memory: make the model, the batch or the context smaller."
        elif isinstance(error, OSError) and error.strerror:
            sentence = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        else:
            sentence = " ".join(str(error).split())
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
