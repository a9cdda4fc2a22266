"""What a CPU computes with is chosen once in a run."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import QUICK, losses, train_here, weights
from modeling_mini import MiniConfig, MiniForCausalLM, native_code
from torch import nn
from training_mini import build, kernels
from training_mini import native_attention as native_attention_module
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import STATE, TrainerState, read_state
from training_mini.cpu_attention import BLOCKS, FUSED, NATIVE, OPERATORS
from training_mini.hooks import Hooks
from training_mini.kernels import choose_kernels
from training_mini.muon import Muon
from training_mini.native_attention import native_attention
from training_mini.trainer import Trainer
from transformers import TrainerCallback

CHOICE = {"128 x 128": ["output"]}


def run_with(state: TrainerState) -> Any:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1))
    optimization = SimpleNamespace(
        train_batch_size=16, gradient_accumulation_steps=2, max_steps=10**6, max_minutes=None, dropout_start=None
    )
    settings = SimpleNamespace(bf16=None, torch_compile=None, gradient_checkpointing=False)
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), mixed_precision="no", num_processes=2, is_main_process=True
        ),
        arguments=SimpleNamespace(optimization=optimization, run=settings),
        blocks=list(model.model.layers),
        config=model.config,
        corpus=None,
        has_own_code=False,
        optimizers=[Muon(model.model.layers[0].mlp.parameters())],
        parallel=SimpleNamespace(
            from_main=lambda value: value,
            anyone=bool,
            tensor_size=1,
            data_processes=2,
            is_sharded=False,
            is_deepspeed=False,
        ),
        problems=[],
        state=state,
        unwrapped_model=model,
    )


def apply(change: dict[str, Any], run: Any) -> None:
    """Changes what has these names in the run, wherever it is."""
    for name, value in change.items():
        for part in (run, run.accelerator, run.parallel, run.arguments.run, run.arguments.optimization):
            if hasattr(part, name):
                setattr(part, name, value)


def is_by_onednn(run: Any) -> bool:
    return "forward" in vars(run.unwrapped_model.model.layers[0].self_attn.q_proj)


def test_a_new_run_measures_its_share_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(kernels, "measure_products", lambda model, tokens: measured.append(tokens) or CHOICE)
    monkeypatch.setattr(kernels, "bfloat16_is_faster", lambda model, tokens, choice: False)
    monkeypatch.setattr(kernels, "fastest_attention", lambda config, sequences, dtype, ways: FUSED)
    run = run_with(TrainerState(corpus={}, architecture={}))
    choose_kernels(run)
    assert measured == [4 * 256]
    assert run.state.products == CHOICE
    assert run.state.processor
    assert is_by_onednn(run)
    assert run.problems == []


@pytest.mark.parametrize("processor", ["this one", "another"])
def test_a_resumed_run_keeps_its_choice(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_products", None)
    monkeypatch.setattr(kernels, "processor_name", lambda: "this one")
    run = run_with(TrainerState(corpus={}, architecture={}, products=CHOICE, processor=processor))
    choose_kernels(run)
    assert is_by_onednn(run)
    assert [("began on another processor (another)" in problem) for problem in run.problems] == (
        [True] if processor == "another" else []
    )


@pytest.mark.parametrize(
    ("situation", "is_bfloat16", "dtype"),
    [
        ("a plain run", True, torch.bfloat16),
        ("slower", False, torch.float32),
        ("--bf16 false", False, torch.float32),
        ("--bf16", False, torch.bfloat16),  # accelerate does it
        ("sharded", False, torch.float32),
        ("quantized", False, torch.float32),
    ],
)
def test_bfloat16_and_blocks(
    situation: str, is_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(kernels, "SMALLEST_STEP", 0)
    monkeypatch.setattr(kernels, "measure_products", lambda model, tokens: CHOICE)
    monkeypatch.setattr(kernels, "bfloat16_is_faster", lambda model, tokens, choice: situation != "slower")
    monkeypatch.setattr(kernels, "fastest_attention", lambda config, *what: measured.append(what) or BLOCKS)
    run = run_with(TrainerState(corpus={}, architecture={}))
    if situation.startswith("--bf16"):
        run.arguments.run.bf16 = situation == "--bf16"
        run.accelerator.mixed_precision = "bf16" if run.arguments.run.bf16 else "no"
    run.parallel.is_sharded = situation == "sharded"
    run.unwrapped_model.is_quantized = situation == "quantized"
    choose_kernels(run)
    assert run.state.is_bfloat16 == is_bfloat16 and run.state.attention == BLOCKS
    ways = [BLOCKS, NATIVE] if dtype == torch.float32 else [BLOCKS]
    assert measured == [(4, dtype, ways)], "the share of a process in a micro-batch"
    assert is_by_onednn(run) == (dtype == torch.float32), "bfloat16 is left to torch"
    assert run.optimizers[0].dtype == (torch.bfloat16 if is_bfloat16 else None), "so does Muon"
    run.optimizers[0].dtype = torch.float32
    choose_kernels(run)
    assert run.optimizers[0].dtype == torch.float32, "the user chose"


@pytest.mark.parametrize(
    ("change", "compiled"),
    [
        ({}, True),
        ({"max_steps": 200}, False),
        ({"max_steps": 4000}, True),
        ({"max_steps": 4000, "mixed_precision": "bf16"}, False),  # which takes half the time
        ({"max_steps": 6000, "mixed_precision": "bf16"}, True),
        ({"max_minutes": 5}, True),
        ({"max_minutes": 1}, False),
        ({"dropout_start": 0.1}, False),
        ({"torch_compile": False}, False),
        ({"torch_compile": True}, False),  # then it is the user who chose, and how
        ({"gradient_checkpointing": True}, False),
        ({"num_processes": 2}, False),
        ({"is_sharded": True}, False),
        ({"has_own_code": True}, False),
        ({"compiler": None}, False),
    ],
    ids=str,
)
def test_long_runs_are_compiled(change: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_products", "bfloat16_is_faster"):
        monkeypatch.setattr(kernels, name, lambda *what: {})
    monkeypatch.setattr(kernels, "fastest_attention", lambda *what: FUSED)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: change.get("compiler", "/usr/bin/g++"))
    run = run_with(TrainerState(corpus={}, architecture={}))
    run.accelerator.num_processes = 1
    apply(change, run)
    choose_kernels(run)
    assert run.state.is_compiled == compiled


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, ["attention", "is_bfloat16", "is_compiled"]),
        ({"num_processes": 2}, ["attention", "is_bfloat16"]),
        ({"is_sharded": True}, ["attention"]),
        ({"tensor_size": 2}, []),
        ({"device": torch.device("cuda")}, []),
        ({"bf16": False}, ["attention", "is_compiled"]),
        ({"mixed_precision": "bf16", "bf16": True}, ["attention", "is_compiled"]),
        ({"torch_compile": False}, ["attention", "is_bfloat16"]),
    ],
    ids=str,
)
def test_a_resumed_run_leaves_what_no_longer_fits(
    change: dict[str, Any], left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "processor_name", lambda: "this one")
    choice = {"is_bfloat16": True, "attention": BLOCKS, "is_compiled": True}
    run = run_with(TrainerState(corpus={}, architecture={}, products=CHOICE, processor="this one", **choice))
    run.accelerator.num_processes = 1
    apply(change, run)
    choose_kernels(run)
    assert sorted(name for name in choice if getattr(run.state, name) not in (False, FUSED)) == left
    # oneDNN's operator takes float32 alone, and a shared or moved model has products of its own.
    assert is_by_onednn(run) == (change.keys() & {"tensor_size", "device", "mixed_precision"} == set())


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True}], ids=str)
def test_a_run_leaves_bfloat16_where_no_instructions_are(
    capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run = run_with(TrainerState(corpus={}, architecture={}, is_bfloat16=True, processor="another"))
    choose_kernels(run)
    assert run.state.is_bfloat16 == bool(capabilities)
    assert ["float32 from here on" in problem for problem in run.problems[1:]] == ([] if capabilities else [True])
    assert run.optimizers[0].dtype == (torch.bfloat16 if capabilities else None)


def chosen(
    monkeypatch: pytest.MonkeyPatch, is_bfloat16: bool = False, attention: str = FUSED, is_compiled: bool = False
) -> None:
    """Makes a new run choose this."""
    choice = {}, is_bfloat16, attention, is_compiled
    monkeypatch.setattr(kernels, "measured_choice", lambda run, sequences: choice)


@pytest.mark.slow
def test_a_run_in_bfloat16_and_blocks_resumes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(tmp_path / "plain", "--max_steps", 4)
    chosen(monkeypatch, is_bfloat16=True, attention=BLOCKS)
    trainer, _ = train_here(whole, "--max_steps", 4, "--save_steps", 2)
    assert "bf16" in " ".join(build.description_of(trainer.run, 1, None))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_4")
    chosen(monkeypatch)  # what a new run would choose now
    train_here(parts, "--max_steps", 4, "--resume")
    assert losses(parts) == losses(whole) != losses(tmp_path / "plain")
    assert losses(whole) == pytest.approx(losses(tmp_path / "plain"), abs=0.05)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name


@pytest.mark.slow
def test_a_run_with_attention_in_cpp_resumes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, without = tmp_path / "whole", tmp_path / "parts", tmp_path / "without"
    chosen(monkeypatch, attention=NATIVE)
    calls = []
    monkeypatch.setitem(OPERATORS, NATIVE, lambda *states: (calls.append(1), native_attention(*states))[1])
    train_here(whole, "--max_steps", 4, "--save_steps", 2)
    assert calls
    for copy in (parts, without):
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "checkpoints" / "step_4")
    chosen(monkeypatch)  # what a new run would choose now
    train_here(parts, "--max_steps", 4, "--resume")
    assert losses(parts) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name
    monkeypatch.setattr(kernels, "has_native_attention", lambda: False)
    trainer, _ = train_here(without, "--max_steps", 4, "--resume")
    assert trainer.run.state.attention == BLOCKS
    assert any(problem.startswith("Attention in C++ cannot be compiled here.") for problem in trainer.run.problems)
    assert losses(without) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "ways"),
    [
        ({}, [BLOCKS, NATIVE]),
        ({"max_steps": 200}, [BLOCKS]),
        ({"max_minutes": 1}, [BLOCKS]),
        ({"mixed_precision": "bf16"}, [BLOCKS]),
        ({"num_processes": 2}, [BLOCKS, NATIVE]),
        ({"torch_compile": False}, [BLOCKS, NATIVE]),
        ({"compiler": None}, [BLOCKS]),
    ],
    ids=str,
)
def test_long_runs_compile_attention(change: dict[str, Any], ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(kernels, "SMALLEST_STEP", 0)
    for name in ("measure_products", "bfloat16_is_faster"):
        monkeypatch.setattr(kernels, name, lambda *what: {})
    monkeypatch.setattr(kernels, "fastest_attention", lambda *what: measured.append(what[-1]) or FUSED)
    monkeypatch.setattr(kernels, "has_native_attention", lambda: True)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: change.get("compiler", "/usr/bin/g++"))
    run = run_with(TrainerState(corpus={}, architecture={}))
    run.accelerator.num_processes = 1
    apply(change, run)
    choose_kernels(run)
    assert measured == [ways]


def test_a_compiler_that_fails_leaves_attention_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "attention_library", native_attention_module.attention_library.__wrapped__)
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not kernels.has_native_attention()
    assert kernels.has_native_attention()


def test_a_state_of_before_there_were_three_ways(tmp_path: Path) -> None:
    for has_blocks, attention in ((True, BLOCKS), (False, FUSED)):
        state = {"corpus": {}, "architecture": {}, "has_blocks": has_blocks}
        (tmp_path / STATE).write_text(json.dumps(state))
        assert read_state(tmp_path).attention == attention


@pytest.mark.slow
def test_gradient_checkpointing_computes_attention_again_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(monkeypatch, is_bfloat16=True, attention=BLOCKS)
    for name, flags in {"kept": [], "again": ["--gradient_checkpointing"]}.items():
        trainer, _ = train_here(tmp_path / name, "--max_steps", 3, *flags)
        assert trainer.run.state.attention == BLOCKS
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_blocks_are_compiled_for_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--max_steps", 4, "--eval_steps", 2, "--sample_every", 2, "--internals_steps", 2]
    train_here(tmp_path / "plain", *flags)
    chosen(monkeypatch, attention=BLOCKS, is_compiled=True)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer, _ = train_here(tmp_path / "compiled", *flags)
    assert trainer.run.state.is_compiled and trainer.run.problems == []
    assert counters["stats"]["unique_graphs"] == 1, "one block for all, and nothing else"
    assert not any(block._compiled_call_impl for block in trainer.run.blocks), "who goes on with it has it plain"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


class MixedConfig(MiniConfig):
    model_type = "mixed_mini"


class MixedForCausalLM(MiniForCausalLM):
    """Adds what it computes to float32, which autocast does not allow."""

    config_class = MixedConfig

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = super().forward(input_ids, **inputs)
        rows = self.model.layers[0].self_attn.q_proj(torch.ones(1, self.config.hidden_size))
        output.logits = output.logits + 0 * torch.zeros_like(rows, dtype=torch.float32).index_add_(
            0, torch.tensor([0]), rows
        ).sum()  # fmt: skip
        return output


@pytest.mark.slow
def test_a_model_that_fails_in_bfloat16_trains_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for name, choice in {"plain": {}, "chosen": {"is_bfloat16": True, "attention": BLOCKS}}.items():
        chosen(monkeypatch, **choice)
        flags = [*QUICK, "--max_steps", "3", "--output_dir", str(tmp_path / name)]
        runs[name] = Trainer(parse_arguments(flags), Hooks(model=MixedForCausalLM))
        runs[name].train()
    assert losses(tmp_path / "chosen") == losses(tmp_path / "plain")
    state, run = runs["chosen"].state, runs["chosen"].run
    assert not state.is_bfloat16 and state.attention == FUSED and run.optimizers[0].dtype is None
    assert sum(problem.startswith("The model trains in float32") for problem in run.problems) == 1


@pytest.mark.slow
def test_callbacks_see_no_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    chosen(monkeypatch, is_compiled=True)

    class Computes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **about: Any) -> None:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            model(torch.arange(8, 20 + state.global_step)[None])
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)

    train_here(tmp_path / "run", "--max_steps", 3, callbacks=(Computes(),))
    assert compiled == [0, 0, 0]


@pytest.mark.slow
def test_each_run_of_a_process_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(monkeypatch, is_compiled=True)
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    for length in (16, 32):
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(recompile_limit=1):  # in place of 8 runs
            train_here(tmp_path / str(length), "--max_steps", 3, "--max_position_embeddings", length)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, length


@pytest.mark.slow
def test_a_compiler_that_fails_costs_the_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_here(tmp_path / "plain", "--max_steps", 3)
    chosen(monkeypatch, is_compiled=True)

    def fail(*what: object, **more: object) -> None:
        raise RuntimeError("no such header\nand much more")

    monkeypatch.setattr(nn.Module, "compile", lambda module: setattr(module, "_compiled_call_impl", fail))
    trainer, _ = train_here(tmp_path / "run", "--max_steps", 3)
    assert not trainer.run.state.is_compiled
    (problem,) = trainer.run.problems
    assert problem == "The blocks of the model are not compiled, so training is slower: no such header"
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_a_compiler_that_hangs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(monkeypatch, is_compiled=True)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexec sleep 100\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native_code, "SECONDS", 0.5)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        trainer, _ = train_here(tmp_path / "run", "--max_steps", 3)
    assert not trainer.run.state.is_compiled
    (problem,) = trainer.run.problems
    assert problem.endswith(f"so training is slower: the C++ compiler {str(compiler)!r} gave no answer in 0.5 seconds.")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--torch_compile"], ["--torch_compile", "--compile_regions"]], ids=" ".join)
@pytest.mark.parametrize(
    ("script", "reason"),
    [("exec sleep 100", r"gave no answer in 0\.5 seconds\.$"), (None, "No working C\\+\\+ compiler")],
)
def test_a_compiler_that_was_asked_for_and_fails_ends_the_run_before_it_begins(
    script: str | None, reason: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --overwrite, the run before it is still there."""
    train_here(tmp_path / "run", "--max_steps", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(native_code, "SECONDS", 0.5)
    torch.compiler.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(compiler)), "fx_graph_cache": False}),
        pytest.raises(ValueError, match=f"^--torch_compile fails here, so leave it out: .*{reason}"),
    ):
        train_here(tmp_path / "run", "--max_steps", 3, "--overwrite", *flags)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
