"""benchmarks/training.py, in seconds: every contender that was asked for has figures, and wrong input one sentence."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers.programs import ROOT, run_program

PROGRAM = "benchmarks/training.py"
QUICK = "--size tiny --batch_size 1 --context 16 --rounds 1 --steps 1".split()

# What the benchmark needs of a nanoGPT checkout: GPT and GPTConfig, a call with targets that returns logits and loss,
# and a constructor that prints.
NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        print("a model of", sum(parameter.numel() for parameter in self.parameters()))

    def forward(self, idx, targets=None):
        assert idx.shape == targets.shape and torch.equal(idx[:, 1:], targets[:, :-1])
        logits = self.head(self.embedding(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(NANOGPT)
    return folder


def check(results: dict, models: list[str], modes: list[str]) -> None:
    rows = {(row["model"], row["mode"]): row for row in results["contenders"]}
    assert list(rows) == [(model, mode) for mode in modes for model in models]
    for row in rows.values():
        for name in ("tokens_per_second", "model_flops_per_second", "seconds_to_first_step", "parameters"):
            assert row[name] > 0, (name, row)
        assert len(row["seconds_per_step"]) == results["settings"]["rounds"]
        square, products = results["product_flops_per_second"]["square"], results["product_flops_per_second"]
        assert row["model_flops_per_second"] == pytest.approx(
            row["training_flops_per_token"] * row["tokens_per_second"]
        )
        assert row["mfu_of_square_product"] == pytest.approx(row["model_flops_per_second"] / square)
        assert row["mfu_of_model_products"] == pytest.approx(row["model_flops_per_second"] / products[row["model"]])
    for mode in modes:
        for peer, ratio in results["mini_tokens_per_second_ratio"][mode].items():
            speeds = [rows[model, mode]["tokens_per_second"] for model in ("Mini", peer)]
            assert ratio == pytest.approx(speeds[0] / speeds[1])
    assert {"device", "threads", "torch", "transformers"} <= results["machine"].keys()


@pytest.mark.slow
def test_every_contender_has_figures_also_in_the_file(nanogpt: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--modes", "eager", "--nanogpt", nanogpt, "--output", "figures.json"]
    done = run_program(PROGRAM, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "figures.json").read_text())
    check(results, ["Mini", "Llama", "nanoGPT"], ["eager"])
    rows = {row["model"]: row for row in results["contenders"]}
    # Of one shape: LayerNorm's biases are all that Mini has more.
    assert rows["Mini"]["training_flops_per_token"] == rows["Llama"]["training_flops_per_token"]
    assert rows["Mini"]["parameters"] - rows["Llama"]["parameters"] == (2 * 4 + 1) * 128
    assert rows["nanoGPT"]["parameters"] == 2 * 264 * 128
    if Path("/proc/self/status").exists():
        # A training run holds weights, gradients and two moments at least.
        for model in ("Mini", "Llama"):
            assert rows[model]["peak_memory_bytes"] > 4 * 4 * rows[model]["parameters"]
    assert "nanoGPT, eager" in done.stdout and "MFU" in done.stdout


@pytest.mark.slow
def test_both_modes_without_nanogpt(tmp_path: Path) -> None:
    done = run_program(PROGRAM, *QUICK, "--layers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    check(results, ["Mini", "Llama"], ["eager", "compiled"])
    parameters = {row["model"]: row["parameters"] for row in results["contenders"]}
    assert parameters["Mini"] - parameters["Llama"] == (2 * 1 + 1) * 128, "of one layer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nanogpt", "nowhere"], "There is no model.py in 'nowhere'"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--size", "smal"], "did you mean 'small'?"),
        (["--output", "nowhere/figures.json"], "There is no folder for the output"),
    ],
)
def test_wrong_input_is_one_sentence(flags: list[str], says: str, tmp_path: Path) -> None:
    done = run_program(PROGRAM, *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_batch_that_is_found_is_halved_until_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    training = importlib.import_module("training")
    tried = []

    class Contender(training.Contender):
        def seconds_of_first_step(self) -> float:
            tried.append((self.name, self.settings.batch_size))
            if self.settings.batch_size > (16 if self.name == "Mini" else 4):
                raise torch.OutOfMemoryError
            return 1.0

    monkeypatch.setattr(training, "Contender", Contender)
    settings = training.Settings(device="cpu", size="tiny", batch_size=0, context=16, modes=["eager"])
    contenders, seconds = training.make_contenders(settings)
    assert tried == [("Mini", 64), ("Mini", 32), *[(n, b) for b in (16, 8, 4) for n in ("Mini", "Llama")]]
    assert {contender.settings.batch_size for contender in contenders.values()} == {4}
    assert seconds == dict.fromkeys(contenders, 1.0)
    assert contenders["Mini", "eager"].bytes_between_steps() > 4 * contenders["Mini", "eager"].parameters
    settings.batch_size = 8
    with pytest.raises(ValueError, match="Batches of 8 x 16 do not fit"):
        training.make_contenders(settings)


@pytest.mark.slow
def test_a_model_file_of_something_else_is_refused(nanogpt: Path, tmp_path: Path) -> None:
    (nanogpt / "model.py").write_text("class Network: ...")
    done = run_program(PROGRAM, *QUICK, "--nanogpt", nanogpt, cwd=tmp_path)
    assert done.returncode == 2
    assert "defines no GPT; nanogpt is the folder" in done.stderr and done.stderr.count("\n") == 1
