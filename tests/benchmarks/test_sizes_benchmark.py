"""benchmarks/sizes.py, in seconds, and the table that docs/TRAINING.md has from it."""

import json
import re
from pathlib import Path

import pytest
from configuration_mini import MiniConfig
from helpers.programs import ROOT, run_program

PROGRAM = "benchmarks/sizes.py"
PAGE = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| ([\d.]+)M \| ([\d,.]+) MB \| ([\d,]+) \| [\d,]+ \| [\w ]+ \|$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_a_size_has_its_figures(tmp_path: Path) -> None:
    arguments = "--sizes tiny --seconds 0.1 --processor_time true --output out.json".split()
    # Without a compiler for C++ nothing is compiled, which takes longer than the run.
    result = run_program(PROGRAM, *arguments, cwd=tmp_path, CXX="none")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    (row,) = figures["rows"]
    assert row["tokens"] == 20 * row["parameters"] == 4 * row["text_bytes"]
    assert row["steps"] == round(row["tokens"] / (16 * 256))
    assert row["hours"] == pytest.approx(row["tokens"] / row["tokens_per_second"] / 3600) and row["hours"] > 0
    assert figures["machine"]["threads"] == 1 and "Text and time for each size" in result.stdout


def test_the_page_has_what_the_rule_gives() -> None:
    assert [size for size, *_ in ROWS] == ["tiny", "small", "medium"]
    for size, parameters, megabytes, steps in ROWS:
        tokens = 20e6 * float(parameters)
        length = MiniConfig.preset(size).max_position_embeddings
        assert float(megabytes.replace(",", "")) == pytest.approx(tokens / 4e6, rel=0.05)
        assert float(steps.replace(",", "")) == pytest.approx(tokens / (16 * length), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes huge", "huge"),
        ("--seconds 0", "seconds must be above 0, got 0.0."),
    ],
)
def test_wrong_input(arguments: str, message: str, tmp_path: Path) -> None:
    result = run_program(PROGRAM, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
