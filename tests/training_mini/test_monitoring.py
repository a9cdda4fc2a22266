"""What is recorded and shown."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from files_mini import append_text, json_lines
from PIL import Image
from rich.console import Console
from training_mini import monitoring
from training_mini.monitoring import Monitor, draw_curves, format_seconds, progress_bar, read_metrics

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
    assert lines[0].startswith("step 1/3  loss 2.000  bits/byte 2.885  lr 1.0e-03  1,234 tokens/s  0:00")
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"], "the first, and the last; not one for every step"


def test_live_line_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=True, width=120))
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 3)
    monitor.training_step(2, METRICS)
    monitor.say("a line above")
    monitor.close()
    output = capsys.readouterr().out
    assert "2/3" in output and "loss 2.000  bits/byte 2.885" in output and "a line above" in output
    assert "\x1b[" in output


def test_curves(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, main_process())
    monitor.start(0, 100)
    draw_curves(tmp_path, "nothing yet", {})
    assert not (tmp_path / "curves.png").exists()
    for step in range(1, 101):
        monitor.record(step, {"bits_per_byte": 7 / step**0.3, "learning_rate": 1e-3 * (1 - step / 100)})
    monitor.record(100, {"eval_bits_per_byte": 1.9})
    draw_curves(tmp_path, "a run", {"gzip": 2.2, "xz": 1.9})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 600 and len(image.convert("L").getcolors()) > 20


def test_progress_bar_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "console", Console(force_terminal=False))
    with progress_bar("reading", 10, "bytes") as advance:
        advance(5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


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
