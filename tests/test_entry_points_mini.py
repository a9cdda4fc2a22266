"""What all programs share: settings from a file, and how a program ends."""

import gc
import importlib
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from entry_points_mini import (
    OTHER_NAMES,
    ArgumentParser,
    Settings,
    command_of,
    dump_yaml,
    heading_of,
    load_yaml,
    one_sentence_errors,
    option,
    without_garbage_collection,
)
from modeling_mini.export import FORMATS
from training_mini.arguments import parse_arguments as parse_training

PROGRAMS = (
    "training_mini.arguments", "training_mini.compare", "training_mini.sweep",
    "generation_mini.arguments", "generation_mini.demo.arguments",
    "sharing_mini.arguments",
    "modeling_mini.analysis.arguments", "modeling_mini.export.__main__", "modeling_mini.export.quantized",
    "modeling_mini.export.formats",
)  # fmt: skip
NO_MEMORY = "error: There is not enough memory: make the model, the batch or the context smaller.\n"


@dataclass
class Example(Settings):
    steps: int = option(7, "how many")
    names: list[str] = option(["a", "b"], "which")
    folder: str | None = option(None, "where")
    fast: bool = option(False, "whether")


def from_yaml(tmp_path: Path, text: str, *flags: str) -> Example:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    (settings,) = ArgumentParser(Example, prog="p").parse(list(flags), path)
    return settings


def test_what_a_file_leaves_empty_is_at_its_default(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "") == from_yaml(tmp_path, "steps:\nnames: []\nfolder: null\nfast:\n") == Example()


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    text = "steps: 3\nnames: [x, y]\nfolder: f\nfast: true\n"
    assert from_yaml(tmp_path, text) == Example(3, ["x", "y"], "f", True)
    flags = ("--steps", "4", "--names", "z", "--fast", "false")
    assert from_yaml(tmp_path, text, *flags) == Example(4, ["z"], "f", False)


def test_an_item_of_a_list_that_looks_like_a_flag_is_none(tmp_path: Path) -> None:
    text = "names: [-x, --steps=3, --fast]\nfast: true\n"
    assert from_yaml(tmp_path, text) == Example(names=["-x", "--steps=3", "--fast"], fast=True)
    with pytest.raises(ValueError, match="There is no flag '-x'"):
        from_yaml(tmp_path, "", "--names", "a", "-x")


def test_a_mistake_names_the_flag_that_shows_all() -> None:
    with pytest.raises(ValueError, match=r"invalid int value: 'x'; --help all lists the flags\."):
        parse_training(["--seed", "x"])


def test_a_key_of_yaml_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not valid YAML: 'steps' stands there a second time .*line 3, column 1"):
        from_yaml(tmp_path, "steps: 3\nfolder: f\nsteps: 4\n")
    text = "a: [&b {<<: &c {x: 1, y: 1}, x: 2}]\nd: {<<: *b, x: 3}\n"
    assert load_yaml(text) == {"a": [{"x": 2, "y": 1}], "d": {"x": 3, "y": 1}}, "what << brings in is replaced"


@pytest.mark.parametrize("text", ["Über allen Gipfeln", "a 🦙", "caf\udce9.txt", "1e4", "C:\\Users"])
def test_what_is_dumped_is_read_back_in_its_order(text: str) -> None:
    values = {"text": text, "a": [1e-05, True, 3], "none": None, "mapping": {"size": 2}}
    dumped = dump_yaml(values)
    assert dumped == yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    assert load_yaml(dumped) == values and list(load_yaml(dumped)) == list(values)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("two\n lines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: No such file or directory: a.txt\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError("plain words"), 2, "error: plain words\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (MemoryError(), 2, NO_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2, NO_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 36000 bytes."), 2, NO_MEMORY),
    ],
    ids=repr,
)
def test_how_a_program_ends(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINI_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop, one_sentence_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == printed


def test_the_traceback_is_there_for_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_TRACEBACK", "1")
    with pytest.raises(ValueError, match="words"), one_sentence_errors():
        raise ValueError("words")


def test_faults_of_the_program_are_no_sentences() -> None:
    with pytest.raises(TypeError), one_sentence_errors():
        raise TypeError("a fault of ours")
    with pytest.raises(RuntimeError), one_sentence_errors():
        raise RuntimeError("a fault of ours")


def test_programs_load_libraries_without_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ValueError, match="damaged"), without_garbage_collection():
            assert not gc.isenabled()
            raise ValueError("a damaged library")
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_a_process_that_has_the_libraries_keeps_its_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", sys)
    with without_garbage_collection():
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == before


def groups() -> Iterator[type[Settings]]:
    for name in PROGRAMS:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, Settings) and value is not Settings:
                yield value


NUMBERS = [
    (group, name, float in (hint, *typing.get_args(hint)))
    for group in dict.fromkeys(groups())
    for name, hint in typing.get_type_hints(group).items()
    if {int, float} & {hint, *typing.get_args(hint)} and typing.get_origin(hint) is not list
]


def test_every_program_has_groups_and_none_is_a_dataclass_of_another_kind() -> None:
    for name in PROGRAMS:
        own = [
            value for value in vars(importlib.import_module(name)).values() if getattr(value, "__module__", "") == name
        ]
        names = [value.__name__ for value in own if hasattr(value, "__dataclass_fields__")]
        names = [name for name in names if name.endswith(("Arguments", "Options", "Settings")) and name != "Arguments"]
        assert names and all(issubclass(value, Settings) for value in own if value.__name__ in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name", "is_float"), NUMBERS, ids=[f"{group.__name__}-{name}" for group, name, _ in NUMBERS]
)
def test_every_number_has_an_interval_and_nan_and_infinity_are_in_none(
    group: type[Settings], name: str, is_float: bool, tmp_path: Path
) -> None:
    interval = group.__dataclass_fields__[name].metadata["interval"]
    assert interval.at_least is not None or interval.above is not None
    for number in ("nan", "inf", "-inf") if is_float else ():
        sentence = rf"^{name} must be .*, got {number}\.$"
        with pytest.raises(ValueError, match=sentence):
            ArgumentParser(group, prog="p").parse([f"--{name}={number}"])
        path = tmp_path / "settings.yaml"
        path.write_text(f"{name}: {number.replace('inf', '.inf').replace('nan', '.nan')}\n")
        with pytest.raises(ValueError, match=sentence):
            ArgumentParser(group, prog="p").parse([], path)
        with pytest.raises(ValueError, match=sentence):
            group(**{name: float(number)})


@pytest.mark.parametrize(
    ("foreign", "right"),
    [
        ("--lr", "learning_rate"), ("--epochs", "max_steps"), ("--batch_size", "train_batch_size"),
        ("--n_layer", "num_hidden_layers"), ("--steps", "max_steps"), ("--context", "max_position_embeddings"),
        ("--block-size", "max_position_embeddings"), ("--num_train_epochs=3", "max_steps"),
        ("--lerning_rate", "learning_rate"), ("--dropout", "residual_dropout"),
    ],
)  # fmt: skip
def test_names_of_other_programs_are_answered_with_the_right_flag(foreign: str, right: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^There is no flag '{foreign.split('=')[0]}', did you mean '{right}'\?"
    ) as error:
        parse_training([foreign, "3"])
    assert ("one epoch takes" in str(error.value)) == ("epochs" in foreign)


def test_every_answer_is_a_flag_of_some_program() -> None:
    flags = {name for group in groups() for name in group.__dataclass_fields__}
    for foreign, names in OTHER_NAMES.items():
        assert set(names) <= flags, foreign
        assert names[0] != foreign


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("everything", [False, True])
def test_help(
    columns: int, everything: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse_training(["--help", *(["all"] * everything)])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns and max(map(len, lines)) > columns - 12
    flags = [line.split()[0] for line in lines if line.startswith("  --") or line.startswith("  -h")]
    headings = [line for line in lines if line and not line.startswith(" ") and line.endswith(":")]
    assert ("--qk_norm false turns it off." in " ".join(text.split())) == everything
    if everything:
        assert headings == ["model:", "adapter:", "data:", "optimization:", "monitoring:", "run:", "other:"]
        assert len(flags) > 80 and {"--rope_parameters", "--mlp_bias", "--keep_every"} <= set(flags)
        assert "MODEL" not in text and "(default: false)" not in text.lower() and "None" not in text
    else:
        assert len(flags) == 10 + 3 and {"--dataset", "--size", "--learning_rate", "--max_steps"} <= set(flags)
        assert "--help all shows" in text


@dataclass
class Listed(Settings):
    manners: list[str] = option(["a"], "how", choices=("a", "b"))


def test_help_names_the_choices_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ArgumentParser(Listed, prog="p").parse(["--help"])
    text = capsys.readouterr().out
    assert "--manners {a,b} ..." in text and "None" not in text


def test_commands_to_go_on_with_work_where_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    for name in ("train_accelerate.py", "generate.py"):
        (tmp_path / "a b" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["a b/train_accelerate.py"])
    assert command_of("generate.py") == "python 'a b/generate.py'"
    monkeypatch.setattr("sys.argv", ["/usr/bin/mini-train"])
    assert command_of("generate.py") == "mini-generate" and command_of("train_accelerate.py") == "mini-train"


def test_a_configuration_that_comes_with_mini_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_training(["--config", "small"]).model.size == "small"
    with pytest.raises(ValueError, match=r"no configuration file 'smal', did you mean 'small'\?"):
        parse_training(["--config", "smal"])


def test_a_flag_may_be_written_with_dashes_and_a_boolean_with_its_value() -> None:
    (settings,) = ArgumentParser(Example, prog="p").parse(["--fast", "--steps", "3"])
    assert settings.fast is True
    for text, value in (("true", True), ("no", False)):
        assert ArgumentParser(Example, prog="p").parse([f"--fast={text}"])[0].fast is value
    with pytest.raises(ValueError, match="expected true or false, got 'maybe'"):
        ArgumentParser(Example, prog="p").parse(["--fast=maybe"])
    assert parse_training(["--max-steps", "30"]).optimization.max_steps == 30


BENCHMARKS = [
    f"benchmarks/{path.name}"
    for path in sorted(Path(__file__).parent.parent.glob("benchmarks/*.py"))
    if path.name not in ("measuring.py", "runtimes.py")  # which the others share
]
# Every command with its help and with the mistakes that can be seen without a model.
LIGHT = [
    ("train_accelerate.py", "--help", 0), ("train_accelerate.py", "--help all", 0),
    ("train_accelerate.py", "--lr 1", 2),
    ("train_accelerate.py", "--dataset missing.txt", 2), ("train_accelerate.py", "--model missing", 2),
    ("train_accelerate.py", "--config missing.yaml", 2), ("train_accelerate.py", "--learning_rate nan", 2),
    ("generate.py", "--help", 0), ("generate.py", "--temprature 1", 2), ("generate.py", "--model missing", 2),
    ("generate.py", "--model modeling_mini --batch_file missing.txt --output a", 2),
    ("training_mini.compare", "--help", 0), ("training_mini.compare", "missing", 2),
    ("training_mini.sweep", "--help", 0), ("training_mini.sweep", "missing.yaml", 2),
    ("training_mini.check_launch", "--help", 0), ("training_mini.check_launch", "missing.yaml", 2),
    ("push_to_hub.py", "--help", 0), ("push_to_hub.py", "missing user/name", 2), ("push_to_hub.py", "a b --dry", 2),
    ("generation_mini", "--help", 0), ("generation_mini", "--model missing", 2),
    ("generation_mini.transformers_cli", "--help", 0), ("generation_mini.transformers_cli", "", 0),
    ("generation_mini.transformers_cli", "srve box", 2), ("generation_mini.transformers_cli", "serve empty", 2),
    ("generation_mini.demo", "--help", 0), ("generation_mini.demo", "--model missing", 2),
    ("modeling_mini.demo", "--help", 0), ("modeling_mini.demo", "--prot 1", 2),
    ("modeling_mini.analysis", "--help", 0), ("modeling_mini.analysis", "attention --help", 0),
    ("modeling_mini.analysis", "costs", 2), ("modeling_mini.analysis", "cost --lenght 3", 2),
    ("modeling_mini.analysis", "cost --model missing", 2),
    ("modeling_mini.analysis", "attention --text_file missing.txt", 2),
    ("modeling_mini.export", "--help", 0), ("modeling_mini.export", "gguff a b", 2),
    *(("modeling_mini.export", f"{format} --help", 0) for format in FORMATS),
    ("modeling_mini.export", "gguf a b --type F32", 2), ("modeling_mini.export", "native missing b", 2),
    ("modeling_mini.export.quantized", "--help", 0), ("modeling_mini.export.quantized", "missing b", 2),
    ("modeling_mini.quantize", "--help", 0), ("modeling_mini.quantize", "a b --load_in_8bits", 2),
    ("box_mini", "--help", 0), ("box_mini", "", 2), ("box_mini", "--chat missing", 2),
    *((program, "--help", 0) for program in BENCHMARKS), *((program, "--rouns 3", 2) for program in BENCHMARKS),
    ("benchmarks/training.py", "--nanogpt missing", 2), ("benchmarks/quantization.py", "--models missing", 2),
    ("benchmarks/correctness.py", "--tests missing", 2), ("benchmarks/gpu.py", "--shakespeare missing", 2),
]  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "accelerate", "peft", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "arguments", "code"), LIGHT, ids=[f"{name} {rest}" for name, rest, _ in LIGHT])
def test_help_and_mistakes_load_nothing_heavy(program: str, arguments: str, code: int, tmp_path: Path) -> None:
    """Help took 4.7 seconds of processor time when every program loaded torch before it read its flags."""
    root = Path(__file__).parent.parent
    (tmp_path / "empty").mkdir()
    command = [str(root / program)] if program.endswith(".py") else ["-m", program]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, *arguments.split()],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    lines = result.stderr.splitlines()
    loaded = {line.rpartition("|")[2].split(".")[0].strip() for line in lines if line.startswith("import time:")}
    errors = [line for line in lines if not line.startswith("import time:")]
    assert result.returncode == code, errors
    assert {"entry_points_mini", "argparse"} <= loaded and not loaded & HEAVY
    assert [error[:7] for error in errors] == ["error: "] * (code == 2)
    if "--help" in arguments:  # what it is called there can be typed; `python compare.py` could not
        names = (Path(program).name,) if program.endswith(".py") else ("python -m ", "mini-transformers ")
        assert result.stdout.startswith(tuple(f"usage: {name}" for name in names))


def test_headings_of_help_are_the_names_of_groups() -> None:
    assert {format.options.__name__: heading_of(format.options) for format in FORMATS.values()} == {
        "NoOptions": "no", "GgufOptions": "gguf", "OnnxOptions": "onnx", "LmEvalOptions": "lm_eval"
    }  # fmt: skip
    assert heading_of(Settings) == "flags"


def test_every_format_has_flags_and_a_description() -> None:
    assert all(format.description and issubclass(format.options, Settings) for format in FORMATS.values())
