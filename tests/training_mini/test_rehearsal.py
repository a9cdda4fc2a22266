"""What is tried before a run: that a micro-batch is tried with all that a later step has in memory."""

from pathlib import Path

import pytest
import torch
from helpers.runs import QUICK, train_here
from modeling_mini.analysis.cost import ModelCost
from training_mini import rehearsal
from training_mini.arguments import parse_arguments
from training_mini.memory import memory_of_micro_batch
from training_mini.trainer import Trainer


def numbers_beside(trainer: Trainer) -> list[dict[str, int]]:
    """For each forward pass of `begin`, how many numbers of gradients and of states there are beside the weights."""
    seen: list[dict[str, int]] = []
    model = trainer.run.unwrapped_model

    def look(*_: object) -> None:
        states = [
            tensor
            for optimizer in trainer.run.optimizers
            for state in optimizer.state.values()
            for tensor in state.values()
            if tensor.ndim
        ]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        seen.append(
            {name: sum(map(torch.numel, tensors)) for name, tensors in (("states", states), ("gradients", gradients))}
        )

    model.register_forward_pre_hook(look)
    trainer.begin()
    trainer.monitor.close()
    trainer.run.run_folder.release()
    return seen


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_micro_batch_is_tried_beside_states_and_gradients(optimizer: str, tmp_path: Path) -> None:
    flags = [*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size", "--optimizer", optimizer]
    trainer = Trainer(parse_arguments([*flags, "--gradient_accumulation_steps", "2", "--warmup_steps", "0"]))
    model = trainer.run.unwrapped_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = [group["initial_lr"] for one in trainer.run.optimizers for group in one.param_groups]
    first, second = numbers_beside(trainer)
    matrices = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    # Two moments of AdamW, or the one of Muon for the matrices.
    states = 2 * model.num_parameters() - (matrices if optimizer == "muon" else 0)
    assert first == {"states": states, "gradients": 0}
    assert second == {"states": states, "gradients": model.num_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(one.state for one in trainer.run.optimizers)
    assert [group["lr"] for one in trainer.run.optimizers for group in one.param_groups] == rates


def test_on_a_cpu_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size"]))
    one = memory_of_micro_batch(ModelCost(trainer.run.config), trainer.arguments, 1, "float32")
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 2.5 * one)
    sizes: list[int] = []
    trainer.run.unwrapped_model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    trainer.begin()
    trainer.monitor.close()
    trainer.run.run_folder.release()
    assert trainer.micro_batches == 4 and sizes == [2, 2]


def test_a_run_that_is_resumed_keeps_its_states(tmp_path: Path) -> None:
    train_here(tmp_path / "run", "--max_steps", 3)
    flags = ["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--find_batch_size"]
    trainer = Trainer(parse_arguments(flags))
    optimizer = trainer.run.optimizers[0]
    before = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    (seen,) = numbers_beside(trainer)
    assert seen["states"] and seen["gradients"] == 0
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
