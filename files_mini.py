"""
Writing files that survive a crash: beside the target, flushed to the disk, then renamed over it. A process killed at
any instant leaves either what was there before or what was to be there, complete.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

# What the libraries raise when they cannot write; the last is no Exception.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_text(path: Path, text: str) -> None:
    """Adds to a text file. A process that is killed may leave a part of `text` at the end."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_folder(partial: Path, target: Path) -> None:
    """
    Puts a finished folder in the place of `target`.

    A rename cannot replace a folder that is not empty, so the old one first steps aside as `.NAME.previous`;
    `existing_folder` finds it there if the process dies between the two renames.
    """
    for file in [*partial.rglob("*"), partial]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    previous = previous_of(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    os.rename(partial, target)
    shutil.rmtree(previous, ignore_errors=True)


def previous_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def existing_folder(target: Path) -> Path | None:
    """`target`, or its predecessor if a crash came while it was being replaced, or `None`."""
    return next((folder for folder in (target, previous_of(target)) if folder.is_dir()), None)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """
    Turns whatever a library raises when it cannot write (torch and safetensors have types of their own) into one
    `OSError` that names the target.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        raise not_written(target, reason_of(error)) from error


def not_written(target: Path, reason: str) -> OSError:
    return OSError(f"{target} could not be written ({reason}); what was complete before is still there.")


def reason_of(error: BaseException) -> str:
    """The cause of a failed write, dug out of what torch and safetensors wrap around it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if "unexpected pos" in str(error):  # all that torch's writer says when a write comes back short
        return "a file was cut short: the disk is full, or a quota is reached"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
