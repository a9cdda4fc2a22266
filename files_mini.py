"""
Writing files that survive a crash: beside the target, flushed to the disk, then renamed over it. A process killed at
any instant leaves either what was there before or what was to be there, complete.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RUNS_FOLDER = Path("runs")
# The folders of a run that hold a model, in the order in which they are tried: the best one so far, the last one, and
# behind each what a crash may have left of it.
CHECKPOINTS_OF_A_RUN = ("best", ".best.previous", "final", ".final.previous")

# The trained model that comes with Mini, and the adapter with which it answers: the folder of each name for --model.
BOX = {name: Path(__file__).parent / "box_mini" / folder for name, folder in (("box", "model"), ("box-chat", "chat"))}

MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


def cache_folder() -> Path:
    """Where encoded corpora and measurements are kept: MINI_CACHE, or ~/.cache/mini."""
    return Path(os.environ.get("MINI_CACHE") or Path.home() / ".cache" / "mini")


def find_checkpoint(model: str | None) -> str:
    """
    The checkpoint folder, adapter folder or Hub name that `--model` means: without a name the newest run, or else the
    model that comes with Mini.

    Raises:
        ValueError: if there is none.
    """
    if model in BOX:
        if not BOX[model].is_dir():
            raise ValueError(f"This installation of Mini has no {model!r}: name another model, or install Mini anew.")
        return str(BOX[model])
    if model is None:
        configs = [
            path for run in RUNS_FOLDER.glob("*") for name in CHECKPOINTS_OF_A_RUN
            for config in (MODEL_CONFIG, ADAPTER_CONFIG) for path in run.glob(f"{name}/{config}")
        ]  # fmt: skip
        if not configs and BOX["box"].is_dir():
            return str(BOX["box"])
        if not configs:
            raise ValueError(f"There is no trained model under {RUNS_FOLDER}/: train one first, or name it by --model.")
        newest_run = max(configs, key=lambda path: path.stat().st_mtime).parent.parent
        return find_checkpoint(str(newest_run))
    folder = Path(model)
    if not folder.exists():
        if model.count("/") == 1 and not model.startswith(".") and not folder.parent.is_dir():
            return model
        if named := re.match(r"https?://huggingface\.co/([^/]+/[^/]+)", model):
            raise ValueError(f"{model!r} is an address: the name of that model on the Hub is {named[1]}.")
        raise ValueError(f"There is no run or checkpoint folder {model!r}.")
    for place in (folder, *(folder / name for name in CHECKPOINTS_OF_A_RUN)):
        if (place / MODEL_CONFIG).is_file() or (place / ADAPTER_CONFIG).is_file():
            return model if place == folder else str(place)
    if (folder / "trainer_state.json").is_file():
        raise ValueError(f"{model!r} is a state to resume training from; name its run, or the folder best or final.")
    if (folder / "config.yaml").is_file():  # a run
        raise ValueError(f"The run {model!r} has no model yet: the first one is saved at the first evaluation.")
    raise ValueError(f"{model!r} holds no trained model: it has no config.json, and no best or final folder with one.")


def is_box(checkpoint: str) -> bool:
    """Whether a checkpoint folder is the model that comes with Mini, or its adapter."""
    return Path(checkpoint) in BOX.values()


def run_of(folder: Path) -> Path | None:
    """The run that a folder is `best` or `final` of, by its name."""
    return folder.parent if folder.name in CHECKPOINTS_OF_A_RUN and folder.parent.name else None


def display_name(name_or_path: str) -> str:
    """
    What people call a model: its name on the Hub, or of a folder the name, without the folders that it lies in.
    `runs/NAME/best` is `NAME`, as on the command line; the other folder of a run is `NAME/final`; what comes with Mini
    is `box` or `box-chat`.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        return name_or_path
    folder = folder.resolve()
    if boxed := next((name for name, place in BOX.items() if place.resolve() == folder), None):
        return boxed
    run = run_of(folder)
    if run is None:
        return folder.name
    return f"{run.name}/final" if "final" in folder.name else run.name


def write_errors() -> tuple[type[BaseException], ...]:
    """What libraries raise when they cannot write. Call it only after something was raised, because it loads torch."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

    return OSError, RuntimeError, SafetensorError, CheckpointException


def read_text(path: Path) -> str:
    """The text of a file; raises ValueError, naming it, where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error.reason} at byte {error.start}).") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; raises ValueError, naming it, where there is none."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


def json_lines(values: Iterable[dict[str, Any]]) -> str:
    """One line of JSON for each value."""
    return "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """
    The objects in a file of JSON lines, without a line that a crash cut short and one that holds something else; none
    where there is no file.
    """
    values = []
    # Not splitlines(): strings may hold other characters that it takes for the end of a line.
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that name a step: `metrics.jsonl` and `samples.jsonl` of a run."""
    return [line for line in read_json_lines(path) if isinstance(line.get("step"), int)]


def write_text(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # it may be what fills the disk
        raise


def append_text(path: Path, text: str) -> None:
    """Adds to a text file. A process that is killed may leave a part of `text` at the end."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_folder(partial: Path, target: Path) -> None:
    """
    Puts a finished folder in the place of `target`.

    A rename cannot replace a folder that is not empty, so the old one first steps aside as `.NAME.previous`. It stays
    there, complete, if the process dies between the two renames: `CHECKPOINTS_OF_A_RUN` names it too.
    """
    for file in [*partial.rglob("*"), partial]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    previous = target.with_name(f".{target.name}.previous")
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    os.rename(partial, target)
    shutil.rmtree(previous, ignore_errors=True)


def destination(out: str | Path, overwrite: bool, source: str | Path) -> Path:
    """
    Where a folder that is made of another one is to be, with links followed.

    Args:
        out: as the user named it, "OUT" in the messages.
        overwrite: whether what is in it may go.
        source: what is read, and must not be lost. The name of a model on the Hub lies in no folder here.

    Raises:
        ValueError: if it cannot be a folder, holds something, or would take the source or the folder of the user away.
    """
    target, place = Path(out).resolve(), Path(source).resolve()
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"OUT must be a folder, and {str(out if path == target else path)!r} is a file.")
    if place.is_dir() and place.is_relative_to(target):
        raise ValueError(f"{str(source)!r} is read from OUT, {str(out)!r}, and would be lost: name another folder.")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"OUT, {str(out)!r}, holds the folder that you are in: name another one.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"There is something in {str(out)!r} already: name another folder, or --overwrite it.")
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into. At the end of the context it takes the place of `target`; after an error it is gone."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with writing(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        with writing(target):
            replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """
    Turns whatever a library raises when it cannot write (torch and safetensors have types of their own) into one
    `OSError` that names the target.
    """
    try:
        yield
    except write_errors() as error:
        raise not_written(target, reason_of(error)) from error


def not_written(target: Path, reason: str) -> OSError:
    """The error for a write that failed, in one sentence; of a partial file it names what that was to become."""
    if match := re.fullmatch(r"\.(.+?)(\.\d+)?\.partial", target.name):
        target = target.with_name(match[1])
    return OSError(f"{target} could not be written ({reason}); what was complete before is still there.")


def reason_of(error: BaseException) -> str:
    """The cause of a failed write, dug out of what torch and safetensors wrap around it."""
    if failures := getattr(error, "failures", None):  # of torch's CheckpointException, by process
        error = next(iter(failures.values()))[0]
    if "unexpected pos" in str(error):  # all that torch's writer says when a write comes back short
        return "a file was cut short: the disk is full, or a quota is reached"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
