"""benchmarks/scaling.py, in seconds: each figure is there and hangs together, and wrong input is one sentence."""

import json
from pathlib import Path

import pytest
from helpers.programs import run_program

PROGRAM = "benchmarks/scaling.py"


@pytest.mark.slow  # it learns merges
def test_figures(tmp_path: Path) -> None:
    sizes = "--megabytes 2 --bpe_megabytes 1 --bpe_entries 1000 --size small --steps 1 --rounds 1"
    arguments = f"{sizes} --output out.json".split()
    result = run_program(PROGRAM, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    # What a checkpoint costs is a difference of two times: around nothing, noise puts it on either side of zero.
    differences = {"steps_lost_waiting", "steps_lost_in_background"}
    assert differences < set(figures)
    assert all(value > 0 for name, value in figures.items() if name not in {"machine", *differences})
    assert 2 < figures["bytes_per_bpe_token"] < 6, "BPE was what encoded"
    # Weights and one momentum in float32 (two moments for the embedding and the vectors), and their names.
    assert 8 < figures["checkpoint_bytes_per_parameter"] < 9
    assert figures["encoding_bytes_megabytes_per_second"] > figures["encoding_bpe_megabytes_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "rounds must be at least 1, got 0."),
        ("--megabyte 1", "did you mean 'megabytes'?"),
        ("--output nowhere/out.json", "There is no folder for the output 'nowhere/out.json'."),
    ],
)
def test_wrong_input(arguments: str, message: str, tmp_path: Path) -> None:
    result = run_program(PROGRAM, *arguments.split(), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
