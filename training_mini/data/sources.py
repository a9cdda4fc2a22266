"""
Finds the documents of a dataset: the standard library, packages, a generated sample, files, or a dataset on the Hub.

A document is a name and an iterator over pieces of its bytes. The pieces have a limited size, so a file may be larger
than the memory.
"""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shape_mini import nearest_name

from ..arguments import DataArguments
from .files import FoundFiles, find_files, quick_look
from .formats import DataFile
from .packages import package_files, standard_library_files, without_copies
from .questions import python_questions
from .records import (
    EXAMPLE_COLUMNS,
    Document,
    NoTextColumn,
    Record,
    file_documents,
    numbered,
    place_of,
    record_documents,
)
from .samples import chat_examples, instruction_examples, sample_documents

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILT_IN = ("python-stdlib", "python-packages", "python-questions", "sample", "chat-sample", "instruction-sample")


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
    found: FoundFiles | None = None


def open_source(arguments: DataArguments) -> DocumentSource:
    """
    Finds what `--dataset` names. It looks at the names, sizes, times and a few bytes of files, and does not read them.

    Raises:
        ValueError: if there is nothing of that name, or nothing with text in it.
    """
    name = arguments.dataset
    if name == "python-stdlib":
        return file_source(name, FoundFiles([DataFile(file) for file in standard_library_files()]), arguments)
    if name == "python-packages":
        # The standard library comes first, so what is held out of it is what python-stdlib holds out.
        library = standard_library_files()
        source = file_source(name, FoundFiles([DataFile(file) for file in [*library, *package_files()]]), arguments)
        return replace(source, read=lambda: without_copies(source.read(), always=len(library)))
    if name == "sample":
        return DocumentSource(name, "sample-1", lambda advance: "sample-1", sample_documents)
    if name in SAMPLES_OF_EXAMPLES:
        return sample_of_examples(name)
    found = find_files(arguments)
    if found is None:
        return dataset_source(load_hub_dataset(arguments, streaming=False), arguments)
    return file_source(name, found, arguments)


SAMPLES_OF_EXAMPLES = {
    "python-questions": python_questions, "chat-sample": chat_examples, "instruction-sample": instruction_examples,
}  # fmt: skip


def sample_of_examples(name: str) -> DocumentSource:
    """A generated sample of conversations, or of prompts and completions."""
    examples = SAMPLES_OF_EXAMPLES[name]()
    content = json.dumps(examples)
    digest = hashlib.sha256(content.encode()).hexdigest()

    def records() -> Iterator[Record]:
        for number, example in numbered(examples):
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
                try:
                    yield from file_documents(file, arguments)
                except NoTextColumn as error:
                    raise ValueError(str(error).removesuffix(".") + way_around(name, files)) from None

    def records() -> Iterator[Record]:
        for file in files:
            for number, record in numbered(file.records(EXAMPLE_COLUMNS)):
                yield f"{file} record {place_of(number, record)}", record

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


def way_around(name: str, files: list[DataFile]) -> str:
    """The end of a sentence about one file of records: how to read the other files without it."""
    texts = collections.Counter(file.suffix for file in files if file.record_format is None)
    if not texts:
        return "."
    folder = name if Path(name).is_dir() else os.path.dirname(name) or "."
    glob_of_texts = os.path.join(folder, "**", f"*{texts.most_common(1)[0][0]}")
    return f"; or leave that file out by a quoted glob, such as --dataset '{glob_of_texts}'."


def dataset_source(dataset: "Dataset", arguments: DataArguments) -> DocumentSource:
    """Documents of a dataset that is loaded."""
    key = dataset._fingerprint  # of its content
    name = arguments.dataset

    def documents() -> Iterator[Document]:
        yield from record_documents(name, numbered(dataset), arguments.text_column, arguments.errors)

    return DocumentSource(
        name=name,
        quick_key=f"{key} {arguments.text_column}",
        digest=lambda advance: key,
        read=documents,
        records=lambda: ((f"{name} record {number}", record) for number, record in numbered(dataset)),
    )


def load_hub_dataset(arguments: DataArguments, streaming: bool) -> "Dataset | IterableDataset":
    """
    A dataset of the Hub, whole or as a stream.

    Raises:
        ValueError: if there is none of that name, or it cannot be reached.
    """
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
