"""What is tried before a run: that a micro-batch is tried with all that a later step has in memory."""

from pathlib import Path

import pytest
import torch
from helpers.runs import QUICK, train_here
from modeling_mini.analysis.cost import ModelCost
from training_mini import kernels, rehearsal
from training_mini.arguments import parse_arguments
from training_mini.cpu_attention import BLOCKS, name_of
from training_mini.memory import memory_of_micro_batch
from training_mini.rehearsal import lack_of_memory
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_on_a_cpu_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size"]))
    one = rehearsal.memory_on_cpu(trainer.run, 1)
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 2.5 * one)
    sizes: list[int] = []
    trainer.run.unwrapped_model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    trainer.begin()
    trainer.monitor.close()
    trainer.run.run_folder.release()
    assert trainer.micro_batches == 4 and sizes == [2, 2]


@pytest.mark.slow
def test_processes_of_a_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size"]))
    two = rehearsal.memory_on_cpu(trainer.run, 2)
    gradients = 4 * trainer.run.unwrapped_model.num_parameters()
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 2 * (two + gradients))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    trainer.begin()
    trainer.monitor.close()
    trainer.run.run_folder.release()
    assert trainer.micro_batches == 4, "with the gradients of the micro-batches before"


@pytest.mark.slow
def test_a_micro_batch_is_tried_as_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measured_choice", lambda run, sequences: ({}, True, BLOCKS, False))
    trainer = Trainer(parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size"]))
    model, ways = trainer.run.unwrapped_model, []
    model.register_forward_pre_hook(
        lambda *_: ways.append((torch.is_autocast_enabled("cpu"), model.config._attn_implementation))
    )
    trainer.begin()
    trainer.monitor.close()
    trainer.run.run_folder.release()
    assert ways == [(True, name_of(BLOCKS))]


@pytest.mark.slow
def test_on_a_cpu_what_may_not_fit_is_said_before_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK, "--output_dir", str(tmp_path / "run"), "--max_steps", "3"]
    trainer = Trainer(parse_arguments(flags))
    memory = ModelCost(trainer.run.config).training_memory(8, 64)
    # The allocator leaves gaps between small tensors: of 16 MiB each, 2.19 GiB were measured for 1.27 by the formula.
    needed = memory.gradients + memory.optimizer + int(1.8 * (memory.activations + memory.working))
    monkeypatch.setattr(rehearsal, "free_memory", lambda: needed)
    assert lack_of_memory(trainer.run, 1) == ""
    monkeypatch.setattr(rehearsal, "free_memory", lambda: needed - 1)
    assert lack_of_memory(trainer.run, 2) == ""
    large = 2**25 // (64 * 64 * 4)  # sequences, of hidden states of 32 MiB
    memory = memory_of_micro_batch(ModelCost(trainer.run.config), trainer.arguments, large, "float32")
    assert rehearsal.memory_on_cpu(trainer.run, large) == memory
    said = []
    trainer.run.unwrapped_model.register_forward_pre_hook(lambda *_: said.append(capsys.readouterr().err))
    trainer.train()
    assert said[0].startswith("warning: A step on 8 x 64 tokens at once may need 0.0 GiB of memory beside the model, ")
    assert said[0].count("\n") == 1
    resumed = Trainer(parse_arguments(["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "4"]))
    assert lack_of_memory(resumed.run, 1) == "", "the states of the optimizers are in memory"
    resumed.run.run_folder.release()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_first_step_that_fails_leaves_the_run_that_it_would_replace(tmp_path: Path) -> None:
    flags = ["--max_steps", "3", "--overwrite"]
    first, _ = train_here(tmp_path / "run", *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    trainer = Trainer(parse_arguments([*QUICK, *flags, "--output_dir", str(tmp_path / "run")]))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.run.unwrapped_model.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    again, _ = train_here(tmp_path / "run", *flags)
    weights = again.run.unwrapped_model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in first.run.unwrapped_model.state_dict().items())
