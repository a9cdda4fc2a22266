"""benchmarks/quantization.py, in seconds: every kind has its figures, and wrong input one sentence."""

import json
from pathlib import Path

import pytest
from helpers.programs import run_program

PROGRAM = "benchmarks/quantization.py"


@pytest.mark.slow
def test_every_kind_has_figures(quick_run: Path, tmp_path: Path) -> None:
    arguments = "--dataset sample --eval_tokens 1000 --tokens 3 --rounds 1 --output out.json --device cpu".split()
    result = run_program(PROGRAM, "--models", quick_run, "tiny", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    rows = {(row["model"], row["kind"]): row for row in figures["rows"]}
    kinds = ("float32", "bfloat16", "int8", "nf4")
    assert list(rows) == [(model, kind) for model in (str(quick_run), "tiny") for kind in kinds]
    for (model, kind), row in rows.items():
        assert row["tokens_per_second"] > 0
        assert row["fast_path"]
        exact = rows[model, "float32"]
        if model == "tiny":
            assert row["bits_per_byte"] is None
        else:
            assert 1 < row["bits_per_byte"] < 8
            assert row["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], abs=0.05)
            assert kind == "float32" or row["bits_per_byte"] != exact["bits_per_byte"]
    tiny = [rows["tiny", kind]["bytes"] for kind in kinds]
    assert tiny[0] == 4 * rows["tiny", "float32"]["parameters"] == 2 * tiny[1]
    assert tiny[1] > 1.5 * tiny[2] > 2 * tiny[3]
    assert "+0.0000" in result.stdout and "random" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models huge", "There is no run or checkpoint folder 'huge'."),
        ("--tokens 1", "tokens must be at least 2, got 1."),
        ("--eval_tokens 0", "eval_tokens must be at least 1, got 0."),
    ],
)
def test_wrong_input(arguments: str, message: str, tmp_path: Path) -> None:
    result = run_program(PROGRAM, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
