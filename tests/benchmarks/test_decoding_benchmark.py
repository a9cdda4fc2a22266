"""benchmarks/decoding.py, in seconds: every case has figures, and wrong input one sentence."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
from helpers.programs import ROOT, run_program

PROGRAM = "benchmarks/decoding.py"


@pytest.mark.slow  # it compiles
def test_every_case_has_figures(tmp_path: Path) -> None:
    arguments = "--size tiny --layers 1 --batch_sizes 1 2 --prompts 4 9 --tokens 5 --rounds 1 --output out.json".split()
    result = run_program(PROGRAM, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    found = {(row["batch_size"], row["prompt"], row["manner"], row["contender"]) for row in figures["rows"]}
    of_one = {("onnxruntime", "greedy")}
    if importlib.util.find_spec("llama_cpp") is not None:
        of_one.add(("llama.cpp", "greedy"))
    assert found == {
        (batch, prompt, manner, contender)
        for batch in (1, 2)
        for prompt in (4, 9)
        for manner in ("greedy", "sampling")
        for contender in ("Mini, compiled", "Mini", "Mini, loop", "Llama")
    } | {(1, prompt, manner, contender) for prompt in (4, 9) for contender, manner in of_one}
    for row in figures["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * 5 / row["seconds"][0])
        assert 0 < row["seconds_to_first_token"] < 60
        further = row["seconds"][0] - row["seconds_to_first_token"]
        assert row["seconds_per_further_token"] == pytest.approx(further / 4)
        assert row["contender"] != "Llama" or row["times_llama"] == 1
    assert set(figures["cache_gain"]["by_prompt"]) == {"4", "9"}
    # LayerNorm has biases, RMSNorm none; else they are of one size.
    assert figures["parameters"]["Mini"] == figures["parameters"]["Llama"] + (2 * 1 + 1) * 128, "of one layer"
    assert "come" in result.stdout and "Peak memory" in result.stdout


def test_long_prompts_of_many_sequences_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    settings_class = importlib.import_module("decoding").Settings
    settings = settings_class(device="cpu", batch_sizes=[1, 8], prompts=[16, 1000])
    assert settings.sizes == [(1, 16), (1, 1000), (8, 16)]
    settings = settings_class(device="cpu", batch_sizes=[8], prompts=[1000])
    assert settings.sizes == [(8, 1000)]  # what was asked for alone is measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch_sizes 0", "batch_sizes must be at least 1 each, got [0]."),
        ("--tokens 1", "tokens must be at least 2, got 1."),
        ("--output nowhere/out.json", "There is no folder for the output 'nowhere/out.json'."),
        ("--size huge", "huge"),
        ("--runtimes vllm", "runtimes are llama.cpp, onnxruntime, not vllm."),
    ],
)
def test_wrong_input(arguments: str, message: str, tmp_path: Path) -> None:
    result = run_program(PROGRAM, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
