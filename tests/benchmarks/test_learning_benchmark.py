"""benchmarks/learning.py, in seconds: whole programs beside each other, and wrong input one sentence."""

import importlib
import json
from pathlib import Path

import pytest
from helpers.programs import ROOT, run_program

PROGRAM = "benchmarks/learning.py"

# What the benchmark needs of a nanoGPT checkout: train.py, which reads the data beside it and leaves a checkpoint, and
# model.py with GPT and GPTConfig.
MODEL = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        assert idx.shape == targets.shape and torch.equal(idx[:, 1:], targets[:, :-1])
        return self.embedding(idx), None
"""
TRAIN = """
import pickle
import sys
from pathlib import Path

import numpy
import torch
from model import GPT, GPTConfig

assert "--max_iters=3" in sys.argv and "--block_size=64" in sys.argv and Path(sys.argv[1]).is_file()
data = Path("data/shakespeare_char")
size = pickle.loads((data / "meta.pkl").read_bytes())["vocab_size"]
lengths = [len(numpy.fromfile(data / name, dtype=numpy.uint16)) for name in ("train.bin", "val.bin")]
assert lengths == [900 * 4, 100 * 4], lengths
arguments = {"block_size": 64, "vocab_size": size}
model = GPT(GPTConfig(**arguments))
torch.nn.init.zeros_(model.embedding.weight)
Path("out-shakespeare-char").mkdir()
torch.save({"model_args": arguments, "model": model.state_dict()}, "out-shakespeare-char/ckpt.pt")
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A text of four characters, and something like a nanoGPT checkout."""
    (tmp_path / "text.txt").write_text("abcd" * 1000)
    checkout = tmp_path / "nanoGPT"
    (checkout / "config").mkdir(parents=True)
    (checkout / "config" / "train_shakespeare_char.py").touch()
    for name, code in (("model.py", MODEL), ("train.py", TRAIN), ("configurator.py", "")):
        (checkout / name).write_text(code)
    return tmp_path / "text.txt", checkout


@pytest.mark.slow
def test_whole_programs_in_turns(files: tuple[Path, Path], tmp_path: Path) -> None:
    text, checkout = files
    flags = ["--only", "a", "--seeds", "1", "2", "--max_steps", "3", "--output", "out.json"]
    result = run_program(PROGRAM, *flags, "--shakespeare", text, "--nanogpt", checkout, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == results
    nanogpt, mini = results["contenders"]
    assert (nanogpt["name"], mini["name"]) == ("nanoGPT", "Mini")
    assert nanogpt["mean"] == pytest.approx(1.386294), "it knows nothing: ln 4"
    assert nanogpt["parameters"] == 16 and mini["parameters"] > 5e5
    for row in (nanogpt, mini):
        assert len(row["runs"]) == 2 and row["seconds"] > 0 and row["goal"] == 1.5
    assert mini["runs"][0]["value"] != mini["runs"][1]["value"], "seeds differ"
    assert 0 < mini["mean"] < 5 and mini["valid_functions"] is None
    assert mini["runs"][0]["sample"] and nanogpt["runs"][0]["sample"] is None


def test_a_later_seed_that_fails_leaves_the_figures_of_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    learning = importlib.import_module("learning")

    def program(seed: int, folder: Path) -> object:
        if seed == 2:
            raise ValueError("It ended with exit code 1.")
        return learning.Result(seconds=9.0, value=1.25, parameters=7)

    monkeypatch.setattr(learning, "contenders", lambda settings: {("b", "Mini"): program})
    settings = learning.Settings(only=["b"], seeds=[1, 2], output=str(tmp_path / "out.json"))
    with pytest.raises(ValueError, match="exit code 1"):
        learning.measure(settings)
    (row,) = json.loads((tmp_path / "out.json").read_text())["contenders"]
    assert row["mean"] == 1.25 and [run["parameters"] for run in row["runs"]] == [7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--only a", "Part a needs the text of Tiny Shakespeare"),
        ("--only b --nanogpt nowhere", "There is no train.py in 'nowhere'"),
        ("--only b --max_steps 0", "max_steps must be at least 1, got 0"),
        ("--only d", "'d'"),
    ],
)
def test_wrong_input(flags: str, sentence: str, tmp_path: Path) -> None:
    result = run_program(PROGRAM, *flags.split(), cwd=tmp_path)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr
