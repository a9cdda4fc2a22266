"""A model class of one's own: it trains, saves, loads, resumes and generates, also where nobody knows it."""

import importlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import fork_server
from helpers.modules import importable
from helpers.programs import one_sentence, run_program
from helpers.runs import QUICK, losses
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.loading.checkpoints import load_checkpoint
from training_mini import TrainingSettings, train
from training_mini.arguments import parse_arguments
from training_mini.hooks import Hooks
from training_mini.own_model import StaysHomeError, code_of, config_class_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

CODE = """
import math
from torch import nn
from configuration_mini import MiniConfig
from modeling_mini import MiniForCausalLM

class SquareConfig(MiniConfig):
    model_type = "square_mini"

class SquareMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(self.up_proj(hidden_states).relu() ** 2)

class SquareForCausalLM(MiniForCausalLM):
    config_class = SquareConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SquareMLP(config)
        self.post_init()
"""
SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
RUN: dict[str, Any] = {
    "dataset": "sample", "train_batch_size": 8, "warmup_steps": 2, "logging_steps": 1, "max_eval_tokens": 2048,
    "max_steps": 4, "eval_steps": 2, "save_steps": 2,
}  # fmt: skip
FLAGS = "--max_steps 4 --eval_steps 2 --save_steps 2 --model_class square_mini:SquareForCausalLM".split()
STRANGER = """
import importlib.util, sys
assert importlib.util.find_spec("modeling_mini") is None and importlib.util.find_spec("square_mini") is None
import torch
from transformers import AutoModelForCausalLM
folder, saved = sys.argv[1:]
for place in (folder, saved):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    with torch.no_grad():
        print(type(model).__name__, model(torch.arange(8, 20)[None]).logits.double().sum().item())
    model.save_pretrained(saved)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module of the class, as somebody has it who experiments."""
    path = tmp_path_factory.mktemp("experiment")
    (path / "square_mini.py").write_text(CODE)
    return path


@pytest.fixture(scope="module")
def module(folder: Path) -> Iterator[ModuleType]:
    with importable(folder):
        yield importlib.import_module("square_mini")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """What the command makes of it."""
    result = run_program("train_accelerate.py", *QUICK, *FLAGS, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "--trust_remote_code" in result.stdout
    return folder / "runs" / "SquareForCausalLM-tiny-sample"


@pytest.mark.slow
def test_the_command_generates_with_it_and_goes_on_with_it(run: Path, folder: Path) -> None:
    result = run_program("generate.py", "--prompt", "The ", "--trust_remote_code", "--seed", 1, cwd=folder)
    assert result.returncode == 0 and result.stdout.startswith("The "), result.stderr
    assert "trust_remote_code" in one_sentence(run_program("generate.py", "--prompt", "The ", cwd=folder))
    on = run_program("train_accelerate.py", "--resume", "--max_steps", 6, "--output_dir", run, cwd=folder)
    assert on.returncode == 0 and len(losses(run)) == 6, on.stderr


@pytest.mark.slow
def test_a_stranger_computes_the_same(run: Path, folder: Path, module: ModuleType, tmp_path: Path) -> None:
    model = module.SquareForCausalLM.from_pretrained(run / "final").eval()
    with torch.no_grad():
        expected = model(torch.arange(8, 20)[None]).logits.double().sum().item()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    command = [fork_server.python(), "-I", "-c", STRANGER, str(run / "final"), str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.split()[0] == "SquareForCausalLM" and float(line.split()[1]) == pytest.approx(expected, abs=1e-3)
    card = (run / "final" / "README.md").read_text()
    assert "| class | `square_mini.SquareForCausalLM` |" in card and "import modeling_mini" not in card


@pytest.mark.slow
def test_from_python_by_class_by_object_and_by_name_it_is_the_same(module: ModuleType, tmp_path: Path) -> None:
    settings = {**RUN, **SHAPE}
    by_class = train(TrainingSettings(**settings, output_dir=str(tmp_path / "class")), model=module.SquareForCausalLM)
    by_name = train(
        TrainingSettings(**settings, output_dir=str(tmp_path / "name"), model_class="square_mini:SquareForCausalLM")
    )
    assert losses(by_class.folder) == losses(by_name.folder)
    assert type(by_class.model) is module.SquareForCausalLM
    model = module.SquareForCausalLM(module.SquareConfig.preset("tiny", **SHAPE, norm_type="rmsnorm", qk_norm=True))
    before = model.lm_head.weight.detach().clone()
    by_object = train(TrainingSettings(**RUN, output_dir=str(tmp_path / "object")), model=model)
    assert not torch.equal(before, model.lm_head.weight.to("cpu")), "it learns in place"
    # The settings of the run describe it, so that the command can go on with it.
    arguments = parse_arguments(["--resume", "--output_dir", str(by_object.folder), "--max_steps", "6"])
    assert arguments.model.model_class == "square_mini:SquareForCausalLM" and arguments.model.hidden_size == 64
    resumed = train(TrainingSettings(resume=True, output_dir=str(by_object.folder), max_steps=6))
    assert len(losses(resumed.folder)) == 6


@pytest.mark.slow
def test_a_model_of_transformers_is_one_of_its_own_kind(tmp_path: Path) -> None:
    settings = TrainingSettings(**RUN, **SHAPE, output_dir=str(tmp_path / "run"))
    result = train(settings, model=LlamaForCausalLM)
    assert type(result.model) is LlamaForCausalLM and result.model.config.hidden_size == 64
    assert "auto_map" not in json.loads((result.best / "config.json").read_text())
    assert not list(result.best.glob("*.py"))
    wrong = TrainingSettings(**RUN, embedding_dropout=0.1, output_dir=str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match=r"^LlamaConfig has no field 'embedding_dropout'"):
        train(wrong, model=LlamaForCausalLM)


@pytest.mark.slow
def test_a_trained_mini_learns_on(tmp_path: Path) -> None:
    first = train(TrainingSettings(**RUN, **SHAPE, output_dir=str(tmp_path / "first")))
    on = train(TrainingSettings(**RUN, output_dir=str(tmp_path / "on")), model=first.model)
    assert losses(on.folder)[0] < losses(first.folder)[0]
    assert type(on.model) is MiniForCausalLM and (on.best / "modeling_mini.py").is_file()


@pytest.mark.slow
def test_code_that_cannot_travel_is_said(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class HereConfig(MiniConfig):
        model_type = "here_mini"

    class HereForCausalLM(MiniForCausalLM):
        config_class = HereConfig

    for class_ in (HereConfig, HereForCausalLM):
        monkeypatch.setattr(class_, "__module__", "__main__")  # as in a notebook
    with pytest.warns(UserWarning, match=r"^The code of __main__\.HereForCausalLM does not go into the checkpoints"):
        result = train(TrainingSettings(**RUN, **SHAPE, output_dir=str(tmp_path / "run")), model=HereForCausalLM)
    assert "must be imported" in (result.best / "README.md").read_text()
    assert type(result.model) is HereForCausalLM, "in this process it is known"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import modeling_mini", "its module imports modeling_mini, which is no installed library"),
        ("from tokenization import ByteTokenizer", "its module imports tokenization"),
        ("from .others import Norm", "its module imports .others"),
        ("import neighbour_of_mine", "its module imports neighbour_of_mine"),
    ],
)
def test_what_a_module_imports_decides_whether_it_travels(
    line: str, reason: str, folder: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "other_mini.py"
    path.write_text(f"{CODE}\ndef later():\n    {line}\n")
    monkeypatch.setattr(module, "__file__", str(path))
    with pytest.raises(StaysHomeError, match=f"^{reason}"):
        code_of.__wrapped__(module.SquareForCausalLM)


def test_the_code_that_travels_imports_what_travels(module: ModuleType) -> None:
    files = code_of(module.SquareForCausalLM)
    assert "from .configuration_mini import MiniConfig" in files["square_mini.py"]
    assert "from .modeling_mini import MiniForCausalLM" in files["square_mini.py"]
    assert {"configuration_mini.py", "modeling_mini.py", "shape_mini.py"} <= set(files)


class SameTypeForCausalLM(MiniForCausalLM):
    """Without a configuration of its own."""


class OtherConfig(MiniConfig):
    """Without a model_type of its own."""


class OtherForCausalLM(MiniForCausalLM):
    config_class = OtherConfig


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            SameTypeForCausalLM,
            "SameTypeForCausalLM would be loaded as another class: MiniConfig with model_type 'mini'",
        ),
        (OtherForCausalLM, "OtherForCausalLM would be loaded as another class: OtherConfig with model_type 'mini'"),
        (torch.nn.Linear, "The model must be a causal language model of transformers, got Linear"),
        (PreTrainedModel, "The model must be a causal language model of transformers, got PreTrainedModel"),
        ("square", "model_class must have the form package.module:NAME, got 'square'"),
        ("no_such_module:A", "model_class 'no_such_module:A' cannot be imported: No module named 'no_such_module'"),
        (
            "transformers:LlamaForCausalML",
            "the module 'transformers' has no 'LlamaForCausalML', did you mean 'LlamaFor",
        ),
    ],
    ids=str,
)
def test_what_is_no_model_is_one_sentence(model: Any, sentence: str) -> None:
    named = isinstance(model, str)
    arguments = parse_arguments([*QUICK, *(["--model_class", model] if named else [])])
    with pytest.raises(ValueError, match=sentence):
        config_class_of(arguments, Hooks() if named else Hooks(model=model))


def test_settings_beside_a_model_are_refused(tmp_path: Path) -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", **SHAPE))
    with pytest.raises(ValueError, match=r"^train\(model=...\) stands in the place of size and hidden_size"):
        train(TrainingSettings(size="small", hidden_size=64, output_dir=str(tmp_path)), model=model)
    small = MiniForCausalLM(MiniConfig.preset("tiny", **SHAPE, vocab_size=100))
    with pytest.raises(ValueError, match=r"^The model has a vocabulary of 100 tokens, and the tokenizer 264"):
        train(TrainingSettings(**RUN, output_dir=str(tmp_path / "run")), model=small)


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_class_is_where_to_start_from(run: Path, module: ModuleType, tmp_path: Path) -> None:
    name = "square_mini:SquareForCausalLM"
    settings = TrainingSettings(**RUN, model=str(run), model_class=name, output_dir=str(tmp_path / "on"))
    assert type(train(settings).model) is module.SquareForCausalLM
    assert type(load_checkpoint(str(run / "best"))[0]) is module.SquareForCausalLM, "known from here on"
    assert type(AutoModelForCausalLM.from_pretrained(run / "best")) is module.SquareForCausalLM
