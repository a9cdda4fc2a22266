"""
Finds the documents of a dataset: the standard library, a generated sample, files, or a dataset on the Hub.

A document is a name and an iterator over pieces of its bytes. The pieces have a limited size, so a file may be larger
than the memory.
"""

import collections
import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shape_mini import nearest_name

from ..arguments import DataArguments
from . import formats
from .formats import DataFile, known_suffixes
from .samples import chat_examples, instruction_examples, sample_documents

BUILT_IN = ("python-stdlib", "sample", "chat-sample", "instruction-sample")
TEXT_COLUMNS = ("text", "content", "document", "story", "code")
EXAMPLE_COLUMNS = ("messages", "prompt", "completion")
SAMPLED_BYTES = 4096  # read at each of `SAMPLED_PLACES` places of a file, to see whether it has changed
SAMPLED_PLACES = 16

Document = tuple[str, Iterator[bytes]]
Record = tuple[str, dict[str, Any]]  # its name in errors, and its columns


@dataclass(frozen=True)
class DocumentSource:
    """
    The documents of one `--dataset`.

    Attributes:
        name: what the user asked for.
        quick_key: changes whenever the content may have changed. To compute it, little is read.
        digest: computes a hash of the content. It calls its argument with the number of bytes that it has read.
        read: starts an iteration over the documents, always in the same order.
        total_bytes: how many bytes `digest` and `read` will read, for a progress bar; `None` if that is not known.
        records: starts an iteration over the records, with the columns of examples; `None` if it is not records.
        found: the files that are read and those that are not; `None` if the dataset is not files on this disk.
        read_as: the formats of the files, because the same content may be read in another way.
    """

    name: str
    quick_key: str
    digest: Callable[[Callable[[int], None]], str]
    read: Callable[[], Iterator[Document]]
    total_bytes: int | None = None
    records: Callable[[], Iterator[Record]] | None = None
    read_as: str = ""
    found: "FoundFiles | None" = None


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


def printable(name: str) -> str:
    """The name of a file in characters that can be printed, even if the name is not valid text."""
    return name.encode("utf-8", "backslashreplace").decode()


def open_source(arguments: DataArguments) -> DocumentSource:
    """
    Finds what `--dataset` names. It looks at the names, sizes, times and a few bytes of files, and does not read them.

    Raises:
        ValueError: if there is nothing of that name, or nothing with text in it.
    """
    name = arguments.dataset
    if name == "python-stdlib":
        return file_source(name, FoundFiles([DataFile(file) for file in standard_library_files()]), arguments)
    if name == "sample":
        return DocumentSource(name, "sample-1", lambda advance: "sample-1", sample_documents)
    if name in SAMPLES_OF_EXAMPLES:
        return sample_of_examples(name)
    found = find_files(arguments)
    return hub_source(arguments) if found is None else file_source(name, found, arguments)


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
        is_folder, candidates, nothing = False, sorted(glob.glob(name, recursive=True)), f"The glob {name!r} matches "
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


def standard_library_files() -> list[Path]:
    """The modules of the running interpreter's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [
            folder for folder in folders if folder not in left_out
        ]  # to walk installed packages takes a second
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"The standard library of this Python has no source in {root}; name another --dataset.")
    return sorted(files)


SAMPLES_OF_EXAMPLES = {"chat-sample": chat_examples, "instruction-sample": instruction_examples}


def sample_of_examples(name: str) -> DocumentSource:
    """A generated sample of conversations, or of prompts and completions."""
    examples = SAMPLES_OF_EXAMPLES[name]()
    content = json.dumps(examples)
    digest = hashlib.sha256(content.encode()).hexdigest()

    def records() -> Iterator[Record]:
        for number, example in enumerate(examples):
            yield f"{name} record {number}", example

    return DocumentSource(name, digest, lambda advance: digest, lambda: iter(()), records=records)


def file_source(name: str, found: FoundFiles, arguments: DataArguments) -> DocumentSource:
    """The documents of files. A text file is one document; in a file of records each record is one."""
    files = found.files
    stats = [quick_look(file.path) for file in files]

    def digest(advance: Callable[[int], None]) -> str:
        content = hashlib.sha256()
        for file, stat in zip(files, stats, strict=True):
            with open(file.path, "rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
            advance(stat["size"])
        return content.hexdigest()

    def read() -> Iterator[Document]:
        for file in files:
            if file.record_format is None:
                yield str(file), file.pieces()
            else:
                yield from file_documents(file, arguments)

    def records() -> Iterator[Record]:
        for file in files:
            for number, record in enumerate(file.records(EXAMPLE_COLUMNS)):
                yield f"{file} record {number}", record

    has_records = all(file.record_format is not None for file in files)
    # For text only the content matters. For records the format matters too.
    read_as = [file.suffix for file in files] if any(file.record_format is not None for file in files) else []
    return DocumentSource(
        name=name,
        quick_key=json.dumps([stats, arguments.text_column]),
        digest=digest,
        read=read,
        total_bytes=sum(stat["size"] for stat in stats),
        records=records if has_records else None,
        read_as=json.dumps(read_as) if read_as else "",
        found=found,
    )


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


def file_documents(file: DataFile, arguments: DataArguments, first: int = 0) -> Iterator[Document]:
    """The documents of a file of records, beginning with record `first`."""
    column = arguments.text_column
    if column is None:
        record = next(file.records(), None)
        if record is None:
            return
        column = find_text_column(str(file), record, None)
    records = itertools.islice(enumerate(file.records((column,))), first, None)
    yield from record_documents(str(file), records, column, arguments.errors)


def record_documents(
    name: str, records: Iterable[tuple[int, dict[str, Any]]], text_column: str | None, errors: str = "strict"
) -> Iterator[Document]:
    """
    The documents in the text column of numbered records. A record without text gives no document.

    Raises:
        ValueError: if a record does not have the column, or has something other than text in it. The error names it.
    """
    column = text_column
    for number, record in records:
        if column is None:
            column = find_text_column(name, record, None)
        if column not in record:
            raise ValueError(f"Record {number} of {no_column(name, column, record)}")
        text = record[column]
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"Record {number} of {name} has no text in column {column!r} but {type(text).__name__} "
                f"({str(text)[:40]}); in quotes it would be text."
            )
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Programs that cut a text may leave half of a surrogate pair in JSON.
            if errors == "strict":
                raise ValueError(
                    f"Record {number} of {name} has half of a character (U+{ord(text[error.start]):04X}) at character "
                    f"{error.start} of {column!r}: --errors replace reads it as U+FFFD."
                ) from None
            data = re.sub("[\ud800-\udfff]", "\ufffd", text).encode("utf-8")
        size = formats.PIECE_SIZE
        yield f"{name} record {number}", (data[i : i + size] for i in range(0, len(data), size))


def no_column(name: str, column: str, record: dict[str, Any]) -> str:
    hint = nearest_name(column, list(record)) or f"; its columns are {', '.join(record)}."
    return f"{name} has no column {column!r}{hint}"


def find_text_column(name: str, record: dict[str, Any], text_column: str | None) -> str:
    """
    The column with the text: the one that was asked for, one with a usual name, or the only one that contains text.

    Raises:
        ValueError: if there is none, or if the records are conversations, which are not read as text.
    """
    if text_column is not None:
        if text_column not in record:
            raise ValueError(no_column(name, text_column, record))
        return text_column
    if kind_of_examples(record) is not None:
        raise ValueError(
            f"{name} has {' and '.join(record)}, which are learned only where all files are of records, and not "
            f"streamed: leave out the other files or --streaming, or name the column that is text by --text_column."
        )
    for kind in (str, type(None)):  # this record may be one without text
        for column in TEXT_COLUMNS:
            if column in record and isinstance(record[column], kind):
                return column
    columns = [column for column, value in record.items() if isinstance(value, str)]
    if len(columns) > 1:  # in CSV, numbers are text too
        columns = [column for column in columns if not looks_like_number(record[column])]
    if not columns:  # a column with a usual name and no text gives an error when it is read
        columns = [column for column in TEXT_COLUMNS if column in record][:1]
    if len(columns) != 1:
        raise ValueError(
            f"{name} has the columns {', '.join(record)}; say with --text_column which holds the text, or call those "
            f"of examples messages, or prompt and completion."
        )
    return columns[0]


def looks_like_number(text: str) -> bool:
    """Whether a cell is a number, true, false or empty."""
    try:
        float(text or "0")
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def kind_of_examples(record: Collection[str]) -> str | None:
    """The kind of example that a record with these columns is: "messages", "completion", or `None` for text."""
    if "messages" in record:
        return "messages"
    return "completion" if "prompt" in record and "completion" in record else None


def hub_source(arguments: DataArguments) -> DocumentSource:
    """Documents of a dataset on the Hub, through `datasets`."""
    dataset = load_hub_dataset(arguments, streaming=False)
    key = dataset._fingerprint  # of its content
    name = arguments.dataset

    def documents() -> Iterator[Document]:
        yield from record_documents(name, enumerate(dataset), arguments.text_column, arguments.errors)

    return DocumentSource(
        name=name,
        quick_key=f"{key} {arguments.text_column}",
        digest=lambda advance: key,
        read=documents,
        records=lambda: ((f"{name} record {number}", record) for number, record in enumerate(dataset)),
    )


def load_hub_dataset(arguments: DataArguments, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":  # noqa: F821
    import datasets  # imported here, because it takes a second and most corpora do not need it

    name = arguments.dataset
    try:
        return datasets.load_dataset(name, arguments.dataset_config, split=arguments.dataset_split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        hint = nearest_name(name, list(BUILT_IN)) or "."
        raise ValueError(
            f"--dataset {name!r} is no file, directory or glob, is not built in, and could not be loaded from the Hub "
            f"({' '.join(str(error).split())[:200]}){hint}"
        ) from None


class DocumentStream(Protocol):
    """Documents that come one after the other and are not stored, with a position among them."""

    def __iter__(self) -> Iterator[Document]:
        """The documents from the position to the end."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document, in a form that JSON can store."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position. Call it before the iteration begins."""


class FileStream:
    """The records of local files as documents. Each file is read separately, so the files may have other columns."""

    def __init__(self, files: list[DataFile], arguments: DataArguments) -> None:
        self.files, self.arguments = files, arguments
        self._file, self._record = 0, 0  # where the next document is

    def __iter__(self) -> Iterator[Document]:
        while self._file < len(self.files):
            file = self.files[self._file]
            for name, pieces in file_documents(file, self.arguments, self._record):
                self._record = int(name.rpartition(" ")[2]) + 1
                yield name, pieces
            self._file, self._record = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "record": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "examples_iterable" not in state:
            self._file, self._record = state["file"], state["record"]
            return
        # Old checkpoints are from `datasets`, which stored where a table began and how much of it was used.
        inner = state["examples_iterable"]
        begun = inner.get("previous_state") or inner.get("examples_iterable", inner)
        used = inner.get("num_chunks_since_previous_state", 0) if inner.get("previous_state") else 0
        self._file, self._record = begun["shard_idx"], begun["shard_example_idx"] + used
        while self._file < len(self.files):
            length = sum(1 for _ in itertools.islice(self.files[self._file].records(), self._record))
            if length == self._record:
                return
            self._file, self._record = self._file + 1, self._record - length


class HubStream:
    """The records of a dataset on the Hub as documents."""

    def __init__(self, arguments: DataArguments) -> None:
        self.arguments = arguments
        self.dataset = load_hub_dataset(arguments, streaming=True)

    def __iter__(self) -> Iterator[Document]:
        name = self.arguments.dataset
        yield from record_documents(name, self._records(), self.arguments.text_column, self.arguments.errors)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number = -1
        try:
            for number, record in enumerate(self.dataset):
                yield number, record
        except Exception as error:  # any library may be reading this format from the network
            detail = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(
                f"The stream of {self.arguments.dataset!r} broke off after {number + 1:,} records of this run "
                f"({type(error).__name__}: {detail})."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state)


def find_stream(arguments: DataArguments) -> tuple[Callable[[], DocumentStream], tuple[str, ...]]:
    """
    A function that opens the records of a dataset (on the Hub or in local files) as a stream with a position, and
    sentences about the files for the user.

    Raises:
        ValueError: for text files. They need no stream, because they are encoded once and never completely in memory.
    """
    name = arguments.dataset
    found = FoundFiles() if name in BUILT_IN else find_files(arguments)
    if found is None:
        return lambda: HubStream(arguments), ()
    files = [file for file in found.files if file.record_format is not None]
    if not files:
        raise ValueError(
            f"--streaming reads datasets of the Hub and files of records ({', '.join(formats.RECORD_FORMATS)}), and "
            f"{name!r} is neither; leave --streaming out: other text is encoded once and never held in memory."
        )
    texts = [str(file) for file in found.files if file.record_format is None]
    if texts:
        found.names_left_out["text, which is read without --streaming"] += texts
    return lambda: FileStream(files, arguments), (found.sentence(f"Streams {number_of_files(len(files))}"),)


def number_of_files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
