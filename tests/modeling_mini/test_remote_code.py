"""
A checkpoint folder stands on its own: it loads, runs and saves itself again where nobody has heard of Mini.

The processes of these tests have transformers and torch and cannot import Mini; each has an empty cache for the code
that comes with a model.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from helpers import fork_server
from modeling_mini import MiniForCausalLM, MiniForSequenceClassification, MiniModel
from modeling_mini.remote_code import ROOT_FILES, TRAVELLING, remote_code_files
from tokenization import ByteTokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CODE = list(remote_code_files())
IDS = torch.randint(8, 264, (2, 12), generator=torch.Generator().manual_seed(2))
PROMPT = "Once upon a time"

STRANGER = """
import importlib.util, json, sys
from pathlib import Path
from unittest import mock

for name in ("modeling_mini", "configuration_mini", "tokenization"):
    assert importlib.util.find_spec(name) is None, f"{name} is importable here, so this test would prove nothing"

import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)

folder, saved, output, words = sys.argv[1:]
result = {}
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    result["refusal"] = str(error)

tokenizer = AutoTokenizer.from_pretrained(folder)
result["tokenizer"] = type(tokenizer).__name__
ids = torch.load(output + ".ids")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
result["classes"] = [type(model).__name__, type(model.config).__name__, type(model).__module__]
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
heads = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
result["classes"] += [type(base).__name__, type(heads).__name__]
with torch.no_grad():
    torch.save((model(ids).logits, base(ids).last_hidden_state), output + ".tensors")
    result["label shape"] = list(heads.eval()(ids).logits.shape)
prompt = tokenizer(words, return_tensors="pt")
result["prompt"] = prompt["input_ids"].tolist()
source = sys.modules[type(model).__module__.rpartition(".")[0] + ".fast_generation"]
with mock.patch.object(source, "decode", wraps=source.decode) as fast_path:
    result["generated"] = model.generate(**prompt, do_sample=False, max_new_tokens=8).tolist()
assert fast_path.called
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
result["pipeline"] = writer(words, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
result["eos"] = AutoConfig.from_pretrained(folder, trust_remote_code=True).eos_token_id
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
Path(output).write_text(json.dumps(result))
"""


def make_model(model_class: type = MiniForCausalLM, **fields: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = model_class(MiniConfig(**{**sizes, "max_position_embeddings": 64, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def visit(folder: Path, saved: Path, scratch: Path) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """Loads `folder` in a process without Mini, which saves it again to `saved`."""
    scratch.mkdir()
    output = scratch / "result.json"
    torch.save(IDS, f"{output}.ids")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(scratch / "hf"), "HF_MODULES_CACHE": str(scratch / "code"), "HF_HUB_OFFLINE": "1"}
    # -I: neither the current folder nor PYTHONPATH is searched.
    done = subprocess.run(
        [fork_server.python(), "-I", "-c", STRANGER, str(folder), str(saved), str(output), PROMPT],
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text()), torch.load(f"{output}.tensors")


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder written here, one that a stranger wrote from it, and one that another stranger wrote from that."""
    root = tmp_path_factory.mktemp("generations")
    folders = [root / f"generation_{i}" for i in range(3)]
    torch.manual_seed(0)
    model, tokenizer = make_model(), ByteTokenizer()
    model.save_pretrained(folders[0])
    tokenizer.save_pretrained(folders[0])
    visits = [visit(folders[i], folders[i + 1], root / f"visit_{i}") for i in range(2)]
    return {"model": model, "tokenizer": tokenizer, "folders": folders, "visits": visits}


both_visits = pytest.mark.parametrize("generation", [0, 1])


@pytest.mark.slow
@both_visits
def test_a_stranger_computes_the_same(generations: dict[str, Any], generation: int) -> None:
    model = generations["model"]
    logits, states = generations["visits"][generation][1]
    with torch.no_grad():
        assert torch.equal(logits, model(IDS).logits)
        assert torch.equal(states, model.model(IDS).last_hidden_state)


@pytest.mark.slow
@both_visits
def test_a_stranger_writes_the_same_text(generations: dict[str, Any], generation: int) -> None:
    model, tokenizer = generations["model"], generations["tokenizer"]
    result = generations["visits"][generation][0]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    assert result["prompt"] == prompt["input_ids"].tolist()
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert result["generated"] == expected.tolist()
    continuation = expected[0, prompt["input_ids"].shape[1] :]
    assert result["pipeline"] == tokenizer.decode(continuation, skip_special_tokens=True)


@pytest.mark.slow
@both_visits
def test_a_stranger_gets_the_classes_of_the_folder(generations: dict[str, Any], generation: int) -> None:
    result = generations["visits"][generation][0]
    causal, config, module, base, classifier = result["classes"]
    assert (causal, config) == ("MiniForCausalLM", "MiniConfig")
    assert module.startswith("transformers_modules.")
    assert (base, classifier) == ("MiniModel", "MiniForSequenceClassification")
    assert result["label shape"] == [2, 3]
    assert result["eos"] == 2


@pytest.mark.slow
@both_visits
def test_without_the_flag_a_stranger_is_told_of_it(generations: dict[str, Any], generation: int) -> None:
    assert "trust_remote_code=True" in generations["visits"][generation][0]["refusal"]


@pytest.mark.slow
def test_the_code_is_the_same_in_every_generation(generations: dict[str, Any]) -> None:
    first, *later = generations["folders"]
    for folder in later:
        assert {path.name for path in folder.iterdir()} == {path.name for path in first.iterdir()}
        for name in CODE:
            assert (folder / name).read_bytes() == (first / name).read_bytes(), name
        # All else is as it was, too, down to the weights.
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
            assert (folder / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.slow
def test_what_a_folder_holds(generations: dict[str, Any]) -> None:
    first = generations["folders"][0]
    names = {path.name for path in first.iterdir()}
    assert {*CODE, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    auto_map = json.loads((first / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(auto_map)
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (first / f"{module}.py").read_text()
    # The files import installed libraries and each other, and nothing of the repository.
    installed = {"huggingface_hub", "safetensors", "torch", "transformers"} | sys.stdlib_module_names
    for name in CODE:
        for node in ast.walk(ast.parse((first / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= installed
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in names
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in installed


@pytest.mark.slow
def test_with_mini_imported_no_flag_is_needed(generations: dict[str, Any]) -> None:
    for folder in generations["folders"]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model) is MiniForCausalLM
        assert type(AutoModel.from_pretrained(folder)) is MiniModel
        assert type(AutoConfig.from_pretrained(folder)) is MiniConfig
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, generations["model"](IDS).logits)


def test_every_class_carries_the_code(tmp_path: Path) -> None:
    for model_class in (MiniModel, MiniForSequenceClassification):
        make_model(model_class).save_pretrained(tmp_path / model_class.__name__)
        assert all((tmp_path / model_class.__name__ / name).exists() for name in CODE)


def test_an_old_copy_of_the_code_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "modeling_mini.py").write_text("raise RuntimeError('old')\n")
    make_model().save_pretrained(tmp_path)
    assert "class MiniForCausalLM(" in (tmp_path / "modeling_mini.py").read_text()


def test_only_the_main_process_writes_code(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, is_main_process=False)
    assert not any((tmp_path / name).exists() for name in CODE)


def test_saving_with_a_push_hands_the_words_for_the_hub_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(MiniForCausalLM, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    words = {"commit_message": "m", "private": True, "revision": "r", "create_pr": True, "tags": ["t"]}
    make_model().save_pretrained(tmp_path / "name", push_to_hub=True, token="hf_x", **words)
    make_model().save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="user/other")
    assert pushed == [(("name",), {"token": "hf_x", **words}), (("user/other",), {"token": None})]


@pytest.mark.slow
def test_the_flat_copy_differs_in_its_imports_alone(generations: dict[str, Any]) -> None:
    root = Path(__file__).parents[2]
    sources = [root / name if name in ROOT_FILES else root / "modeling_mini" / name for name in CODE]
    for source in sources:
        original = source.read_text().splitlines()
        copy = (generations["folders"][0] / source.name).read_text().splitlines()
        changed = [pair for pair in zip(original, copy, strict=True) if pair[0] != pair[1]]
        assert all(old == new.replace("from .", "from ") for old, new in changed)
        assert len(changed) == sum(
            line.startswith(("from configuration_mini ", "from shape_mini ")) for line in original
        )


SWAPPED = """
import torch
from modeling_mini import MiniForCausalLM


class LouderForCausalLM(MiniForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs
"""


@pytest.fixture
def louder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A subclass in a file of its own, as in somebody's experiment."""
    path = tmp_path / "louder_mini.py"
    path.write_text(SWAPPED)
    spec = importlib.util.spec_from_file_location("louder_mini", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "louder_mini", module)
    spec.loader.exec_module(module)
    return module.LouderForCausalLM


def test_a_subclass_is_not_saved_as_if_it_were_mini(louder: type, tmp_path: Path) -> None:
    make_model(louder).save_pretrained(tmp_path / "fresh")
    make_model().save_pretrained(tmp_path / "plain")
    louder.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "from a checkpoint")
    for name in ("fresh", "from a checkpoint"):
        folder = tmp_path / name
        assert not any((folder / code).exists() for code in CODE)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LouderForCausalLM"]
        # A map to files that are not there would break the folder.
        assert "auto_map" not in config


@pytest.fixture
def own_code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code of checkpoints is copied to a folder of this test. Later tests import theirs from the usual place again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.mark.usefixtures("own_code_cache")
def test_a_registered_subclass_carries_its_own_file(louder: type, tmp_path: Path) -> None:
    louder.register_for_auto_class("AutoModelForCausalLM")
    make_model().save_pretrained(tmp_path / "plain")
    for name, model in (("fresh", make_model(louder)), ("loaded", louder.from_pretrained(tmp_path / "plain").eval())):
        folder = tmp_path / name
        model.save_pretrained(folder)
        assert (folder / "louder_mini.py").read_text() == SWAPPED
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == {"AutoModelForCausalLM": "louder_mini.LouderForCausalLM"}
        # By its reference: for the Auto classes, Mini's own registration goes before the folder's.
        carried = get_class_from_dynamic_module("louder_mini.LouderForCausalLM", folder)
        loaded = carried.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_all_at_the_top_of_the_package_travels_but_what_registers_it() -> None:
    """The rule of the folder: what a checkpoint does not need lies in a folder of its own, or is a thin alias."""
    stays = {"__init__.py", "peft_defaults.py", "demo.py", "quantize.py"}
    top = {path.name for path in (Path(__file__).parents[2] / "modeling_mini").glob("*.py")}
    assert top - stays == set(TRAVELLING)
