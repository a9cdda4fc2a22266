"""Real files of people: nothing of their text is lost or replaced without a word, and nothing else is learned."""

import bz2
import datetime
import glob
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from training_mini.arguments import DataArguments
from training_mini.data import formats
from training_mini.data.corpus import Corpus, load_corpus
from training_mini.data.files import find_files
from training_mini.data.formats import DataFile, RecordFormat
from training_mini.data.sources import open_source
from training_mini.data.streaming import FileStream, find_stream

PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def arguments_of(path: object, **settings: object) -> DataArguments:
    folder = Path(path).parent if not Path(path).is_dir() else Path(path)
    return DataArguments(dataset=str(path), cache_dir=str(folder.parent / "cache"), **settings)


def documents(path: object, **settings: object) -> list[str]:
    """The documents that encoding reads."""
    return [
        b"".join(pieces).decode("utf-8", "surrogateescape")
        for _, pieces in open_source(arguments_of(path, **settings)).read()
    ]


def streamed(path: object, **settings: object) -> list[str]:
    """The documents that streaming reads."""
    (open_stream,), _ = find_stream(arguments_of(path, streaming=True, **settings))
    return [b"".join(pieces).decode() for _, pieces in open_stream()]


def examples(path: object, **settings: object) -> list[dict]:
    return [record for _, record in open_source(arguments_of(path, **settings)).records()]


def load(path: object, **settings: object) -> Corpus:
    return load_corpus(arguments_of(path, **settings), max_eval_tokens=10, show_progress=False)


def text_of(corpus: Corpus) -> str:
    return (corpus.text_of(corpus.train[:]) + corpus.text_of(corpus.validation)).decode()


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file, compressed where its name says so."""
    content = content.encode() if isinstance(content, str) else content
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix.lower(), bytes)
    path.write_bytes(compress(content))
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


READERS = pytest.mark.parametrize("read", [documents, streamed])
TEXTS = ["NA", "null", "None", "nan", "N/A", "#N/A", "-inf", "true", "007", "1e5", "2024-01-05", "plain words here 1"]


@READERS
@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "A.CSV", "a.csv.gz", "a.jsonl", "a.json", "A.JSONL.zst", "a.ndjson"]
)
def test_what_looks_like_something_else_is_text(data: Path, read: Callable, name: str) -> None:
    """No value of a text column is taken for nothing, for a number, or for a date; only an empty cell is none."""
    kind = name.lower().split(".")[1]
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        content = "\n".join(["text,label", *(f"{text},1" for text in TEXTS), ",1", '"",1']).replace(",", separator)
    elif kind == "json":
        content = json.dumps([{"text": text} for text in [*TEXTS, "", None]], indent=1)
    else:
        content = jsonl(*({"text": text} for text in [*TEXTS, "", None]))
    assert read(write(data / name, content)) == TEXTS


@pytest.mark.slow
@READERS
@pytest.mark.parametrize("header", ["text,n", "n,text", "text"])
def test_digits_are_text_however_many_rows(data: Path, read: Callable, header: str) -> None:
    place = header.split(",").index("text")
    digits = [f"{i:03}" for i in range(12_000)]
    rows = [*digits, "and then words"]
    lines = [",".join([cell if i == place else "1" for i in range(header.count(",") + 1)]) for cell in rows]
    assert read(write(data / "a.csv", "\n".join([header, *lines]))) == rows


def test_dates_in_examples_are_text_and_numbers_are_refused(data: Path) -> None:
    records = [{"prompt": "when?", "completion": text} for text in ("2024-01-05", "12:30", "2024-01-05T10:00:00Z")]
    assert examples(write(data / "a.jsonl", jsonl(*records))) == records
    for wrong in (5, 1.5, True, {"a": 1}):
        path = write(data / "a.jsonl", jsonl({"prompt": "when?", "completion": wrong}))
        with pytest.raises(ValueError, match=r"a\.jsonl record 1 must have messages, or a prompt and a completion"):
            load(path)


@READERS
@pytest.mark.parametrize("wrong", [5, 1.5, True, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused(data: Path, read: Callable, wrong: object) -> None:
    path = write(data / "a.jsonl", jsonl({"text": "fine"}, {"text": wrong}))
    with pytest.raises(
        ValueError, match=rf"Record 2 of .*a\.jsonl has no text in column 'text' but {type(wrong).__name__}"
    ):
        read(path)


def test_columns_of_parquet_have_the_types_that_they_say(data: Path) -> None:
    path = data / "a.parquet"
    for values in ([1, 2], [datetime.date(2024, 1, 5)] * 2, [b"x", b"y"]):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(ValueError, match=f"has no text in column 'text' but {type(values[0]).__name__}"):
            documents(path)
    not_utf_8 = pyarrow.array([b"x", b"\xff"]).cast(pyarrow.string(), safe=False)
    for column in ({"text": not_utf_8}, {"text": ["x"], "date": pyarrow.array([2**61], pyarrow.timestamp("us"))}):
        pyarrow.parquet.write_table(pyarrow.table(column), path)
        with pytest.raises(ValueError, match=f"{path} could not be read as parquet: .*(can't decode|out of range)"):
            documents(path)
    table = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode(), "picture": [b"\x00"] * 3})
    pyarrow.parquet.write_table(table, path)
    assert documents(path) == streamed(path) == ["a", "b", "a"]


def test_messages_of_several_shapes_in_parquet(data: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list([{"messages": messages}] * 3, features=features).to_parquet(str(data / "a.parquet"))
    assert examples(data / "a.parquet") == [{"messages": messages}] * 3


OFTEN = [{"text": f"record {i} " + "x" * 1000, "extra": None} for i in range(11_000)]


@pytest.mark.slow
@READERS
@pytest.mark.parametrize("last", [{"extra": "s"}, {"extra": {"deep": [1]}}, {"new": 1}, {"extra": 1.5, "new": "s"}])
def test_columns_that_nobody_uses_may_change(data: Path, read: Callable, last: dict) -> None:
    path = write(
        data / "a.jsonl", jsonl(*OFTEN[:: 1 if last == {"extra": "s"} else 1000], {"text": "the last", **last})
    )
    assert read(path)[-1] == "the last"


@READERS
def test_files_may_have_other_columns_and_formats(data: Path, read: Callable) -> None:
    write(data / "a.jsonl", jsonl({"text": "one"}))
    write(data / "b.jsonl", jsonl({"text": "two", "more": "m"}))
    write(data / "c.csv", "id,content\n7,three\n")
    write(data / "d.jsonl", "")
    assert read(data) == ["one", "two", "three"]


def test_a_record_after_blank_lines_is_named_by_its_line_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"^Record 2 \(line 4\) of .*a\.jsonl has no text in column 'text' but int"):
        documents(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('\n{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 1}\n')
    names = [name for name, _ in open_source(arguments_of(tmp_path / "b.jsonl")).records()]
    assert [name.partition("b.jsonl ")[2] for name in names] == ["record 1 (line 2)", "record 2 (line 3)"]
    (tmp_path / "c.jsonl").write_text('\n\n{"text": "one"\n')
    with pytest.raises(ValueError, match=r"c\.jsonl could not be read as json: line 3: "):
        documents(tmp_path / "c.jsonl")


@READERS
def test_missing_column_is_named_with_file_and_record(data: Path, read: Callable) -> None:
    write(data / "a.jsonl", jsonl({"text": "one"}))
    write(data / "b.jsonl", jsonl({"text": "two"}, {"txet": "three"}))
    with pytest.raises(ValueError, match=r"Record 2 of .*b\.jsonl has no column 'text', did you mean 'txet'"):
        read(data)
    write(data / "b.jsonl", jsonl({"title": "two"}, {"title": "three"}))
    with pytest.raises(ValueError, match=r"Record 1 of .*b\.jsonl has no column 'text'; its columns are title"):
        read(data, text_column="text")


LONG = "".join(f"line {i} {i * 7919 % 10007}\n" for i in range(5000))


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["gz", "zst", "GZ"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_compressed_file_that_is_cut_is_refused(data: Path, compression: str, kind: str) -> None:
    lines = LONG.splitlines()
    content = {
        "txt": LONG,
        "jsonl": jsonl(*({"text": line} for line in lines)),
        "json": json.dumps([{"text": line} for line in lines]),
        "csv": "\n".join(["text", *lines]),
    }[kind]
    path = write(data / f"a.{kind}.{compression}", content)
    readers = [documents] if kind == "txt" else [documents, streamed]
    whole = path.read_bytes()
    for read in readers:
        assert "\n".join(read(path)).strip() == LONG.strip()
    for share in (0.02, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        for read in readers:
            with pytest.raises(ValueError, match=rf"a\.{kind}\.{compression} is not a complete (gzip|zstd) file"):
                read(path)


def test_examples_in_a_cut_file_are_refused(data: Path) -> None:
    path = write(data / "a.jsonl.gz", jsonl(*({"prompt": line, "completion": "x"} for line in LONG.splitlines())))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        load(path)


def test_several_frames_and_members_are_one_file(data: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00wxyz"
    (data / "a.txt.zst").write_bytes(skippable + zstandard.compress(b"one ") + zstandard.compress(b"two"))
    (data / "b.txt.gz").write_bytes(gzip.compress(b"three ") + gzip.compress(b"four"))
    assert documents(data) == ["one two", "three four"]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_cut_records_are_refused(data: Path, compression: str) -> None:
    cases = {
        "a.jsonl": ('{"text": "fine"}\n{"text": "cu', "line 2: Unterminated string"),
        "a.json": ('[{"text": "fine"}, {"text": "cu', "record 2, character 29: Unterminated string"),
        "b.json": ('\n[{"text": "fine"},', "record 2, character 20: the list does not end"),
        "c.json": ('[{"text": "fine"}] {"text": "more"}', "behind the list of 1 records"),
        "d.json": ('{\n"text": "one object"\n}', "needed is one object a line, or one list of objects"),
        "e.jsonl": ("[1, 2]\n", "record 1 is no object but '1'"),
        "f.jsonl": ('{"n": ' + "1" * 5000 + "}", "line 1: Exceeds the limit"),
        "f.json": ('[{"n": ' + "1" * 5000 + "}]", "record 1: Exceeds the limit"),
        "g.jsonl": ('{"n": ' + "[" * 100_000, "line 1: maximum recursion depth"),
        "g.json": ('[{"n": ' + "[" * 100_000, "record 1: maximum recursion depth"),
        "a.csv": ('text,label\nfine,1\n"cut', "a quote .* is never closed"),
        "c.csv": ('text\nfine\n"', "a quote .* is never closed"),
        "b.csv": ("text,label\nfine,1\na,b,c\n", "line 3 has 3 cells, and the header 2"),
        "a.parquet": ("PAR1", "could not be read as parquet"),
    }
    for name, (content, message) in cases.items():
        path = write(data / f"{name}{compression}", content)
        with pytest.raises(ValueError, match=message) as error:
            documents(path)
        assert f"{path} could not be read as" in str(error.value) and "\n" not in str(error.value)


def test_lists_of_json_are_read_in_pieces(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"text": f'"{i}" é \\ [{{,}}] \n' + "z" * (i % 50), "n": [i, {"x": -1.5e3}], "b": True} for i in range(60)
    ]
    path = write(data / "a.json", "\n " + json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(formats, "PIECE_SIZE", size)
        assert list(DataFile(path).records()) == records


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 5, 1 << 20])
def test_csv_of_every_kind_of_line(data: Path, end: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_SIZE", size)
    lines = ["\ufefftext,n", "one,1", '"two, ""quoted""",2', f'"three{end}lines",3', "", "four", "five,5,"]
    path = write(data / "a.csv", end.join(lines))
    assert documents(path) == ["one", 'two, "quoted"', f"three{end}lines", "four", "five"]


def test_long_cells_and_byte_order_marks(data: Path) -> None:
    long = "x" * 300_000
    assert documents(write(data / "a.csv", f"text\n{long}\n")) == [long]
    assert documents(write(data / "a.jsonl", "\ufeff" + jsonl({"text": "a"}))) == ["a"]
    assert documents(write(data / "a.json", "\ufeff" + json.dumps([{"text": "a"}]))) == ["a"]


@pytest.mark.parametrize("header", ["text;label", "text\tlabel", "text|label"])
def test_csv_of_one_column_that_looks_like_two(data: Path, header: str) -> None:
    path = write(data / "a.csv", f"{header}\nhello;1\n")
    for read in (documents, streamed):
        with pytest.raises(ValueError, match="has one column only, of the name") as error:
            read(path)
        assert repr(header) in str(error.value)
    assert documents(path, text_column=header) == ["hello;1"]


def test_numbers_of_csv_are_not_taken_for_the_text(data: Path) -> None:
    assert documents(write(data / "a.csv", "id,poem,liked\n1,roses,true\n2,violets,false\n")) == ["roses", "violets"]
    with pytest.raises(ValueError, match="has the columns id, year; say with --text_column"):
        documents(write(data / "a.csv", "id,year\n1,1984\n"))


@READERS
def test_half_a_character(data: Path, read: Callable) -> None:
    path = write(data / "a.jsonl", '{"text": "fine"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"Record 2 of .*a\.jsonl has half of a character \(U\+D83D\) at character 5"):
        read(path)
    assert read(path, errors="replace") == ["fine", "cut \ufffd"]


def archive_of(make: Callable) -> bytes:
    buffer = io.BytesIO()
    make(buffer)
    return buffer.getvalue()


def make_tar(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def make_zip(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")


BINARIES = {
    "book.pdf": (PDF, "a PDF; pdftotext makes text of it"),
    "book.txt": (PDF, "a PDF; pdftotext makes text of it"),
    "book.PDF.gz": (gzip.compress(PDF), "a PDF; pdftotext makes text of it"),
    "a.txt.bz2": (bz2.compress(b"text"), "compressed by bzip2"),
    "a.jsonl.xz": (lzma.compress(b"{}"), "compressed by xz"),
    "a.txt": (gzip.compress(b"text"), "compressed by gzip; end its name in .gz"),
    "b.txt": (zstandard.compress(b"text"), "compressed by zstd; end its name in .zst"),
    "a.zip": (archive_of(make_zip), "a zip archive or an office document"),
    "a.docx": (archive_of(make_zip), "a zip archive or an office document"),
    "table.csv": (archive_of(make_zip), "a zip archive or an office document"),
    "a.tar": (archive_of(make_tar), "a tar archive"),
    "a.tar.gz": (gzip.compress(archive_of(make_tar)), "a tar archive"),
    "a.png": (b"\x89PNG\r\n\x1a\n\x00\x00", "a picture"),
    "a.jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a picture"),
    "a.wav": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "a picture or a recording"),
    "a.out": (b"\x7fELF\x02\x01\x01\x00", "a program"),
    "a.exe": (b"MZ\x90\x00\x03\x00", "a program"),
    "a.db": (b"SQLite format 3\x00", "a database"),
    "a.npy": (b"\x93NUMPY\x01\x00", "an array of numpy"),
    "a.arrow": (b"ARROW1\x00\x00", "an Arrow file"),
    "a.gguf": (b"GGUF\x03\x00\x00\x00", "a model"),
    "a.gif": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00", "a picture"),
    "a.bin": (b"\x01\x02\x00\x03", "a file of bytes and not of text; end its name in .txt"),
}


@pytest.mark.parametrize("name", BINARIES)
def test_what_is_no_text_by_its_first_bytes(data: Path, name: str) -> None:
    content, what = BINARIES[name]
    (data / name).write_bytes(content)
    for read in (documents, streamed):
        with pytest.raises(ValueError, match=re.escape(f"{data / name} is no text: {what}")):
            read(data / name)
    # Beside text it is left out, with a word; alone in a folder nothing is left.
    for path in (data, data / "*"):
        with pytest.raises(ValueError, match=r"no file with text.*left out 1 \(.*" + re.escape(f"{name}: {what}")):
            documents(path)
    (data / "text.md").write_text("words")
    for path in (data, data / "*"):
        assert documents(path) == ["words"]
        note = find_files(arguments_of(path)).sentence("Read")
        assert note.startswith(f"Read; left out 1 ({data / name}: {what}")


@pytest.mark.parametrize(
    "content",
    [b"BZh is no mark", b"MZ is a name", b"\x00\x01\x02", b"ID3 tags", b"RIFF raff", b"PK", b"GGUF is a format"],
)
def test_text_that_begins_as_a_binary_may(data: Path, content: bytes) -> None:
    (data / "a.txt").write_bytes(content)
    assert documents(data / "a.txt") == [content.decode()]


@pytest.mark.parametrize(
    "name", ["A.TXT", "A.Md", "A.PY", "a.TXT.GZ", "A.JSONL", "A.CSV", "a.Tsv", "a.json", "a.ndjson"]
)
def test_suffixes_count_in_either_case(data: Path, name: str) -> None:
    kind = name.lower().split(".")[1]
    contents = {"csv": "text\nwords\n", "tsv": "text\tn\nwords\t1\n", "json": '[{"text": "words"}]'}
    content = contents.get(kind, '{"text": "words"}\n' if kind in ("jsonl", "ndjson") else "words")
    write(data / name, content)
    for path in (data, data / name, data / "*"):
        assert documents(path) == ["words"]
    with pytest.raises(ValueError, match="There is no file or directory"):
        documents(data / "missing" / name)


def test_json_beside_text_that_holds_settings(data: Path) -> None:
    (data / "a.txt").write_text("words")
    (data / "package.json").write_text('{\n"name": "x"\n}')
    (data / "state.json").write_text('{"step": 1}')
    (data / "table.tsv").write_text("year\tcount\n1984\t2\n")
    (data / "good.json").write_text('[{"text": "good"}]')
    assert documents(data) == ["words", "good"]
    note = find_files(arguments_of(data)).sentence("Read")
    assert "left out 3 (3 such as" in note and "no records with a column of text in it" in note
    with pytest.raises(ValueError, match="could not be read as json"):
        documents(data / "package.json")


def test_names_that_are_no_text(data: Path) -> None:
    (data / "a.txt").write_text("words " * 100)
    (data / "b.txt").write_bytes(b"\xfc" * 100)
    os.rename(os.fsencode(data / "b.txt"), os.fsencode(data) + b"/b\xfc.txt")
    (data / "c.pdf").write_bytes(PDF)
    os.rename(os.fsencode(data / "c.pdf"), os.fsencode(data) + b"/c\xfc.pdf")
    for note in load(data).notes:
        assert "\\udcfc" in note and note.encode()


def test_hidden_names_are_left_out(data: Path) -> None:
    for name in (".ipynb_checkpoints/a.txt", ".git/b.txt", ".venv/lib/c.py", "._a.txt", "sub/.hidden.md", "sub/d.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    for path in (data, data / "**"):
        assert documents(path) == ["sub/d.txt"]
    assert find_files(arguments_of(data)).sentence("Read") == (
        f"Read; left out 5 (5 such as {data / '._a.txt'}: hidden)."
    )
    assert documents(data / ".git") == [".git/b.txt"], "a hidden folder that was named"
    assert documents(data / "._a.txt") == ["._a.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt"])
def test_links_are_followed_and_each_file_is_read_once(data: Path, tmp_path: Path, pattern: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("behind a link")
    (data / "a.txt").write_text("a")
    (data / "again.txt").symlink_to(data / "a.txt")
    (data / "elsewhere").symlink_to(tmp_path / "elsewhere")
    for loop in ("loop", "second loop", "elsewhere/back"):  # two are enough for Python's own walk never to end
        (data / loop).symlink_to(data)
    (data / "lost.txt").symlink_to(data / "nothing")
    assert documents(data / pattern) == ["a", "behind a link"]
    note = find_files(arguments_of(data / pattern)).sentence("Read")
    assert "a second name of a file that is read" in note
    assert f"{data / 'lost.txt'}: a link to nothing" in note


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a.txt", "deep/b.md", "deep/er/c.txt", "other/d.txt"]),
        ("**/*.txt", ["a.txt", "deep/er/c.txt", "other/d.txt"]),
        ("deep/**", ["deep/b.md", "deep/er/c.txt"]),
        ("d*/**/*.txt", ["deep/er/c.txt"]),
        ("**/er/*", ["deep/er/c.txt"]),
        ("**/er/**", ["deep/er/c.txt"]),
        ("*/*", ["deep/b.md", "other/d.txt"]),
        ("**/.hidden/*.txt", ["deep/.hidden/e.txt"]),
        ("?.t[wx]t", ["a.txt"]),
        ("**.txt", ["a.txt"]),
    ],
)
def test_globs_match_what_pythons_own_do(
    data: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "deep/b.md", "deep/er/c.txt", "other/d.txt", "deep/.hidden/e.txt", "other/.f.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    own = [name for name in glob.glob(pattern, root_dir=data, recursive=True) if (data / name).is_file()]
    assert sorted(own, key=Path) == expected == documents(data / pattern)
    monkeypatch.chdir(data)
    assert [str(file) for file in find_files(arguments_of(pattern)).files] == expected


@pytest.mark.parametrize("name", ["", "  "])
@pytest.mark.parametrize("setting", ["dataset", "text_column", "tokenizer", "cache_dir", "dataset_config"])
def test_empty_names_are_refused(setting: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} is empty"):
        DataArguments(**{setting: name})


LATIN = "Grüße aus Köln und naïve Cafés"


def test_files_in_another_encoding(data: Path) -> None:
    (data / "a.txt").write_text("UTF-8: ü\n", encoding="utf-8")
    (data / "latin.txt").write_bytes(LATIN.encode("latin-1"))
    (data / "b.csv").write_bytes(f"text\n{LATIN}\n".encode("cp1252"))
    message = r"latin\.txt is not valid UTF-8 at byte 2 .*--encoding cp1252 reads it if it is Western European"
    with pytest.raises(ValueError, match=message):
        load(data / "latin.txt", tokenizer="char")
    with pytest.raises(ValueError, match=r"b\.csv is not valid UTF-8 at byte 7 .*--encoding cp1252"):
        documents(data / "b.csv")
    with pytest.raises(ValueError, match=r"b\.csv is not valid UTF-8 at byte 7 .*--encoding cp1252"):
        streamed(data / "b.csv")
    # One flag reads the folder: what is UTF-8 stays so.
    for name in ("cp1252", "latin-1", "LATIN1"):
        assert documents(data, encoding=name) == ["UTF-8: ü\n", LATIN, LATIN]
    assert streamed(data / "b.csv", encoding="cp1252") == [LATIN]
    corpus = load(data, encoding="cp1252")
    size = len(f"UTF-8: ü\n{LATIN}{LATIN}".encode())
    assert corpus.notes == (f"Read 3 files (2 of them in cp1252) with {size} bytes of text.",)
    assert corpus.settings["encoding"] == "cp1252"
    char = load(data / "latin.txt", tokenizer="char", encoding="cp1252")
    assert text_of(char) == LATIN


def test_latin_1_is_learned_as_bytes_with_a_word(data: Path) -> None:
    (data / "a.txt").write_text("UTF-8: ü\n" * 20, encoding="utf-8")
    (data / "latin.txt").write_bytes(LATIN.encode("latin-1"))
    (data / "book.pdf").write_bytes(PDF)
    size = len("UTF-8: ü\n".encode()) * 20 + len(LATIN)
    for _ in range(2):  # also from the cache
        read, strange = load(data).notes
        left_out = f"{data / 'book.pdf'}: {BINARIES['book.pdf'][1]}"
        assert read == f"Read 2 files with {size} bytes of text; left out 1 ({left_out})."
        assert strange == (
            f"Not UTF-8, and learned byte by byte as it is: {data / 'latin.txt'}; --encoding cp1252 reads it if it is "
            f"Western European."
        )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.unknown"])
def test_utf_16(data: Path, encoding: str, name: str) -> None:
    kind = name.split(".")[1]
    content = {"jsonl": jsonl({"text": "wörds"}), "csv": "text\nwörds\n"}.get(kind, "wörds")
    (data / name).write_bytes(content.encode(encoding))
    assert documents(data / name, encoding=encoding) == ["wörds"]
    if encoding != "utf-16-le":  # else no mark tells
        for settings in ({}, {"encoding": "cp1252"}):
            with pytest.raises(ValueError, match=rf"{name} begins as {encoding.upper()} does: --encoding {encoding}"):
                documents(data / name, **settings)


def test_other_encodings(data: Path) -> None:
    (data / "b.txt").write_text("schon UTF-8: ü")
    for encoding, text in {"shift_jis": "日本語\n", "gb18030": "中文", "koi8-r": "слово", "utf-8-sig": "ü"}.items():
        (data / "a.txt").write_bytes(text.encode(encoding))
        assert documents(data, encoding=encoding) == [text, "schon UTF-8: ü"]
    (data / "a.txt").write_bytes("日本語".encode("iso2022_jp"))
    assert documents(data / "a.txt", encoding="iso2022_jp") == ["日本語"], "in which everything is valid UTF-8 too"
    (data / "a.txt").write_bytes(b"abc\x81def")
    with pytest.raises(ValueError, match=r"a\.txt is not valid cp1252 text at byte 3 .*--errors replace"):
        documents(data / "a.txt", encoding="cp1252")
    assert documents(data / "a.txt", encoding="cp1252", errors="replace") == ["abc\ufffddef"]


@pytest.mark.parametrize(("name", "message"), [("utf8x", "did you mean"), ("base64", "[?.]"), ("", "such as")])
def test_encoding_that_does_not_exist(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"encoding must be one that Python knows, got {name!r}.*{message}"):
        DataArguments(encoding=name)


def change_in_place(path: Path, content: bytes) -> None:
    """As a tool that sets the time back does: size and time stay."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_corpus_that_changed_in_place_is_read_again(data: Path, size: int) -> None:
    path = data / "a.txt"
    path.write_bytes(b"old " * (size // 4))
    first = load(path)
    change_in_place(path, b"new " * (size // 4))
    second = load(path)
    assert second.settings != first.settings and text_of(second).startswith("new new")


def test_other_format_of_the_same_bytes_is_another_corpus(data: Path) -> None:
    content = jsonl(*({"text": f"record {i}"} for i in range(30)))
    write(data / "a.jsonl", content)
    assert "{" not in text_of(load(data / "a.jsonl"))
    (data / "a.jsonl").rename(data / "a.txt")
    assert text_of(load(data / "a.txt")) == content


def test_adding_a_format_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up format is found in folders, read, streamed, decompressed and encoded."""

    def recipes(file: DataFile, columns: object) -> Iterator[dict]:
        for text in "".join(file.texts()).split("---\n"):
            yield {"text": text}

    monkeypatch.setitem(formats.RECORD_FORMATS, ".recipes", RecordFormat(recipes))
    write(data / "cakes.recipes.gz", "flour\n---\nsugar\n---\néggs\n" * 20)
    for path in (data, data / "*.recipes.gz", data / "cakes.recipes.gz"):
        assert documents(path) == streamed(path) and documents(path)[:2] == ["flour\n", "sugar\n"]
    assert text_of(load(data)).count("sugar") == 20


STATES_OF_BEFORE = {
    # What `datasets` noted after seven records of two files of five.
    "a.jsonl": {
        "examples_iterable": {
            "examples_iterable": {"shard_idx": 1, "shard_example_idx": 5, "type": "ArrowExamplesIterable"},
            "previous_state": {"shard_idx": 0, "shard_example_idx": 5, "type": "ArrowExamplesIterable"},
            "batch_idx": 7,
            "num_chunks_since_previous_state": 2,
            "cropped_chunk_length": 0,
            "type": "RebatchedArrowExamplesIterable",
        },
        "epoch": 0,
    },
    "a.csv": {
        "examples_iterable": {
            "examples_iterable": {"shard_idx": 1, "shard_example_idx": 2, "type": "ArrowExamplesIterable"},
            "previous_state": None,
            "batch_idx": 0,
            "num_chunks_since_previous_state": 0,
            "cropped_chunk_length": 0,
            "type": "RebatchedArrowExamplesIterable",
        },
        "epoch": 0,
    },
}


@pytest.mark.parametrize("name", STATES_OF_BEFORE)
def test_positions_of_runs_of_before(data: Path, name: str) -> None:
    texts = [f"{part} {i}" for part in "ab" for i in range(5)]
    for number, part in enumerate("ab"):
        lines = texts[5 * number : 5 * number + 5]
        content = "\n".join(["text", *lines]) if name.endswith("csv") else jsonl(*({"text": line} for line in lines))
        write(data / f"{part}{Path(name).suffix}", content)
    (open_stream,), notes = find_stream(arguments_of(data, streaming=True))
    assert notes == ("Streams 2 files.",)
    stream = open_stream()
    assert isinstance(stream, FileStream)
    stream.load_state_dict(STATES_OF_BEFORE[name])
    assert [b"".join(pieces).decode() for _, pieces in stream] == texts[7:]


def test_text_beside_records_is_left_out_of_a_stream_with_a_word(data: Path) -> None:
    write(data / "a.jsonl", jsonl(*({"text": f"record {i}"} for i in range(30))))
    write(data / "b.txt", "text")
    corpus = load(data, streaming=True)
    assert corpus.notes == (f"Streams 1 file; left out 1 ({data / 'b.txt'}: text, which is read without --streaming).",)
    assert len(corpus.train.read(50)) == 50


def test_stream_of_the_hub_that_breaks_off(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(data / "a.jsonl", jsonl(*OFTEN, {"text": "s", "extra": "s"}))
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split, streaming: real(
            "json", data_files=str(data / "a.jsonl"), split=split, streaming=True
        ),
    )
    with pytest.raises(ValueError, match=r"The stream of 'someone/poems' broke off after [\d,]+ records") as error:
        streamed("someone/poems")
    assert "\n" not in str(error.value)


def test_ids_of_text_files_are_those_of_before(data: Path) -> None:
    """What is UTF-8 stays byte by byte, with its marks and line ends."""
    content = "\ufeffa\r\nb\x00\u2028 é".encode() * 30
    (data / "a.txt").write_bytes(content)
    corpus = load(data / "a.txt")
    ids = np.concatenate([corpus.train[:], corpus.validation])
    assert (ids[:-1] - 8).astype(np.uint8).tobytes() == content
    assert corpus.notes == (f"Read 1 file with {len(content)} bytes of text.",)
