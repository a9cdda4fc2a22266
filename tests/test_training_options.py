"""Options of the trainer, each by what it changes in a run."""

import contextlib
import errno
import json
import math
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from helpers.programs import one_sentence, run_program
from helpers.runs import QUICK, losses, metrics, train, train_here, weights
from modeling_mini import MiniConfig, MiniForCausalLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_mini.arguments import parse_arguments
from training_mini.hooks import Hooks
from training_mini.trainer import Trainer
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.mark.slow
def test_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    trainer, result = train_here(tmp_path / "run", "--max_steps", 12, "--ema_decay", 0.5)
    final, average = weights(tmp_path / "run"), trainer.run.ema.averages
    for name, tensor in average.items():
        assert torch.equal(final[name], tensor) and not torch.equal(final[name], trainer.run.ema.parameters[name]), name
    assert trainer.evaluate() == result.evaluation
    trainer.run.ema = None
    assert trainer.evaluate() != result.evaluation, "the weights themselves are others"


@pytest.mark.slow
def test_average_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    settings = ["--ema_decay", 0.9, "--max_steps", 12, "--save_steps", 6, "--optimizer", "muon"]
    settings += ["--dropout_start", 0.3, "--dropout_end", 0.0, "--residual_dropout", 0.1]
    assert train(tmp_path, *settings, "--output_dir", "whole").returncode == 0
    assert train(tmp_path, *settings, "--output_dir", "parts").returncode == 0
    states = tmp_path / "parts" / "checkpoints"
    for path in (states / "step_12").iterdir():
        path.unlink()
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "parts", cwd=tmp_path)
    assert result.returncode == 0 and "Resuming at step 6" in result.stdout, result.stderr
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_annealed_dropout_is_logged(tmp_path: Path) -> None:
    train_here(tmp_path / "run", "--max_steps", 11, "--dropout_start", 0.5, "--dropout_end", 0.1)
    dropouts = [line["dropout"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert dropouts == pytest.approx([0.5 - 0.04 * step for step in range(11)])


@pytest.mark.slow
def test_label_smoothing_and_z_loss_change_the_weights_and_not_the_reported_loss(tmp_path: Path) -> None:
    reported = {}
    for name, flags in {"plain": [], "smooth": ["--label_smoothing", 0.2], "z": ["--z_loss", 0.1]}.items():
        train_here(tmp_path / name, "--max_steps", 6, *flags)
        reported[name] = losses(tmp_path / name)
    for name in ("smooth", "z"):
        # No step has moved the weights before the second: the cross-entropy is that of the plain run.
        assert reported[name][0] == pytest.approx(reported["plain"][0], rel=1e-6)
        assert abs(reported[name][-1] - reported["plain"][-1]) > 1e-4
        assert not torch.equal(
            weights(tmp_path / name)["model.norm.weight"], weights(tmp_path / "plain")["model.norm.weight"]
        )


@pytest.mark.slow
def test_early_stopping(tmp_path: Path) -> None:
    # A learning rate that ruins the model: the first evaluation stays the best.
    settings = "--max_steps 400 --eval_steps 4 --learning_rate 3 --max_grad_norm 0 --early_stopping_patience 3".split()
    result = train(tmp_path, *settings, "--output_dir", "run")
    assert result.returncode == 0, result.stderr
    evaluations = [(line["step"], line["eval_loss"]) for line in metrics(tmp_path / "run") if "eval_loss" in line]
    best = min(evaluations, key=lambda evaluation: evaluation[1])[0]
    assert evaluations[-1][0] == best + 12 < 400
    assert f"Trained {best + 12} steps" in result.stdout and "stopped early" in result.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    again = run_program("train_accelerate.py", "--resume", "--output_dir", "run", cwd=tmp_path)
    assert again.returncode == 0 and f"Trained {best + 12} steps" in again.stdout, "it is still over"


@pytest.mark.slow
def test_samples_of_fixed_prompts(tmp_path: Path) -> None:
    train_here(tmp_path / "run", "--max_steps", 6, "--sample_every", 2, "--sample_prompts", "the cat", "A ")
    train_here(tmp_path / "plain", "--max_steps", 6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(n, p) for n in (2, 4, 6) for p in ("the cat", "A ")]
    assert all(line["text"].startswith(line["prompt"]) and len(line["text"]) > 10 for line in lines)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain"), "looking does not change the run"


@pytest.mark.slow
def test_internals(tmp_path: Path) -> None:
    train_here(tmp_path / "run", "--max_steps", 6, "--optimizer", "adamw", "--internals_steps", 3)
    train_here(tmp_path / "plain", "--max_steps", 6, "--optimizer", "adamw")
    lines = [line for line in metrics(tmp_path / "run") if any(name.startswith("activations/") for name in line)]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert 0 < line["attention_entropy/layers.1"] < math.log(64)
        assert line["activations/layers.0.mlp/rms"] > 0
        assert line["updates/layers.1.self_attn/gradient_norm"] > 0
        assert 0 < line["updates/layers.1.self_attn/ratio"] < 0.1
    assert losses(tmp_path / "run") == losses(tmp_path / "plain"), "looking does not change the run"


def test_internals_of_a_model_that_has_none_end_before_any_work(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    flags = "--dataset sample --max_steps 9 --train_batch_size 4 --max_eval_tokens 512 --internals_steps 8".split()
    arguments = parse_arguments([*flags, "--output_dir", str(tmp_path / "run")])
    sentence = r"^--internals_steps: GPT2LMHeadModel has no layers named as Llama's, .*\. Leave it out\.$"
    with pytest.raises(ValueError, match=sentence):
        Trainer(arguments, Hooks(model=GPT2LMHeadModel(config))).train()
    assert not (tmp_path / "run").exists()


def test_mfu_has_a_peak_that_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = train_here(tmp_path / "run", "--max_steps", 4, "--peak_tflops", 0.5)
    line = next(line for line in metrics(tmp_path / "run") if line["step"] == 3)
    # By hand: 3 x (2 x matrices + 4 x layers x width x context) FLOPs for a token.
    matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 64) + 264 * 64
    flops = 3 * (2 * matrices + 4 * 2 * 64 * 64)
    assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 0.5e12)
    assert "MFU of 0.5 TFLOP/s each" in capsys.readouterr().out
    assert trainer.window.peak_flops == 0.5e12


@pytest.mark.slow
def test_tensorboard_has_what_metrics_have_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    for flags in (["--max_steps", 4], ["--max_steps", 8, "--resume"]):
        train_here(tmp_path / "run", "--report_to", "tensorboard", *flags)
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert list(scalars.values()) == pytest.approx(losses(tmp_path / "run")) and len(scalars) == 8


@pytest.mark.slow
def test_a_tracker_that_cannot_write_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("log", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, full)
    train_here(tmp_path / "run", "--max_steps", 3, "--report_to", "tensorboard")
    assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run" / "final").is_dir()
    errors = capsys.readouterr().err
    for what in ("the metrics of step 3 for trackers", "the end of the run for tensorboard"):
        assert f"warning: {what} could not be written (No space left on device)." in errors


def test_a_tracker_that_does_not_start_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_login(tracker: TensorBoardTracker) -> None:
        path = Path(tracker.logging_dir_param) / "mini"
        path.mkdir(exist_ok=True)
        (path / "began").touch()
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr(TensorBoardTracker, "start", no_login)
    sentence = r"^report_to tensorboard did not start: No API key configured\.$"
    with pytest.raises(ValueError, match=sentence):
        train_here(tmp_path / "new", "--report_to", "tensorboard")
    old = tmp_path / "old"
    (old / "mini").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "mini/events"):
        (old / name).write_text("seed: 1")
    with pytest.raises(ValueError, match=sentence):
        train_here(old, "--overwrite", "--report_to", "tensorboard")
    files = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert files == ["old/config.yaml", "old/metrics.jsonl", "old/mini/events"] and not (tmp_path / "new").exists()


def test_what_trackers_begin_to_write_stays_when_the_run_before_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run" / "mini").mkdir(parents=True)
    for name in ("config.yaml", "mini/old"):
        (tmp_path / "run" / name).write_text("seed: 1")
    train_here(tmp_path / "run", "--overwrite", "--max_steps", 3, "--report_to", "tensorboard")
    names = [path.name for path in (tmp_path / "run" / "mini").iterdir()]
    assert "old" not in names and any(name.startswith("events.out") for name in names)


def test_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to wandb needs a package that is not installed: pip install wandb"):
        parse_arguments(["--report_to", "wandb"])
    with pytest.raises(ValueError, match="report_to takes tensorboard, trackio, wandb, got 'tensorbord', did you mean"):
        parse_arguments(["--report_to", "tensorbord"])


@pytest.mark.slow
def test_batch_size_is_found(tmp_path: Path) -> None:
    """Parts are halved until one fits, and the batch is the same."""
    train_here(tmp_path / "plain", "--max_steps", 6)
    trainer = Trainer(
        parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--max_steps", "6", "--find_batch_size"])
    )
    sizes = []

    def out_of_memory(module: torch.nn.Module, arguments: tuple, named: dict[str, torch.Tensor]) -> None:
        sizes.append(len(named["input_ids"]))
        if torch.is_grad_enabled() and len(named["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    trainer.run.unwrapped_model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    trainer.train()
    assert sizes[:3] == [8, 4, 2] and trainer.micro_batches == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


@pytest.mark.slow
def test_what_fits_is_tried_in_training_mode(tmp_path: Path) -> None:
    """A checkpoint is loaded in evaluation mode, without dropout and gradient checkpointing."""
    flags = "--dataset sample --max_steps 1 --train_batch_size 4 --max_eval_tokens 512 --find_batch_size".split()
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, max_position_embeddings=32)).eval()
    trainer = Trainer(parse_arguments([*flags, "--output_dir", str(tmp_path / "run")]), Hooks(model=model))
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.begin()
    assert modes == [True]
    trainer.monitor.close()
    trainer.run.run_folder.release()


@pytest.mark.slow
def test_one_sequence_that_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    trainer = Trainer(parse_arguments([*QUICK, "--output_dir", str(tmp_path / "run"), "--find_batch_size"]))

    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    trainer.run.unwrapped_model.register_forward_pre_hook(out_of_memory)
    with pytest.raises(ValueError, match="A micro-batch of 1 sequences does not fit into memory"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
# A whole model shows it with one layer; regions need two, to share.
@pytest.mark.parametrize(("flags", "layers"), [("--torch_compile", 1), ("--torch_compile --compile_regions", 2)])
def test_compiled_training_is_the_same(flags: str, layers: int, tmp_path: Path) -> None:
    settings = ["--max_steps", 6, "--sample_every", 3, "--internals_steps", 3, "--num_hidden_layers", layers]
    train_here(tmp_path / "eager", *settings)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    train_here(tmp_path / "compiled", *settings, *flags.split())
    assert counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    assert set(weights(tmp_path / "compiled")) == set(weights(tmp_path / "eager"))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_rounding(tmp_path: Path) -> None:
    train_here(tmp_path / "plain", "--max_steps", 6)
    trainer, _ = train_here(tmp_path / "checkpointed", "--max_steps", 6, "--gradient_checkpointing")
    assert trainer.run.unwrapped_model.is_activation_checkpointing
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.slow
def test_bf16_is_another_rounding(tmp_path: Path) -> None:
    # In processes of their own: accelerate knows one precision for each.
    plain = train(tmp_path, "--max_steps", 5, "--output_dir", "plain")
    bf16 = train(tmp_path, "--max_steps", 5, "--output_dir", "bf16", "--bf16")
    assert "float32" in plain.stdout and "bf16" in bf16.stdout, bf16.stderr
    assert losses(tmp_path / "bf16") != losses(tmp_path / "plain")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "plain"), abs=0.05)


def test_document_attention(tmp_path: Path) -> None:
    trainer, _ = train_here(tmp_path / "run", "--max_steps", 4, "--document_attention")
    ids = torch.randint(8, 264, (200,)).numpy().astype("uint16")
    ids[30], other = 2, ids.copy()
    model, collator = trainer.run.unwrapped_model.eval(), trainer.run.batches.collator
    ids[30] = other[30] = 2  # the second document begins at 31
    other[:30] = 50
    with torch.no_grad():
        one, two = (model(**collator.make(text, [0]).inputs).logits[0] for text in (ids, other))
        alone = model(**collator.make(ids[31:64], [0], 33).inputs).logits[0]
    torch.testing.assert_close(one[31:], two[31:], rtol=0, atol=0)
    torch.testing.assert_close(one[31:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[:30], two[:30])


@pytest.mark.slow
def test_stream_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    """Stopped between and within documents and blocks, a run over a stream ends with the same weights."""
    lines = [json.dumps({"text": f"{i} " + "the cat sat. " * (i % 40)}) for i in range(2000)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [value if value != "sample" else "data.jsonl" for value in QUICK]
    arguments += "--streaming --max_eval_tokens 3000 --save_steps 25 --eval_steps 1000 --train_batch_size 32".split()
    arguments += ["--max_position_embeddings", "32"]
    # A block of the stream is 32 steps.
    for name, stops in {"whole": [75], "parts": [25, 43, 75]}.items():
        for number, stop in enumerate(stops):
            how = ["--resume"] if number else arguments
            steps = ["--max_steps", stop, "--lr_scheduler_type", "constant", "--output_dir", name]
            result = run_program("train_accelerate.py", *how, *steps, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
    assert "on a stream of data.jsonl" in result.stdout
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dropout_start", "0.1"], "Give both of dropout_start and dropout_end"),
        (["--dropout_start", "0.1", "--dropout_end", "0", "--torch_compile"], "leave out --torch_compile"),
        (["--compile_regions"], "compile_regions is a way of torch_compile"),
        (["--ema_decay", "1"], "ema_decay must be in [0, 1)"),
        (
            ["--max_steps", "1200", "--lr_scheduler_type", "wsd", "--decay_ratio", "0.95"],
            "do not both fit into max_steps",
        ),
        (["--keep_last", "0"], "keep_last must be at least 1"),
        (["--peak_tflops", "-1"], "peak_tflops must be above 0"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
    ],
)
def test_settings_that_cannot_work(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_arguments(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_precision_that_the_device_lacks(tmp_path: Path) -> None:
    sentence = one_sentence(train(tmp_path, "--tf32", "--cache_dir", "cache"))
    assert sentence.startswith("--tf32 needs an NVIDIA GPU")
    assert not any(tmp_path.iterdir()), "before any data is looked at"


@pytest.mark.slow
def test_trackio_knows_a_resumed_run_by_its_id(tmp_path: Path) -> None:
    for flags in ([*QUICK, "--report_to", "trackio", "--max_steps", 4], ["--resume", "--max_steps", 8]):
        result = run_program(
            "train_accelerate.py", *flags, "--output_dir", "run", cwd=tmp_path, TRACKIO_DIR=str(tmp_path / "trackio")
        )
        assert result.returncode == 0, result.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "mini.db")) as database:
        rows = database.execute("select run_name, metrics from metrics order by step").fetchall()
    identity = json.loads((tmp_path / "run" / "checkpoints" / "step_8" / "trainer_state.json").read_text())[
        "tracker_id"
    ]
    assert {name for name, _ in rows} == {f"run-{identity}"}
    logged = [line["loss"] for line in map(json.loads, (line for _, line in rows)) if "loss" in line]
    assert logged == pytest.approx(losses(tmp_path / "run")) and len(logged) == 8
