"""Files that survive a crash."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from files_mini import (
    append_text,
    destination,
    find_checkpoint,
    json_lines,
    new_folder,
    read_json,
    read_json_lines,
    read_steps,
    replace_folder,
    write_text,
    writing,
)
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "and nothing else"


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_replace_folder(tmp_path: Path) -> None:
    replace_folder(make_folder(tmp_path / "partial", "one"), tmp_path / "target")
    replace_folder(make_folder(tmp_path / "partial", "two"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_is_written_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test cannot do is pull the plug; so it looks at the order of the calls."""
    calls = []
    flush, rename = os.fsync, os.rename

    def recorded_flush(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        calls.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_flush)
    monkeypatch.setattr(os, "rename", recorded_rename)
    replace_folder(make_folder(tmp_path / "partial", "one"), tmp_path / "target")
    assert calls == ["file", "partial", "partial -> target"]
    calls.clear()
    append_text(tmp_path / "lines", "one\n")
    append_text(tmp_path / "lines", "two\n")
    assert (tmp_path / "lines").read_text() == "one\ntwo\n" and calls == ["lines", "lines"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail] unexpected pos 64 vs 0"), "a file was cut short: the disk is full"),
        (CheckpointException("many", {0: (OSError(28, "No space left on device"), None)}), "No space left on device"),
        (SafetensorError("I/O\nerror"), "I/O error"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_cannot_be_written_is_one_sentence(error: BaseException, reason: str, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, writing(tmp_path / "a"):
        raise error
    assert str(caught.value).startswith(f"{tmp_path}/a could not be written ({reason}")


def test_a_checkpoint_is_found_when_death_came_between_the_renames(tmp_path: Path) -> None:
    for name in ("last", ".best.previous"):
        make_folder(tmp_path / name, "one")
    (tmp_path / ".best.previous" / "config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / ".best.previous")


def test_json_lines(tmp_path: Path) -> None:
    """One that a crash cut short is left out, also in the middle of a character; other ends of lines are text."""
    values = [{"step": 1, "text": "a\u2028b\x85c\rd\ne"}, {"step": 2, "text": "é"}]
    write_text(tmp_path / "a.jsonl", json_lines(values))
    append_text(tmp_path / "a.jsonl", json_lines([{"step": 3}]))
    assert read_json_lines(tmp_path / "a.jsonl") == [*values, {"step": 3}]
    whole = json_lines(values).encode()
    (tmp_path / "a.jsonl").write_bytes(whole[: whole.index("é".encode()) + 1])
    assert read_json_lines(tmp_path / "a.jsonl") == values[:1]
    assert read_json_lines(tmp_path / "missing.jsonl") == []
    (tmp_path / "a.jsonl").write_text('null\n3\n[{}]\n{"loss": 1.0}\n{"step": null}\n{"step": 2}\n')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"loss": 1.0}, {"step": None}, {"step": 2}]
    assert read_steps(tmp_path / "a.jsonl") == [{"step": 2}]


def test_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "run", "") / "best"
    make_folder(source, "")
    make_folder(tmp_path / "full", "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "full")
    for out in ("new", tmp_path / "a" / "b", source / "native", tmp_path / "empty"):
        assert destination(out, False, source) == Path(out).absolute()
    assert destination(tmp_path / "link", False, source) == tmp_path / "empty"
    for out, overwrite, words in (
        (tmp_path / "run" / "file", True, "OUT must be a folder, and .*file' is a file"),
        (tmp_path / "run" / "file" / "new", True, "OUT must be a folder, and .*file' is a file"),
        (source, True, "is read from OUT, .* and would be lost: name another folder"),
        (tmp_path / "run" / ".." / "run", True, "is read from OUT, .* and would be lost"),
        (".", True, "'.', holds the folder that you are in"),
        (tmp_path / "run", False, "is read from OUT"),
        ("../full", False, "holds the folder that you are in"),
    ):
        with pytest.raises(ValueError, match=words):
            destination(out, overwrite, source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is something in 'full' already: name another folder, or --overwrite"):
        destination("full", False, source)
    assert destination("full", True, "user/name") == tmp_path / "full"


def test_new_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "target", "one")
    message = r"/target could not be written \(No space left on device\)"  # and not its partial
    with pytest.raises(OSError, match=message), new_folder(target) as partial, writing(partial):
        (partial / "file").write_text("two")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (target / "file").read_text() == "one"
    with new_folder(target) as partial:
        (partial / "other").write_text("two")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "file is not valid JSON"), (b"[1]", "file must hold a JSON object"), (b"\xff", "file is not valid UTF-8")],
)
def test_read_json(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "file")


@pytest.mark.slow
def test_kill_at_any_instant_leaves_a_complete_folder(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from files_mini import replace_folder
        number = 0
        while True:
            number += 1
            partial = Path("partial")
            partial.mkdir(exist_ok=True)
            for name in ("a", "b"):
                (partial / name).write_text(str(number) * 10000)
            replace_folder(partial, Path("target"))
            print(number, flush=True)
        """
    )
    for attempt in range(15):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # one is complete
        time.sleep(0.001 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = next(tmp_path / name for name in ("target", ".target.previous") if (tmp_path / name).is_dir())
        assert (folder / "a").read_text() == (folder / "b").read_text()
        assert len((folder / "a").read_text()) >= 10000
        subprocess.run(["rm", "-rf", str(tmp_path / "partial")], check=True)
