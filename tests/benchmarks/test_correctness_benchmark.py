"""benchmarks/correctness.py: what one test does to its process costs the others nothing."""

import json
from pathlib import Path

import pytest
from helpers.programs import one_sentence, run_program

PROGRAM = "benchmarks/correctness.py"
TESTS = """
import os
import time

import pytest


def test_first():
    pass


def test_ends_the_process():
    os._exit(3)


@pytest.mark.skip(reason="there is no such card")
def test_of_another_card():
    pass


def test_hangs():
    time.sleep(600)


def test_leaves_the_device_in_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_is_wrong():
    assert 1 + 1 == 3


@pytest.mark.parametrize("seconds", [0.0])
def test_last(seconds, tmp_path):
    time.sleep(seconds)
"""


@pytest.mark.slow  # each new process imports torch
def test_every_test_has_an_outcome(tmp_path: Path) -> None:
    file = tmp_path / "test_made_up.py"
    file.write_text(TESTS)
    flags = ["--device", "cpu", "--tests", file, "--seconds", 5, "--output", "out.json"]
    done = run_program(PROGRAM, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == results
    found = {name.split("::")[-1]: outcome for name, outcome in results["outcomes"].items()}
    assert {name: outcome["outcome"] for name, outcome in found.items()} == {
        "test_first": "passed",
        "test_ends_the_process": "failed",
        "test_of_another_card": "skipped",
        "test_hangs": "failed",
        "test_leaves_the_device_in_error": "failed",
        "test_is_wrong": "failed",
        "test_last[0.0]": "passed",
    }
    assert found["test_hangs"]["reason"] == "it ended the process, or took more than 5 seconds"
    assert "illegal memory access" in found["test_leaves_the_device_in_error"]["reason"]
    assert "there is no such card" in done.stdout and "2 passed, 4 failed, 1 skipped" in done.stdout
    assert "test_is_wrong failed: assert (1 + 1) == 3" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "sentence"),
    [("tests/test_nothing.py", "There is no file of tests 'tests/test_nothing.py'"),
     ("tests/test_gpu.py::test_nothing", "pytest could not run the tests tests/test_gpu.py::test_nothing")],
)  # fmt: skip
def test_wrong_input(tests: str, sentence: str, tmp_path: Path) -> None:
    done = run_program(PROGRAM, "--device", "cpu", "--tests", tests, cwd=tmp_path)
    assert sentence in one_sentence(done)
