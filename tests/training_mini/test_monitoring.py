"""What is recorded and shown."""

import contextlib
import io
import itertools
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from files_mini import append_text, json_lines
from PIL import Image
from rich.console import Console
from training_mini import monitoring
from training_mini.monitoring import (
    BITS_PER_BYTE,
    Monitor,
    StatusLine,
    curves_of,
    draw_curves,
    format_seconds,
    progress_bar,
    read_metrics,
)

METRICS = {"loss": 2.0, "bits_per_byte": 2.885, "learning_rate": 1e-3, "tokens_per_second": 1234.5}


def main_process() -> SimpleNamespace:
    """What a monitor needs of an accelerator without trackers."""
    return SimpleNamespace(is_main_process=True, log=lambda metrics, step: None)


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 10)
    for step in range(1, 8):
        monitor.record(step, METRICS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut short by a crash
    Monitor(tmp_path, main_process()).start(5, 10)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_is_damaged_in_metrics_and_samples_is_left_out(tmp_path: Path) -> None:
    damaged = 'null\n[1]\n{"step": null}\n{"loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(damaged + '{"step": 1, "seconds": null, "bits_per_byte": "2", "loss": 3}\n')
    (tmp_path / "samples.jsonl").write_text(damaged)
    monitor = Monitor(tmp_path, main_process())
    monitor.start(1, 10)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3}]
    assert curves_of(tmp_path, "title", {}) is None
    monitor.record(2, METRICS)
    monitor.record_samples(2, [{"prompt": "a", "text": "b"}])
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 2, "prompt": "a", "text": "b"}\n'
    assert curves_of(tmp_path, "title", {}) is not None


def test_errors_of_trackers_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def log(metrics: dict[str, float], step: int) -> None:
        raise sqlite3.OperationalError("database is locked")  # as trackio's: it is no OSError

    Monitor(tmp_path, SimpleNamespace(is_main_process=True, log=log)).record(3, METRICS)
    assert [line["step"] for line in read_metrics(tmp_path)] == [3]
    warning = "warning: the metrics of step 3 for trackers could not be written (database is locked).\n"
    assert capsys.readouterr().err == warning


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, SimpleNamespace(is_main_process=False))
    monitor.start(0, 10)
    monitor.training_step(1, METRICS)
    monitor.say("hello")
    monitor.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=False, width=80))
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    for step in (1, 2, 3):
        monitor.training_step(step, METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/3  bits/byte 2.885  loss 2.000  1,234 tokens/s  lr 1.0e-03  0:00")
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"], "the first, and the last; not one for every step"


def test_the_live_line_says_what_takes_long_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "console", Console(file=io.StringIO(), force_terminal=True, width=60))
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    shown = monitor._status
    with contextlib.closing(monitor):
        monitor.training_step(1, METRICS)
        with monitor.busy("evaluating"):
            assert shown.details[:2] == ["evaluating", "bits/byte 2.885"]
        assert shown.details[0] == "bits/byte 2.885"
    assert StatusLine(0, 3).details == ["first step"] and StatusLine(3, 3).details == [], "it is over already"


def status_line(width: int, step: int = 120, total: int = 1200, seconds_left: float = 3725) -> str:
    """What the live line shows in a terminal of so many columns."""
    status = StatusLine(step, total)
    status.seconds_left = seconds_left
    status.details = ["bits/byte 2.213", "loss 1.534", "9,993 tokens/s", "lr 1.7e-02", "MFU 31%"]
    console = Console(width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(status)
    return captured.get()


def test_what_matters_most_stays_longest_on_the_live_line() -> None:
    lines = {width: status_line(width) for width in range(1, 131)}
    assert all(len(line) < max(2, width) and "\n" not in line for width, line in lines.items())
    left = "1:02:05 left  bits/byte 2.213"
    assert lines[120] == f" 120/1200 {'━━':20} {left}  loss 1.534  9,993 tokens/s  lr 1.7e-02  MFU 31%"
    assert lines[80] == f" 120/1200 {'━':11} {left}  loss 1.534  9,993 tokens/s"
    assert lines[60] == f" 120/1200 {'━╸':19} {left}"
    assert lines[40] == f" 120/1200 {left}"
    assert lines[24] == " 120/1200 1:02:05 left" and lines[20] == " 120/1200 1:02:05" and lines[12] == " 120/1200"
    # No number is cut: whatever is shown is shown whole.
    whole = {
        "120/1200",
        "1:02:05",
        "left",
        "bits/byte",
        "2.213",
        "loss",
        "1.534",
        "9,993",
        "tokens/s",
        "lr",
        "1.7e-02",
        "MFU",
        "31%",
    }
    assert all(word in whole or set(word) <= set("━╸╺") for width in range(11, 131) for word in lines[width].split())
    assert status_line(60, step=1200, seconds_left=0).startswith("1200/1200 ━")


def test_live_line_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=True, width=80, color_system=None))
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    monitor.advance(1)
    monitor.training_step(2, METRICS)
    monitor.advance(2)
    monitor.say("a line above, which has more words than one line of this wide terminal, 10,898,028 tokens")
    monitor.close()
    monitor.close()
    output = capsys.readouterr().out
    *_, drawn, last = output.split("\r\x1b[J")
    assert "0/3" in output and "first step" in output
    # The cursor waits at the beginning of the line, so that all of it is erased also where the terminal has broken it.
    above, below, live = drawn.split("\n")
    assert above.startswith("a line above") and below == "10,898,028 tokens", "lines break between words"
    assert live.startswith("2/3 ━") and "left  bits/byte 2.885  loss 2.000" in live and live.endswith("\r")
    assert last.startswith("2/3 ━") and last.endswith("\r\x1b[?25h\n"), "and it stays when all is over"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dumb = Console(force_terminal=True, width=80, _environ={"TERM": term})
    monkeypatch.setattr(monitoring, "console", dumb)
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    monitor.training_step(3, METRICS)
    with progress_bar("reading", 10, "bytes") as advance:
        advance(5)
    monitor.close()
    assert "step 3/3" in (output := capsys.readouterr().out) and not {"\x1b", "\r"} & set(output)


def test_without_colours_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=True, width=80, _environ=environment))
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    monitor.training_step(2, METRICS)
    monitor.close()
    assert not re.search(r"\x1b\[(\d+;)*[34]\d", output := capsys.readouterr().out) and "bits/byte 2.885" in output


def test_curves(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 100)
    draw_curves(tmp_path, "nothing yet", {})
    assert not (tmp_path / "curves.png").exists()
    for step in range(1, 101):
        monitor.record(step, {"bits_per_byte": 7 / step**0.3, "learning_rate": 1e-3 * (1 - step / 100)})
    monitor.record(100, {"eval_bits_per_byte": 1.9})
    figure = curves_of(tmp_path, "a run", {"gzip": 2.2, "xz": 1.9})
    curve = figure.axes[0]
    assert curve.get_title(loc="left") == "a run" and curve.get_ylim()[1] > 7, "from the first loss on"
    assert figure.get_supxlabel() == BITS_PER_BYTE
    # The labels stand beside the lines, and not on each other: two of them have the same value.
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in curve.texts), key=lambda box: box.y0)
    assert [text.get_text() for text in curve.texts] == ["validation  1.900", "xz -9  1.900", "gzip -9  2.200"]
    assert all(box.x0 > curve.get_window_extent().x1 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(above.y0 >= below.y1 - 1 for below, above in itertools.pairwise(boxes))
    draw_curves(tmp_path, "$a_$ is no formula", {"gzip": 2.2, "xz": 1.9})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 600 and len(image.convert("L").getcolors()) > 20


def test_without_a_terminal_a_line_says_what_a_progress_bar_would_show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=False))
    for show, line in ((True, "Reading [a] ...\n"), (False, "")):
        with progress_bar("Reading [a]", 10, "bytes", show) as advance:
            advance(5)
        assert capsys.readouterr().out == line


@pytest.mark.parametrize("is_terminal", [True, False])
def test_samples_on_the_way(
    is_terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=is_terminal, width=30, color_system=None))
    monitor = Monitor(tmp_path, main_process())
    monitor.introduce(["Training: a model"])
    monitor.show_samples(100, ["def f():\n\n    return [1] # more than fits\n" + "x\n" * 10, "\n\n\x1b[2Jb"])
    lines = capsys.readouterr().out.splitlines()
    # A terminal says it on its live line.
    assert lines[0] == "Training: a model" and (lines.pop(1) == "First step ..." if not is_terminal else True)
    assert lines[1] == "step 100: def f():" and lines[3:] == ["          x"] * 3 + ["step 100: \ufffd[2Jb"]
    assert lines[2].strip() == ("return [1] # mo…" if is_terminal else "return [1] # more than fits")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.slow
def test_curves_leave_the_drawing_of_others_alone(tmp_path: Path) -> None:
    """A notebook that trains has figures and a backend of its own."""
    append_text(tmp_path / "metrics.jsonl", json_lines([{"step": 1, **METRICS}, {"step": 2, **METRICS}]))
    draw_curves(tmp_path, "run", {"xz": 2.0})
    code = (
        "import sys; from pathlib import Path; from training_mini.monitoring import draw_curves; "
        f"draw_curves(Path({str(tmp_path)!r}), 'run', {{}}); print('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
