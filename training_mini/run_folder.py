"""The folder of a run. Only one run at a time trains into it, and other files are never overwritten."""

import contextlib
import errno
import glob
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from .arguments import Arguments
from .distributed import Parallel

LOCK, SETTINGS = ".lock", "config.yaml"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the errors of file systems that have no locks


class RunFolder:
    """
    A folder into which only this run writes, until `release`. The main process locks a file in it. However the process
    ends, the kernel releases the lock, so a killed run does not block the next one.

    Attributes:
        path: the folder.
        problem: a sentence for the user if the file system has no locks; otherwise empty.

    Raises:
        ValueError: if a run, or anything else, is there already, or another process trains into it.
    """

    def __init__(self, arguments: Arguments, parallel: Parallel) -> None:
        self.path, self.problem = arguments.output_dir, ""
        self._lock = FileLock(self.path / LOCK, on_acquired=write_holder)
        check_contents(self.path, arguments)
        parallel.accelerator.wait_for_everyone()  # no process makes the folder before all have checked it
        self.path.mkdir(parents=True, exist_ok=True)
        error: Exception | None = None
        if parallel.accelerator.is_main_process:
            try:
                self._acquire()
                check_contents(self.path, arguments)  # again: another run may have begun and ended since
            except (OSError, ValueError) as caught:
                error = caught
                self.release()
        parallel.raise_everywhere(error)

    def _acquire(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"{holder_of(self.path)} trains into {str(self.path)!r} at this moment: wait for its end or stop it, "
                f"or choose another --output_dir."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.problem = (
                f"The file system of {str(self.path)!r} has no locks, so nothing would stop a second process from "
                f"training into it."
            )

    def release(self) -> None:
        """Lets other runs use the folder. A folder that is still empty is removed."""
        if self._lock.is_locked:
            # The file is removed before the lock is released. Another filelock that waits for it notices, and tries
            # again.
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def files(self) -> set[Path]:
        """What a run has written: its files, links and folders. What a link leads to is not among them."""
        at_the_top = contents(self.path)
        return {path for path in self.path.rglob("*") if path.parent != self.path or path in at_the_top}

    def remove(self, files: set[Path]) -> None:
        """
        Removes files, and folders in which nothing is left. The settings go last: if this is killed, the folder still
        counts as a run.
        """
        settings = self.path / SETTINGS
        for path in sorted(files, key=lambda path: (path != settings, path), reverse=True):  # files before folders
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif not any(path.iterdir()):
                path.rmdir()


def contents(folder: Path) -> list[Path]:
    """The files and folders in a folder, without the lock, and without settings that a process died while writing."""
    paths = folder.iterdir() if folder.is_dir() else []
    return [path for path in paths if path.name != LOCK and not path.match(f".{SETTINGS}.*.partial")]


def check_contents(folder: Path, arguments: Arguments) -> None:
    """
    Raises:
        ValueError: if this run would write into another run, or into what is not the folder of a run, or may not write
            what it has to.
    """
    if place := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"output_dir must be a folder, and {str(place)!r} is a file.")
    if not contents(folder):
        return
    if arguments.run.resume:
        if (checkpoints := folder / "checkpoints").is_dir() and not may_change(checkpoints):
            raise ValueError(f"--resume cannot write into {str(checkpoints)!r}: make it writable.")
        return
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{str(folder)!r} holds files that are not a run of Mini; choose another --output_dir.")
    if not arguments.run.overwrite:
        raise ValueError(
            f"There is a run in {str(folder)!r} already: go on with it by --resume, replace it by --overwrite, "
            f"or choose another --output_dir."
        )
    for place, *_ in os.walk(folder):
        if not may_change(place) or (os.path.ismount(place) and place != str(folder)):
            raise ValueError(
                f"--overwrite cannot remove {place!r}, because it is not writable or a disk is mounted there: change "
                f"that, or choose another --output_dir."
            )
    sources = {"model": arguments.model.model, "dataset": arguments.data.dataset, "tokenizer": arguments.data.tokenizer}
    for setting, name in sources.items():
        for path in [name, *glob.iglob(name)] if name is not None else []:
            if os.path.exists(path) and Path(path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{setting} {name!r} lies in {str(folder)!r}, and --overwrite would remove it: choose another "
                    f"--output_dir."
                )


def may_change(folder: str | Path) -> bool:
    """Whether this process may write into a folder and remove what is in it."""
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def write_holder(descriptor: int) -> None:
    """Writes this process and machine into the file of the lock."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def holder_of(folder: Path) -> str:
    """The process that trains into a folder, as the beginning of a sentence."""
    with contextlib.suppress(OSError):
        if holder := (folder / LOCK).read_text(encoding="utf-8"):
            return holder[0].upper() + holder[1:]
    return "Another process"
