"""The libraries for matrix products are chosen once in a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from training_mini import build
from training_mini.build import choose_products
from training_mini.checkpoints import TrainerState

CHOICE = {"128 x 128": ["output"]}


def run_with(state: TrainerState) -> Any:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1))
    optimization = SimpleNamespace(train_batch_size=16, gradient_accumulation_steps=2)
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), mixed_precision="no", num_processes=2, is_main_process=True
        ),
        arguments=SimpleNamespace(optimization=optimization),
        config=model.config,
        parallel=SimpleNamespace(from_main=lambda value: value, tensor_size=1, data_processes=2),
        problems=[],
        state=state,
        unwrapped_model=model,
    )


def is_by_onednn(run: Any) -> bool:
    return "forward" in vars(run.unwrapped_model.model.layers[0].self_attn.q_proj)


def test_a_new_run_measures_its_share_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(build, "measure_products", lambda model, tokens: measured.append(tokens) or CHOICE)
    run = run_with(TrainerState(corpus={}, architecture={}))
    choose_products(run)
    assert measured == [4 * 256]
    assert run.state.products == CHOICE
    assert run.state.processor
    assert is_by_onednn(run)
    assert run.problems == []


@pytest.mark.parametrize("processor", ["this one", "another"])
def test_a_resumed_run_keeps_its_choice(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "measure_products", None)
    monkeypatch.setattr(build, "processor_name", lambda: "this one")
    run = run_with(TrainerState(corpus={}, architecture={}, products=CHOICE, processor=processor))
    choose_products(run)
    assert is_by_onednn(run)
    assert [("began on another processor (another)" in problem) for problem in run.problems] == (
        [True] if processor == "another" else []
    )


def test_bfloat16_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "measure_products", None)
    run = run_with(TrainerState(corpus={}, architecture={}))
    run.accelerator.mixed_precision = "bf16"
    choose_products(run)
    assert not is_by_onednn(run)
