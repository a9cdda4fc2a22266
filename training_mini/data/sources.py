"""
Where documents come from: the standard library, a generated sample, files, or a dataset on the Hub.

A document is a name and an iterator over bounded pieces of its bytes, so that one file larger than memory is no
different from many small ones.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from configuration_mini import nearest_name

from ..arguments import DataArguments
from .samples import chat_examples, instruction_examples, sample_documents

PIECE_SIZE = 1 << 22  # bytes
BUILT_IN = ("python-stdlib", "sample", "chat-sample", "instruction-sample")
TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED_SUFFIXES = (".gz", ".zst")
TEXT_COLUMNS = ("text", "content", "document", "story", "code")

Document = tuple[str, Iterator[bytes]]
Record = tuple[str, dict[str, Any]]  # what errors call it, and its columns


@dataclass(frozen=True)
class DocumentSource:
    """
    The documents of one `--dataset`.

    Attributes:
        name: what the user asked for.
        quick_key: changes whenever the content may have changed, and costs no reading (paths, sizes and times).
        digest: computes a hash of the content itself; calls its argument with the number of bytes gone through.
        read: starts an iteration over the documents, always in the same order.
        total_bytes: what `digest` and `read` will go through, for a progress bar; `None` where nobody knows.
        records: starts an iteration over the records, where that is what there is.
    """

    name: str
    quick_key: str
    digest: Callable[[Callable[[int], None]], str]
    read: Callable[[], Iterator[Document]]
    total_bytes: int | None = None
    records: Callable[[], Iterator[Record]] | None = None


def open_source(arguments: DataArguments) -> DocumentSource:
    """
    Finds what `--dataset` names. Only names, sizes and times are looked at.

    Raises:
        ValueError: if there is nothing of that name, or nothing in it that holds text.
    """
    name = arguments.dataset
    if name == "python-stdlib":
        return file_source(name, standard_library_files(), arguments)
    if name == "sample":
        return DocumentSource(name, "sample-1", lambda advance: "sample-1", sample_documents)
    if name in SAMPLES_OF_EXAMPLES:
        return sample_of_examples(name)
    path = Path(name)
    if path.is_file():
        return file_source(name, [path], arguments)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and base_suffix(file) in all_suffixes())
        if not files:
            raise ValueError(f"There is no file with text ({', '.join(all_suffixes())}) in the directory {name!r}.")
        return file_source(name, files, arguments)
    if glob.has_magic(name):
        files = sorted(file for match in glob.glob(name, recursive=True) if (file := Path(match)).is_file())
        if not files:
            raise ValueError(f"The glob {name!r} matches no file.")
        return file_source(name, files, arguments)
    looks_like_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or name.endswith("/")
    if looks_like_path or base_suffix(path) in all_suffixes():
        raise ValueError(f"There is no file or directory {name!r}.")
    return hub_source(arguments)


def all_suffixes() -> tuple[str, ...]:
    return (*TEXT_SUFFIXES, *RECORD_SUFFIXES)


def base_suffix(path: Path) -> str:
    """The suffix that says what is inside: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def standard_library_files() -> list[Path]:
    """The modules of the running interpreter's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [file for file in root.rglob("*.py") if left_out.isdisjoint(file.relative_to(root).parts)]
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


def file_source(name: str, files: list[Path], arguments: DataArguments) -> DocumentSource:
    """Documents of files: a text file is one, and so is each record of a .jsonl, .csv or .parquet file."""
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]

    def digest(advance: Callable[[int], None]) -> str:
        content = hashlib.sha256()
        for file, (_, size, _) in zip(files, stats, strict=True):
            with open(file, "rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
            advance(size)
        return content.hexdigest()

    def read() -> Iterator[Document]:
        for file in files:
            if base_suffix(file) in RECORD_SUFFIXES:
                yield from record_documents(str(file), read_records(file), arguments.text_column)
            else:
                yield str(file), read_pieces(file)

    def records() -> Iterator[Record]:
        for file in files:
            for number, record in enumerate(read_records(file)):
                yield f"{file} record {number}", record

    total_bytes = sum(size for _, size, _ in stats)
    has_records = all(base_suffix(file) in RECORD_SUFFIXES for file in files)
    return DocumentSource(
        name, json.dumps([stats, arguments.text_column]), digest, read, total_bytes, records if has_records else None
    )


def read_pieces(file: Path) -> Iterator[bytes]:
    """The bytes of a text file, decompressed where its suffix says so."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    try:
        with fsspec.open(str(file), "rb", compression=compression) as stream:
            while piece := stream.read(PIECE_SIZE):
                yield piece
    except (EOFError, OSError, RuntimeError) as error:  # gzip, and zstandard's own subclass of RuntimeError
        if compression is None:
            raise
        raise ValueError(f"{file} is not a complete {compression} file: {error}") from None


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of records, read as a stream."""
    # Here, because datasets and pandas take a second to import and most corpora do not need them.
    import datasets
    import pandas
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it also raises
    builder = RECORD_SUFFIXES[base_suffix(file)]
    if next(read_pieces(file), None) is None:
        return  # datasets has no words for an empty file
    try:
        options = {}
        if builder == "csv":
            columns = pandas.read_csv(file, nrows=0).columns
            if kind_of_examples(columns) is not None:  # of text alone, whatever it looks like: 4, true or None
                features = datasets.Features({column: datasets.Value("string") for column in columns})
                options = {"features": features, "keep_default_na": False}
        yield from datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True, **options)
    except (
        datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, pandas.errors.ParserError, UnicodeDecodeError
    ) as error:  # fmt: skip
        raise ValueError(f"{file} could not be read as {builder}: {error.__cause__ or error}") from None


def record_documents(name: str, records: Iterable[dict[str, Any]], text_column: str | None) -> Iterator[Document]:
    """Documents of the text column of a dataset."""
    column = None
    for number, record in enumerate(records):
        if column is None:
            column = find_text_column(name, record, text_column)
        text = record[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"Record {number} of {name} has no text in column {column!r} but {type(text).__name__}.")
        data = text.encode("utf-8", "replace")
        yield f"{name} record {number}", (data[i : i + PIECE_SIZE] for i in range(0, len(data), PIECE_SIZE))


def find_text_column(name: str, record: dict, text_column: str | None) -> str:
    """
    The column that was asked for, one of the usual name, or the only one that holds text.

    Raises:
        ValueError: if there is none, or the records are conversations, which no caller of this can learn from.
    """
    if text_column is not None:
        if text_column not in record:
            hint = nearest_name(text_column, list(record)) or f"; its columns are {', '.join(record)}."
            raise ValueError(f"{name} has no column {text_column!r}{hint}")
        return text_column
    if kind_of_examples(record) is not None:
        raise ValueError(
            f"{name} has {' and '.join(record)}, which are learned only where all files are of records, and not "
            f"streamed: leave out the other files or --streaming, or name the column that is text by --text_column."
        )
    for kind in (str, type(None)):  # the record at hand may be one without text
        for column in TEXT_COLUMNS:
            if column in record and isinstance(record[column], kind):
                return column
    columns = [column for column, value in record.items() if isinstance(value, str)]
    if len(columns) != 1:
        raise ValueError(
            f"{name} has the columns {', '.join(record)}; say with --text_column which holds the text, or call those "
            f"of examples messages, or prompt and completion."
        )
    return columns[0]


def kind_of_examples(record: Container[str]) -> str | None:
    """What a record with these columns teaches: "messages", "completion", or nothing but its text."""
    if "messages" in record:
        return "messages"
    return "completion" if "prompt" in record and "completion" in record else None


def hub_source(arguments: DataArguments) -> DocumentSource:
    """Documents of a dataset on the Hub, through `datasets`."""
    dataset = load_hub_dataset(arguments, streaming=False)
    key = dataset._fingerprint  # of its content
    return DocumentSource(
        name=arguments.dataset,
        quick_key=f"{key} {arguments.text_column}",
        digest=lambda advance: key,
        read=lambda: record_documents(arguments.dataset, dataset, arguments.text_column),
        records=lambda: ((f"{arguments.dataset} record {i}", record) for i, record in enumerate(dataset)),
    )


def load_hub_dataset(arguments: DataArguments, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":  # noqa: F821
    import datasets

    name = arguments.dataset
    try:
        return datasets.load_dataset(name, arguments.dataset_config, split=arguments.dataset_split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        hint = nearest_name(name, list(BUILT_IN)) or "."
        raise ValueError(
            f"--dataset {name!r} is no file, directory or glob, is not built in, and could not be loaded from the Hub "
            f"({' '.join(str(error).split())[:200]}){hint}"
        ) from None


def open_stream(arguments: DataArguments) -> "datasets.IterableDataset":  # noqa: F821
    """
    The records of a dataset as a stream that knows its position: of the Hub, or of local files of records.

    Raises:
        ValueError: for text files, which are no dataset and need no stream: they are encoded once and never in memory.
    """
    import datasets

    name = arguments.dataset
    path = Path(name)
    candidates = sorted(path.rglob("*")) if path.is_dir() else [Path(file) for file in sorted(glob.glob(name))]
    files = [file for file in candidates if file.is_file() and base_suffix(file) in RECORD_SUFFIXES]
    if files:
        builders = {RECORD_SUFFIXES[base_suffix(file)] for file in files}
        if len(builders) > 1:
            raise ValueError(f"--streaming reads records of one kind, and {name!r} has {', '.join(sorted(builders))}.")
        return datasets.load_dataset(
            builders.pop(), data_files=[str(file) for file in files], split="train", streaming=True
        )
    if candidates or name in BUILT_IN or path.suffix in all_suffixes():
        raise ValueError(
            f"--streaming reads datasets of the Hub and files of records ({', '.join(RECORD_SUFFIXES)}), and {name!r} "
            f"is neither; leave --streaming out: other text is encoded once and never held in memory."
        )
    return load_hub_dataset(arguments, streaming=True)
