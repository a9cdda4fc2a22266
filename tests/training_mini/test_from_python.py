"""Training from Python, as a person types it."""

import copy
import importlib.util
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import train_accelerate
from helpers.runs import losses
from modeling_mini import MiniConfig, MiniForCausalLM
from rich.console import Console
from training_mini import TrainingResult, TrainingSettings, from_python, kernels, monitoring, train
from training_mini.arguments import SHAPE
from training_mini.cpu_kernels import PRODUCTS, linear_layers, shape_of
from transformers import TrainerCallback

SMALL: dict[str, Any] = {
    "dataset": "sample", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "train_batch_size": 8, "warmup_steps": 2,
    "logging_steps": 1, "max_eval_tokens": 2048, "max_steps": 6, "eval_steps": 3,
}  # fmt: skip


def settings(folder: Path, **changes: Any) -> TrainingSettings:
    return TrainingSettings(**{**SMALL, "output_dir": str(folder), **changes})


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Callable[[Any], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(settings(tmp_path_factory.mktemp("python") / "run"))


@pytest.mark.slow
def test_the_result_has_what_one_goes_on_with(result: TrainingResult) -> None:
    prompt = result.tokenizer("the ", return_tensors="pt").to(result.model.device)
    output = result.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert output.shape[1] == prompt.input_ids.shape[1] + 4 and not result.model.training
    assert isinstance(result.metrics, pandas.DataFrame)
    assert result.metrics["loss"].dropna().tolist() == losses(result.folder)
    assert result.bits_per_byte == pytest.approx(result.metrics["eval_bits_per_byte"].min())
    assert result.loss == pytest.approx(result.metrics["eval_loss"].min())
    assert result.best == result.folder / "best" and (result.final / "model.safetensors").is_file()
    assert len(result.samples) == 1
    line = rf"TrainingResult\('.*run', 6 steps in [\d.]+ s, {result.bits_per_byte:.3f} bits per byte at step 6\)"
    assert re.fullmatch(line, repr(result))


@pytest.mark.slow
def test_the_curves_are_a_picture_in_a_notebook(result: TrainingResult) -> None:
    assert result.curves._repr_png_() == (result.folder / "curves.png").read_bytes()


@pytest.mark.slow
def test_metrics_are_records_where_there_is_no_pandas(result: TrainingResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [line["loss"] for line in result.metrics if "loss" in line] == losses(result.folder)


@pytest.mark.slow
def test_it_prints_nothing_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings(tmp_path / "run"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_it_shows_a_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (monitoring, from_python):
        monkeypatch.setattr(module, "console", Console(force_terminal=True, width=120))
    train(settings(tmp_path / "run"))
    assert "6/6" in capsys.readouterr().out
    train(settings(tmp_path / "silent"), progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_second_run_in_the_process_is_one_of_its_own(result: TrainingResult, tmp_path: Path) -> None:
    """Also one in another precision, which accelerate refuses of itself."""
    train(settings(tmp_path / "other", bf16=True, seed=1, max_steps=3))
    again = train(settings(tmp_path / "again"))
    assert losses(again.folder) == losses(result.folder)


@pytest.mark.slow
def test_an_object_of_ones_own_is_plain_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2, max_position_embeddings=64))
    small = {name: value for name, value in SMALL.items() if name not in SHAPE} | {"max_steps": 3}
    products = {shape_of(layer): list(PRODUCTS) for layer in linear_layers(model)}

    def learn(name: str, model: MiniForCausalLM, choice: tuple[Any, ...], **changes: Any) -> list[float]:
        monkeypatch.setattr(kernels, "measured_choice", lambda run, sequences: choice)
        train(TrainingSettings(**small, output_dir=str(tmp_path / name), **changes), model=model)
        return losses(tmp_path / name)

    plain = {}, False, "fused", False
    learn("onednn", model, (products, False, "fused", False))
    learn("by accelerate", model, plain, bf16=True)  # oneDNN's operator would refuse bfloat16
    learn("chosen", model, ({}, True, "blocks", False))
    assert not any("forward" in vars(module) or module._compiled_call_impl for module in model.modules())
    assert learn("copy", copy.deepcopy(model), plain) == learn("again", model, plain)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(result: TrainingResult, tmp_path: Path) -> None:
    interrupt = At(2, lambda control: os.kill(os.getpid(), signal.SIGINT))
    stopped = train(settings(tmp_path / "run"), callbacks=[interrupt])
    assert stopped.stopped_by == signal.SIGINT and stopped.loss is None
    assert repr(stopped).endswith("stopped by SIGINT: resume=True goes on)")
    resumed = train(TrainingSettings(resume=True, output_dir=str(tmp_path / "run")))
    assert losses(tmp_path / "run") == losses(result.folder)
    assert "6 steps, the last 4 in " in repr(resumed)
    report = train_accelerate.report(resumed, resumed.run.arguments)
    assert "\nTrained 6 steps, the last 4 in 0:" in report
    again = train(TrainingSettings(resume=True, output_dir=str(tmp_path / "run"), max_steps=5))
    report = train_accelerate.report(again, again.run.arguments)
    assert "\nTrained 6 steps before, and none now: max_steps is 5.\n" in report


@pytest.mark.slow
def test_a_run_that_cannot_begin_lets_its_folder_go(tmp_path: Path) -> None:
    class Wrong(TrainerCallback):
        def __init__(self) -> None:
            raise ValueError("this callback is wrong")

    # A notebook keeps the last error, and with it the objects of the run.
    with pytest.raises(ValueError, match="this callback is wrong") as kept:
        train(settings(tmp_path / "run"), callbacks=[Wrong])
    assert kept.value is not None and not (tmp_path / "run").exists()
    assert train(settings(tmp_path / "run", max_steps=3)).start_step == 0


def test_wrong_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        train(settings(tmp_path / "run", dataset=str(tmp_path / "missing.txt")))
    with pytest.raises(ValueError, match=r"^train takes TrainingSettings, got dict"):
        train({"max_steps": 3})
    with pytest.raises(ValueError, match="max_position_embeddings must be at least 2"):
        train(settings(tmp_path / "run", max_position_embeddings=1))
    assert not (tmp_path / "run").exists()


def test_errors_name_keywords_and_not_flags(result: TrainingResult, tmp_path: Path) -> None:
    sentence = "go on with it by resume=True, replace it by overwrite=True, or choose another output_dir."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(settings(result.folder))
    with pytest.raises(ValueError, match=r"^Argument max_steps: invalid int value: 'ten'\.$"):
        train(settings(tmp_path / "run", max_steps="ten"))
    sentence = r"^-1 --none, bf16=False and lora_r 8 true, a-- and save_steps\.$"
    with pytest.raises(ValueError, match=sentence), from_python.words_of_python():
        raise ValueError("-1 --none, --bf16 false and --lora_r 8 true, a-- and --save_steps.")


@pytest.mark.slow
def test_a_metric_of_ones_own_is_in_the_log_the_table_and_the_curves(tmp_path: Path) -> None:
    def largest_weight(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
        assert not model.training and not torch.is_grad_enabled()
        return max(parameter.abs().max() for parameter in model.parameters())

    result = train(settings(tmp_path / "run"), metrics={"largest_weight": largest_weight})
    values = result.metrics["eval_largest_weight"].dropna().tolist()
    assert len(values) == 2 and all(value > 0 for value in values)
    assert "largest_weight" in [axes.get_ylabel() for axes in result.curves.axes]
    with pytest.raises(ZeroDivisionError):
        train(settings(tmp_path / "wrong"), metrics={"wrong": lambda model, tokenizer: 1 / 0})
