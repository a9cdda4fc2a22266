"""Finds the files that a path, a folder or a glob means, says what is left out, and notices when a file changes."""

import collections
import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import DataArguments
from .formats import DataFile, known_suffixes
from .records import find_text_column, kind_of_examples

SAMPLED_BYTES = 4096  # of each place of a file that is compared to notice changes
SAMPLED_PLACES = 16


@dataclass
class FoundFiles:
    """
    The files that `--dataset` means.

    Attributes:
        files: the files to read, in order.
        names_left_out: the names of the other files, by the reason for which they are not read.
    """

    files: list[DataFile] = field(default_factory=list)
    names_left_out: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))

    def sentence(self, beginning: str) -> str:
        """A sentence that begins with `beginning` and then says how many files are not read, and why."""
        phrases = [
            f"{printable(names[0])}: {reason}"
            if len(names) == 1
            else f"{len(names):,} such as {printable(names[0])}: {reason}"
            for reason, names in self.names_left_out.items()
        ]
        if not phrases:
            return f"{beginning}."
        return f"{beginning}; left out {sum(map(len, self.names_left_out.values())):,} ({'; '.join(phrases)})."


def find_files(arguments: DataArguments) -> FoundFiles | None:
    """
    The files of a path, a folder or a glob; `None` for a name that may be a dataset on the Hub.

    Raises:
        ValueError: if there is no such file, or none with text.
    """
    name = arguments.dataset
    path = Path(name)
    if path.is_file():
        file = DataFile(path, arguments.encoding, arguments.errors)
        if what := file.why_not_text():
            raise ValueError(f"{name} is no text: {what}.")
        return FoundFiles([file])
    if path.is_dir():
        is_folder, candidates, nothing = True, walk(path), f"There is no file with text in the directory {name!r}"
    elif glob.has_magic(name):
        is_folder, candidates, nothing = False, expand(name), f"The glob {name!r} matches "
        nothing += "no file with text" if any(map(os.path.isfile, candidates)) else "no file"
    else:
        looks_like_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or name.endswith("/")
        if looks_like_path or DataFile(path).suffix in known_suffixes():
            raise ValueError(f"There is no file or directory {name!r}.")
        return None
    found = choose(candidates, is_folder, arguments)
    if not found.files:
        raise ValueError(found.sentence(nothing + (f" ({', '.join(known_suffixes())})" if is_folder else "")))
    return found


def walk(folder: Path) -> Iterator[str]:
    """
    All files in a folder and its subfolders, in the order of their names. Links to folders are followed, each folder
    once. A hidden folder is listed by its name, and the files in it are not.
    """
    entered = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        yield from (os.path.join(parent, name) for name in sorted([*files, *filter(is_hidden, folders)]))
        folders[:] = [
            name
            for name in sorted(folders)
            if not is_hidden(name) and (real := os.path.realpath(os.path.join(parent, name))) not in entered
            and not entered.add(real)
        ]  # fmt: skip


def expand(pattern: str) -> list[str]:
    """
    What a glob matches. `**` goes through the same walk as a folder: Python's own goes through a link to a parent again
    and again, and with two such links it does not end.
    """
    before, stars, after = pattern.partition("**")
    names = after.removeprefix("/").split("/")
    is_whole_name = (not before or before.endswith("/")) and (not after or after.startswith("/"))
    if not stars or not is_whole_name or any(map(is_hidden, names)):
        return glob.glob(pattern, recursive=True)
    return [
        os.path.normpath(file)
        for folder in (glob.glob(before) if before else ["."])
        for file in walk(Path(folder))
        if matches(os.path.relpath(file, folder).split(os.sep), ["**", *filter(None, names)])
    ]


def matches(path: list[str], pattern: list[str]) -> bool:
    """Whether the names on a path match those of a glob, where `**` stands for any number of folders."""
    if not pattern:
        return not path
    if pattern == ["**"]:
        return not any(map(is_hidden, path))
    if pattern[0] == "**" and path and not is_hidden(path[0]) and matches(path[1:], pattern):
        return True
    if pattern[0] == "**":
        return matches(path, pattern[1:])
    is_match = bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and not is_hidden(path[0])
    return is_match and matches(path[1:], pattern[1:])


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def choose(candidates: Iterable[str], is_folder: bool, arguments: DataArguments) -> FoundFiles:
    """
    Chooses the files that are text or records. In a folder these are the files with a known suffix. For a glob they are
    all files, except those whose first bytes show that they are something else.
    """
    found = FoundFiles()
    real_paths: set[str] = set()
    unknown: dict[str, list[DataFile]] = collections.defaultdict(list)
    for candidate in sorted(candidates, key=Path):
        file = DataFile(Path(candidate), arguments.encoding, arguments.errors)
        real = os.path.realpath(candidate)
        if is_folder and is_hidden(file.path.name):
            found.names_left_out["hidden"].append(candidate)
        elif not os.path.isfile(real):
            if not os.path.isdir(real):
                found.names_left_out["a link to nothing, or no file"].append(candidate)
        elif real in real_paths:
            found.names_left_out["a second name of a file that is read"].append(candidate)
        elif is_folder and file.suffix not in known_suffixes():
            unknown[file.path.suffix.lower()].append(file)
        elif reason := file.why_not_text() or why_no_records(file, is_folder, arguments.text_column):
            found.names_left_out[reason].append(candidate)
        else:
            real_paths.add(real)
            found.files.append(file)
    for suffix, files in unknown.items():
        # Only one file of each suffix is opened, because there may be a hundred thousand pictures.
        reason = files[0].why_not_text()
        if reason is None:
            pattern = f"*{suffix}" if suffix else "*"
            reason = f"not among the suffixes of text; a quoted glob such as '{pattern}' reads it"
        found.names_left_out[reason] += map(str, files)
    return found


def why_no_records(file: DataFile, is_folder: bool, text_column: str | None) -> str | None:
    """Why a file in a folder is not read, if its format is often used for settings and it has no text."""
    if not (is_folder and file.record_format is not None and file.record_format.is_often_without_text):
        return None
    try:
        first = next(file.records(), {})
        if text_column is not None or kind_of_examples(first) is None:
            find_text_column(str(file), first, text_column)
    except ValueError:
        return "no records with a column of text in it"
    return None


def printable(name: str) -> str:
    """The name of a file in characters that can be printed, even if the name is not valid text."""
    return name.encode("utf-8", "backslashreplace").decode()


def number_of_files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def quick_look(path: Path) -> dict[str, Any]:
    """
    Facts about a file that change when the file changes. Size and time of modification are not enough: many tools set
    that time back, and it does not change if a file is written twice within one tick of the clock. So there are also
    the time that the system itself notes (ctime, which cannot be set), and samples of the content: all of it up to 64
    KiB, and 16 places of a larger file.
    """
    stat = path.stat()
    samples = hashlib.sha256()
    with open(path, "rb") as stream:
        if stat.st_size <= SAMPLED_BYTES * SAMPLED_PLACES:
            samples.update(stream.read())
        else:
            for place in range(SAMPLED_PLACES):
                stream.seek((stat.st_size - SAMPLED_BYTES) * place // (SAMPLED_PLACES - 1))
                samples.update(stream.read(SAMPLED_BYTES))
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "times": [stat.st_mtime_ns, stat.st_ctime_ns],
        "inode": stat.st_ino,
        "samples": samples.hexdigest(),
    }
