"""
Recognises what is in a file, and turns its bytes into text or records.

To add a format of records, write a function that reads them and give it a suffix in `RECORD_FORMATS`. Everything else
(folders, globs, compression, examples, streaming, the cache) follows from that one line.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import re
import string
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

PIECE_SIZE = 1 << 22  # bytes that are read at a time
HEAD_SIZE = 512  # the bytes by which a file is recognised: a tar archive has its mark at byte 257
TEXT_SUFFIXES = (".txt", ".md", ".py")

# The first bytes of files that are not text, and what the user can do.
FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF; pdftotext makes text of it"),
    (b"PK\x03\x04", "a zip archive or an office document; unpack it, or save it as text"),
    (b"PK\x05\x06", "a zip archive with nothing in it"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document; save it as text"),
    (b"\x1f\x8b", "compressed by gzip; end its name in .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; end its name in .zst"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it by xz -d"),
    (b"\x04\x22\x4d\x18", "compressed by lz4; unpack it by lz4 -d"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it"),
    (b"\x89PNG\r\n\x1a\n", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF87a", "a picture"),
    (b"GIF89a", "a picture"),
    (b"MZ", "a program"),
    (b"OggS\x00", "a recording"),
    (b"ID3\x02", "a recording"),
    (b"ID3\x03", "a recording"),
    (b"ID3\x04", "a recording"),
    (b"\x7fELF", "a program"),
    (b"\xca\xfe\xba\xbe", "a program"),
    (b"\x00asm", "a program"),
    (b"SQLite format 3\x00", "a database; export its text as CSV"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"PAR1", "a Parquet file; end its name in .parquet"),
    (b"ARROW1\x00\x00", "an Arrow file; save it as Parquet"),
    (b"GGUF", "a model"),
)
BYTE_ORDER_MARKS = {  # the longer ones first, because the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class DataFile:
    """
    A file of text or of records.

    Attributes:
        path: the file. A suffix `.gz` or `.zst` means that it is compressed. Suffixes may be in capital letters.
        encoding: the encoding, if the file is not UTF-8.
        errors: "strict", or "replace" to read bytes that are not valid in the encoding as U+FFFD.
    """

    path: Path
    encoding: str = "utf-8"
    errors: str = "strict"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def compression(self) -> str | None:
        """`.gz`, `.zst`, or `None`."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else None

    @property
    def suffix(self) -> str:
        """The suffix of the content, in small letters: `.jsonl` for `A.JSONL.gz`."""
        return (Path(self.path.stem) if self.compression else self.path).suffix.lower()

    @property
    def record_format(self) -> "RecordFormat | None":
        """How its records are read; `None` for text."""
        return RECORD_FORMATS.get(self.suffix)

    def raw_pieces(self, size: int | None = None) -> Iterator[bytes]:
        """
        Its bytes without compression, in pieces of about `size` (`PIECE_SIZE`).

        Raises:
            ValueError: if the compressed data is damaged or cut short.
        """
        size = size or PIECE_SIZE
        if self.compression is None:
            with open(self.path, "rb") as stream:
                while piece := stream.read(size):
                    yield piece
            return
        try:
            yield from COMPRESSIONS[self.compression](self.path, size)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            name = {".gz": "gzip", ".zst": "zstd"}[self.compression]
            raise ValueError(f"{self} is not a complete {name} file: {error}") from None

    @functools.cached_property
    def head(self) -> bytes:
        """Its first bytes without compression, `HEAD_SIZE` at most."""
        with contextlib.closing(self.raw_pieces(HEAD_SIZE)) as pieces:
            return next(pieces, b"")[:HEAD_SIZE]

    def why_not_text(self) -> str | None:
        """What the file is, if its first bytes show that it has neither text nor records; otherwise `None`."""
        if self.suffix == ".parquet":
            return None  # its reader says what is wrong with it
        head = self.head
        for first, what in FIRST_BYTES:
            # Letters alone may begin a text too, and only what is not one has a NUL soon behind them.
            if head.startswith(first) and (not first.isalnum() or b"\x00" in head[:64]):
                return what
        if head[257:262] == b"ustar":
            return "a tar archive; unpack it by tar -x"
        if re.match(rb"BZh[1-9]1AY&SY", head):
            return "compressed by bzip2; unpack it by bunzip2"
        if head.startswith(b"RIFF") and head[8:12] in (b"WAVE", b"WEBP", b"AVI "):
            return "a picture or a recording"
        if self.suffix not in TEXT_SUFFIXES and self.record_format is None and self.encoding == "utf-8":
            is_marked = any(head.startswith(mark) for mark in BYTE_ORDER_MARKS)
            if b"\x00" in head and not is_marked:
                return "a file of bytes and not of text; end its name in .txt to learn the bytes as they are"
        return None

    @property
    def is_asked_as_wide(self) -> bool:
        return self.encoding.startswith(("utf-16", "utf-32"))

    @functools.cached_property
    def own_encoding(self) -> str:
        """
        The encoding with which this file is read: UTF-8 if it is valid UTF-8, and otherwise the one that was asked for.
        So one flag reads a folder in which some files are UTF-8. Some encodings (UTF-7, ISO-2022, EBCDIC) write other
        characters with the bytes of ASCII. Their files may look like UTF-8, so they are read as the user asked.
        """
        if self.encoding in ("utf-8", "utf-8-sig"):
            return self.encoding
        letters, is_wide = string.printable.encode(), self.is_asked_as_wide
        writes_in_ascii = self.encoding.startswith(("utf-7", "iso2022", "hz"))
        if writes_in_ascii or (not is_wide and letters.decode(self.encoding, "replace").encode("utf-8") != letters):
            return self.encoding
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for piece in self.raw_pieces():
                if is_wide and b"\x00" in piece:
                    return self.encoding
                decoder.decode(piece)
            decoder.decode(b"", True)
        except UnicodeDecodeError:
            return self.encoding
        return "utf-8"

    def pieces(self) -> Iterator[bytes]:
        """
        Its text as UTF-8. A file in UTF-8 gives exactly its bytes, valid or not.

        Raises:
            ValueError: if it begins like UTF-16 and the user did not say so, or if it is not valid in an encoding other
                than UTF-8. The error names the file and the byte.
        """
        self._refuse_unnamed_utf16()
        if self.own_encoding == "utf-8":
            yield from self.raw_pieces()
        else:
            for text in self.texts():
                yield text.encode("utf-8")

    def texts(self) -> Iterator[str]:
        """
        Its text, without a byte order mark.

        Raises:
            ValueError: if it is not valid in its encoding. The error names the file and the byte.
        """
        self._refuse_unnamed_utf16()
        is_first = True
        for text in decoded(str(self), self.raw_pieces(), self.own_encoding, self.errors):
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False

    def _refuse_unnamed_utf16(self) -> None:
        if not self.is_asked_as_wide:
            for mark, encoding in BYTE_ORDER_MARKS.items():
                if self.head.startswith(mark):
                    raise ValueError(
                        f"{self} begins as {encoding.upper()} does: --encoding {encoding} reads it, and files that are "
                        f"UTF-8 beside it."
                    )

    def records(self, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """
        Its records, read as a stream.

        Args:
            columns: the columns that are needed; others may be left out.

        Raises:
            ValueError: if the file cannot be read in the format of its suffix. The error names the file.
        """
        return self.record_format.read(self, columns)


def decoded(name: str, pieces: Iterable[bytes], encoding: str, errors: str) -> Iterator[str]:
    """
    The text of pieces of bytes. A character may be split between two pieces.

    Raises:
        ValueError: if the bytes are not valid in the encoding and `errors` is `"strict"`. The error names the document
            and the byte.
    """
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    offset = 0
    for piece, is_last in with_end(pieces):
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, is_last)
        except UnicodeDecodeError as error:
            at = offset - held_back + error.start
            # `encoding` is the standard name, such as iso8859-1, and not what the user typed.
            title = "UTF-8" if encoding == "utf-8" else f"{encoding} text"
            advice = "--errors replace reads such bytes as U+FFFD"
            if encoding == "utf-8":
                advice = f"{guess_of_encoding(error.object)}; {advice}; --tokenizer byte keeps the bytes of a text"
            raise ValueError(f"{name} is not valid {title} at byte {at} ({error.reason}): {advice}.") from None
        offset += len(piece)
        if text:
            yield text


def with_end(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each piece with `False`, and at the end an empty piece with `True`."""
    for piece in pieces:
        yield piece, False
    yield b"", True


def guess_of_encoding(data: bytes) -> str:
    """A guess at the encoding of bytes that are not UTF-8, offered to the user and never taken by the program."""
    if data[1::2].count(0) > len(data) / 5:
        return "--encoding utf-16-le reads it if it is UTF-16"
    if data[::2].count(0) > len(data) / 5:
        return "--encoding utf-16-be reads it if it is UTF-16"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "--encoding latin-1 reads it if it is Western European"
    return "--encoding cp1252 reads it if it is Western European"


def gunzip(path: Path, size: int) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while piece := stream.read(size):
            yield piece


def unzstd(path: Path, size: int) -> Iterator[bytes]:
    """Like `gunzip`. zstandard's stream reader does not notice that a file is cut, so this checks the frames' ends."""
    decompressor = None
    with open(path, "rb") as stream:
        while data := stream.read(min(size, 1 << 14)):  # the result of one piece is in memory as a whole
            while data:
                if decompressor is None or decompressor.eof:
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
                if piece := decompressor.decompress(data):
                    yield piece
                data = decompressor.unused_data if decompressor.eof else b""
    if decompressor is not None and not decompressor.eof:
        raise EOFError("it ends in the middle of its data")


COMPRESSIONS: dict[str, Callable[[Path, int], Iterator[bytes]]] = {".gz": gunzip, ".zst": unzstd}


def json_records(file: DataFile, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """One record in each line, or one list of records. A column may have another type in each record."""
    texts = file.texts()
    beginning = ""  # blank lines stay in it: errors count lines and characters
    while not beginning.strip() and (text := next(texts, None)) is not None:
        beginning += text
    values_of = json_values_of_list if beginning.lstrip().startswith("[") else json_values_of_lines
    values = values_of(file, itertools.chain([beginning], texts))
    for number, (place, value) in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise unreadable(file, "json", f"{place} is no object but {str(value)[:40]!r}")
        yield value if place.endswith(f" {number}") else PlacedRecord(value, place)


class PlacedRecord(dict):
    """A record after blank lines, so that its number is not that of its line; `place` is such as "line 5"."""

    def __init__(self, columns: dict[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place


def json_values_of_lines(file: DataFile, texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines_of(texts), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # also for too many digits, or too many nested lists
                needed = "needed is one object a line, or one list of objects"
                raise unreadable(file, "json", f"line {number}: {error}; {needed}") from None


def json_values_of_list(file: DataFile, texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values of one list. Only one value and one piece of the file are in memory."""
    decoder, texts = json.JSONDecoder(), iter(texts)
    text, gone, number = next(texts), 0, 0
    at = text.index("[") + 1
    while True:
        while True:
            at = NO_VALUE.match(text, at).end()
            try:
                if at == len(text):
                    raise json.JSONDecodeError("the list does not end", text, at)
                if text[at] == "]":
                    break
                value, end = decoder.raw_decode(text, at)
                break
            except json.JSONDecodeError as error:
                # The value may be cut: if the error is at the end of what was read, or a string does not end, read
                # more.
                may_be_cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
                more = next(texts, None) if may_be_cut else None
                if more is None:
                    detail = f"record {number + 1}, character {gone + error.pos + 1}: {error.msg}"
                    raise unreadable(file, "json", detail) from None
                gone, text, at = gone + at, text[at:] + more, 0
            except (ValueError, RecursionError) as error:  # too many digits, or too many nested lists
                raise unreadable(file, "json", f"record {number + 1}: {error}") from None
        if text[at] == "]":
            if text[at + 1 :].strip() or any(more.strip() for more in texts):
                raise unreadable(file, "json", f"there is something behind the list of {number} records")
            return
        yield f"record {number + 1}", value
        at, number = end, number + 1


NO_VALUE = re.compile(r"[\s,]*")


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces, without their ends. Only a line feed ends a line."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        yield from lines
    if rest:
        yield rest


CSV_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")


def csv_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces, with their ends: line feed, carriage return, or both."""
    rest = ""
    for text in texts:
        rest += text
        # A carriage return at the end of a piece may be followed by a line feed in the next.
        end = max(rest.rfind("\n"), rest.rfind("\r", 0, len(rest) - 1)) + 1
        yield from CSV_LINE.findall(rest, 0, end)
        rest = rest[end:]
    if rest:
        yield rest


def separated_records(
    file: DataFile, columns: Collection[str] | None, separator: str, name: str
) -> Iterator[dict[str, Any]]:
    """
    The rows after a header. Every cell is text, exactly as in the file: also `NA`, `007`, `true` and dates. If a row
    has too few cells, its last columns are `None`.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell of more than 128 KiB
    end = "end of the file"  # if this does not come back as a row of its own, a quote was not closed
    reader = csv.reader(itertools.chain(csv_lines(file.texts()), [f'"{end}"']), delimiter=separator)
    rows = ((row, reader.line_num) for row in reader if row)
    header: list[str] | None = None
    try:
        row, line = next(rows)
        for next_row, next_line in rows:
            if header is None:
                header = row
                refuse_other_separator(file, header, separator, columns)
            else:
                if any(row[len(header) :]):
                    counts = f"{len(row)} cells, and the header {len(header)}"
                    raise unreadable(file, name, f"the row that ends in line {line} has {counts}")
                cells = row[: len(header)] + [None] * (len(header) - len(row))
                # If two columns have the same name, the first is used.
                yield dict.fromkeys(header) | dict(zip(reversed(header), reversed(cells), strict=True))
            row, line = next_row, next_line
    except csv.Error as error:
        raise unreadable(file, name, f"line {reader.line_num}: {error}") from None
    if row != [end]:
        raise unreadable(file, name, 'a quote (") that begins a cell is never closed')


def refuse_other_separator(file: DataFile, header: list[str], separator: str, columns: Collection[str] | None) -> None:
    """Raises ValueError if there is one column whose name contains another separator, unless the user named it."""
    if len(header) > 1 or header[0] in (columns or ()):
        return
    if found := [other for other in ",;\t|" if other in header[0] and other != separator]:
        raise ValueError(
            f"{file} has one column only, of the name {header[0]!r}. If {found[0]!r} separates its columns, save it "
            f"with commas, or with tabs as .tsv; if it is one column, say so by --text_column {header[0]!r}."
        )


def parquet_records(file: DataFile, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """The rows of the columns that are asked for. A compressed file is in memory as a whole."""
    import pyarrow.parquet  # imported here, because it takes long and most corpora do not need it

    source = io.BytesIO(b"".join(file.raw_pieces())) if file.compression else file.path
    try:
        with pyarrow.parquet.ParquetFile(source) as table:
            fields = [field for field in table.schema_arrow if columns is None or field.name in columns]
            in_json = [field.name for field in fields if "arrow.json" in str(field.type)]
            for batch in table.iter_batches(batch_size=1024, columns=[field.name for field in fields]):
                for record in batch.to_pylist():
                    yield record | {name: from_json(record[name]) for name in in_json}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also for one text, number or date
        raise unreadable(file, "parquet", error) from None


def from_json(value: Any) -> Any:
    """Parses the strings of a JSON column. `datasets` stores messages like this if their fields differ."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return json.loads(value) if isinstance(value, str) else value


def unreadable(file: DataFile, format_name: str, detail: object) -> ValueError:
    return ValueError(f"{file} could not be read as {format_name}: {' '.join(str(detail).split())}.")


@dataclass(frozen=True)
class RecordFormat:
    """
    A format of records.

    Attributes:
        read: gives the records of a file. It may leave out columns that it is not asked for. It raises ValueError where
            the file is not of the format, naming it.
        is_often_without_text: whether such files often contain settings or tables. If such a file in a folder has no
            text, it is left out and counted; it is not an error.
    """

    read: Callable[[DataFile, Collection[str] | None], Iterator[dict[str, Any]]]
    is_often_without_text: bool = False


RECORD_FORMATS = {
    ".jsonl": RecordFormat(json_records),
    ".ndjson": RecordFormat(json_records, is_often_without_text=True),
    ".json": RecordFormat(json_records, is_often_without_text=True),
    ".csv": RecordFormat(functools.partial(separated_records, separator=",", name="csv")),
    ".tsv": RecordFormat(functools.partial(separated_records, separator="\t", name="tsv"), is_often_without_text=True),
    ".parquet": RecordFormat(parquet_records),
}


def known_suffixes() -> tuple[str, ...]:
    """The suffixes of the files that are read from a folder."""
    return (*TEXT_SUFFIXES, *RECORD_FORMATS)
