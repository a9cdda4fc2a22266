"""What all programs share: settings from a file, and how a program ends."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from entry_points_mini import ArgumentParser, one_sentence_errors, option


@dataclass
class Settings:
    steps: int = option(7, "how many")
    names: list[str] = option(["a", "b"], "which")
    folder: str | None = option(None, "where")
    fast: bool = option(False, "whether")


def from_yaml(tmp_path: Path, text: str, *flags: str) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    (settings,) = ArgumentParser(Settings, prog="p").parse(list(flags), path)
    return settings


def test_what_a_file_leaves_empty_is_at_its_default(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "") == from_yaml(tmp_path, "steps:\nnames: []\nfolder: null\nfast:\n") == Settings()


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    text = "steps: 3\nnames: [x, y]\nfolder: f\nfast: true\n"
    assert from_yaml(tmp_path, text) == Settings(3, ["x", "y"], "f", True)
    flags = ("--steps", "4", "--names", "z", "--fast", "false")
    assert from_yaml(tmp_path, text, *flags) == Settings(4, ["z"], "f", False)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("two\n lines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: No such file or directory: a.txt\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError("plain words"), 2, "error: plain words\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
    ids=repr,
)
def test_how_a_program_ends(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINI_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop, one_sentence_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == printed


def test_the_traceback_is_there_for_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_TRACEBACK", "1")
    with pytest.raises(ValueError, match="words"), one_sentence_errors():
        raise ValueError("words")


def test_faults_of_the_program_are_no_sentences() -> None:
    with pytest.raises(TypeError), one_sentence_errors():
        raise TypeError("a fault of ours")
