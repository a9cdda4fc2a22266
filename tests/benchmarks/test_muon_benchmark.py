"""benchmarks/muon.py: each optimizer trains with each seed, and torch's Muon is torch's."""

import functools
import json
from pathlib import Path

import pytest
import torch
from helpers.programs import ROOT, one_sentence_of, run_program
from training_mini import TrainingSettings
from training_mini.optimizers import OPTIMIZERS

PROGRAM = "benchmarks/muon.py"


@pytest.mark.slow
def test_every_optimizer_has_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    known = dict(OPTIMIZERS)
    import muon

    # Models and evaluations of seconds.
    small = {"size": "tiny", "train_batch_size": 4, "max_eval_tokens": 4096}
    monkeypatch.setattr(muon, "TrainingSettings", functools.partial(TrainingSettings, **small))
    steps: list[str] = []
    for optimizer_class in (torch.optim.Muon, torch.optim.AdamW):
        step = optimizer_class.step
        monkeypatch.setattr(
            optimizer_class,
            "step",
            lambda self, *more, step=step: [steps.append(type(self).__name__), step(self, *more)][1],
        )
    try:
        results = muon.measure(
            muon.Settings(seeds=[1], max_steps=2, dataset="sample", output=str(tmp_path / "out.json"))
        )
    finally:
        OPTIMIZERS.clear()
        OPTIMIZERS.update(known)
    rows = {row["name"]: row for row in results["optimizers"]}
    assert list(rows) == ["Mini's Muon", "torch.optim.Muon", "AdamW"]
    assert steps.count("Muon") == 2 and steps.count("AdamW") == 6
    assert len({row["mean"] for row in rows.values()}) == 3
    for row in rows.values():
        assert row["bits_per_byte"] == [row["mean"]] and 0 < row["mean"] < 8 and row["milliseconds"] > 0
    assert json.loads((tmp_path / "out.json").read_text()) == results, "written after the seed, not only at the end"


def test_wrong_input() -> None:
    result = run_program(PROGRAM, "--max_steps", "1", cwd=ROOT)
    assert "max_steps must be at least 2" in one_sentence_of(result.returncode, result.stderr)
