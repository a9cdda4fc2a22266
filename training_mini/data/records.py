"""Finds the column of a record that is its text, and makes documents of the texts of records."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

from shape_mini import nearest_name

from ..arguments import DataArguments
from . import formats
from .formats import DataFile, PlacedRecord

TEXT_COLUMNS = ("text", "content", "document", "story", "code")
EXAMPLE_COLUMNS = ("messages", "prompt", "completion")

Document = tuple[str, Iterator[bytes]]  # its name in errors, and its text as UTF-8, in pieces
Record = tuple[str, dict[str, Any]]  # its name in errors, and its columns
T = TypeVar("T")


class NoTextColumn(ValueError):
    """Records of which nobody said which column is the text. One such file stops a folder of good ones."""


def numbered(records: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Records with the numbers that errors name them by, from 1."""
    return enumerate(records, start=1)


def place_of(number: int, record: dict[str, Any]) -> str:
    """The number of a record for errors, with its line where that is another number."""
    return f"{number} ({record.place})" if isinstance(record, PlacedRecord) else f"{number}"


def file_documents(
    file: DataFile,
    arguments: DataArguments,
    number: Callable[[Iterator[dict[str, Any]]], Iterator[tuple[int, dict[str, Any]]]] = numbered,
) -> Iterator[Document]:
    """The documents of a file of records. `number` gives each record its number, and may leave out the first ones."""
    column = arguments.text_column
    if column is None:
        record = next(file.records(), None)
        if record is None:
            return
        column = find_text_column(str(file), record, None)
    yield from record_documents(str(file), number(file.records((column,))), column, arguments.errors)


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
        place = place_of(number, record)
        if column not in record:
            raise NoTextColumn(f"Record {place} of {no_column(name, column, record)}")
        text = record[column]
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"Record {place} of {name} has no text in column {column!r} but {type(text).__name__} "
                f"({str(text)[:40]}); in quotes it would be text."
            )
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Programs that cut a text may leave half of a surrogate pair in JSON.
            if errors == "strict":
                raise ValueError(
                    f"Record {place} of {name} has half of a character (U+{ord(text[error.start]):04X}) at character "
                    f"{error.start + 1} of {column!r}: --errors replace reads it as U+FFFD."
                ) from None
            data = re.sub("[\ud800-\udfff]", "\ufffd", text).encode("utf-8")
        size = formats.PIECE_SIZE
        yield f"{name} record {place}", (data[i : i + size] for i in range(0, len(data), size))


def find_text_column(name: str, record: dict[str, Any], text_column: str | None) -> str:
    """
    The column with the text: the one that was asked for, one with a usual name, or the only one that contains text.

    Raises:
        ValueError: if there is none, or if the records are conversations, which are not read as text.
    """
    if text_column is not None:
        if text_column not in record:
            raise NoTextColumn(no_column(name, text_column, record))
        return text_column
    if kind_of_examples(record) is not None:
        raise NoTextColumn(
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
        raise NoTextColumn(
            f"{name} has the columns {', '.join(record)}; say with --text_column which holds the text, or call those "
            f"of examples messages, or prompt and completion."
        )
    return columns[0]


def no_column(name: str, column: str, record: dict[str, Any]) -> str:
    hint = nearest_name(column, list(record)) or f"; its columns are {', '.join(record)}."
    return f"{name} has no column {column!r}{hint}"


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
