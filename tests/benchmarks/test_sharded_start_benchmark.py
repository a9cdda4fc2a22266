"""benchmarks/sharded_start.py, with a model that is made in a moment."""

import json
from pathlib import Path

import pytest
from helpers.programs import one_sentence, run_program

PROGRAM = "benchmarks/sharded_start.py"


@pytest.mark.slow
def test_figures(tmp_path: Path) -> None:
    shape = "--processes 2 --hidden_size 256 --num_hidden_layers 6 --intermediate_size 512".split()
    result = run_program(PROGRAM, *shape, "--output", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    assert figures["whole_bytes"] == 4 * figures["parameters"] > 4 * 10**6
    assert 0.5 <= figures["held_bytes_of_a_process"] / figures["whole_bytes"] < 0.51, "a half, and uneven vectors"
    assert figures["seconds"] > 0 and figures["peak_bytes_of_a_process"] > 0
    result = run_program(PROGRAM, "--hidden_size", "100", cwd=tmp_path)
    assert one_sentence(result) == "hidden_size must be a multiple of 64, got 100."
