"""The trained model that comes with Mini: what it is, and how it is found where nobody has trained anything."""

import json
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import files_mini
import pytest
import torch
from cards_mini import read_card, render
from files_mini import BOX, display_name, find_checkpoint
from generation_mini.arguments import GenerationArguments
from generation_mini.program import model_to_load
from helpers.programs import run_program
from modeling_mini.loading.checkpoints import is_chat_model, load_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharing_mini.staging import find_source, stage
from training_mini.arguments import parse_arguments
from training_mini.data.sources import BUILT_IN
from training_mini.sampling import share_of_valid_functions
from transformers import PreTrainedTokenizerBase

import box_mini
from box_mini.__main__ import LARGEST_BOX, main

QUESTION = "What does os.path.join do?"


def test_it_writes_where_nobody_has_trained(tmp_path: Path) -> None:
    prompt = "def read_lines(path):"
    result = run_program("generate.py", "--prompt", prompt, "--seed", 1, "--max_new_tokens", 30, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(f"{prompt}\n") and len(result.stdout) > len(prompt) + 20
    assert "There is no run under runs/, so the model that comes with Mini writes" in result.stderr
    assert result.stderr.count("\n") <= 2


@pytest.mark.slow
def test_a_space_at_the_end_of_a_prompt_is_better_left_out(tmp_path: Path) -> None:
    said = {}
    for prompt in ("def ", "def"):
        result = run_program("generate.py", "--prompt", prompt, "--seed", 1, "--max_new_tokens", 5, cwd=tmp_path)
        said[prompt] = "The prompt ends in a space" in result.stderr
    assert said == {"def ": True, "def": False}
    assert read_card(BOX["box"] / "README.md").facts.prompts[0] == "def"


@pytest.mark.slow
def test_most_of_its_functions_are_valid_python() -> None:
    model, tokenizer = load_model("box", device="cpu")
    model.compile_decoding()
    assert share_of_valid_functions(model, tokenizer, max_seconds=300) > 0.55  # 0.68 with this seed


def source(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens of Python source, as many as the context holds."""
    return tokenizer(Path(textwrap.__file__).read_text(encoding="utf-8")[3000:5000], return_tensors="pt").input_ids[
        :, :250
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("8bit", 0.02), ("4bit", 0.2)])
def test_rounded_weights_predict_almost_as_well(kind: str, most: float) -> None:
    """Trained weights have outliers, which random ones have not."""
    bits = []
    for quantization in (None, kind):
        model, tokenizer = load_model("box", device="cpu", quantization=quantization)
        ids = source(tokenizer)
        with torch.no_grad():
            bits.append(model(ids, labels=ids).loss.item() / math.log(2))
    assert 3 < bits[0] < 5, "bits per token"
    assert bits[0] - 0.01 < bits[1] < bits[0] + most and bits[1] != bits[0]


@pytest.mark.slow
def test_fast_decoding_writes_what_the_loop_writes() -> None:
    """Of a trained model the likeliest tokens are often close to each other, and a text repeats itself."""
    model, tokenizer = load_model("box", device="cpu")
    prompt = source(tokenizer)[:, :40]
    fast, loop = (
        model.generate(prompt, max_new_tokens=120, do_sample=False, fast_decoding=fast) for fast in (True, False)
    )
    assert fast.tolist() == loop.tolist() and len(set(fast[0, 40:].tolist())) > 10


@pytest.mark.slow
def test_the_newest_run_stays_the_default(
    quick_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(quick_run.parent.parent)
    assert model_to_load(GenerationArguments()) is None
    assert find_checkpoint(None) == "runs/tiny-sample/best"
    assert find_checkpoint("box") == str(BOX["box"])
    assert model_to_load(GenerationArguments(model="box")) == "box"
    assert capsys.readouterr().err == ""


def test_a_conversation_takes_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_to_load(GenerationArguments(interactive=True)) == "box-chat"
    assert "There is no run under runs/" in capsys.readouterr().err
    model, tokenizer = load_model("box-chat")
    assert is_chat_model(model, tokenizer)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"]])
    output = model.generate(ids, do_sample=False, max_new_tokens=100)
    assert output[0, -1] == tokenizer.convert_tokens_to_ids("<|end|>")  # it comes to an end
    monkeypatch.setitem(files_mini.BOX, "box-chat", tmp_path / "none")
    assert model_to_load(GenerationArguments(model="box", interactive=True)) == "box"


def test_a_stripped_installation_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(BOX):
        monkeypatch.setitem(files_mini.BOX, name, tmp_path / name)
        with pytest.raises(ValueError, match=f"This installation of Mini has no '{name}'"):
            find_checkpoint(name)
    with pytest.raises(ValueError, match="There is no trained model under runs/"):
        find_checkpoint(None)


def test_what_is_in_it() -> None:
    weights = [file for folder in BOX.values() for file in folder.glob("*.safetensors")]
    assert len(weights) == len(BOX)
    assert sum(file.stat().st_size for file in weights) <= LARGEST_BOX
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118  (no dictionary)
    assert not [file for folder in BOX.values() for file in folder.rglob("*.py")]
    model, tokenizer = load_model("box")
    assert model.dtype == torch.float32 and not is_chat_model(model, tokenizer)
    card = read_card(BOX["box"] / "README.md")
    assert card.metadata["model-index"][0]["results"][0]["metrics"][0]["value"] < 1.05
    assert "| transformers | 5." in card.text and "box_mini/1_packages.yaml" in card.text
    assert json.loads((BOX["box-chat"] / "adapter_config.json").read_text())["base_model_name_or_path"] == "box"
    chat = read_card(BOX["box-chat"] / "README.md")
    assert chat.facts.is_chat and "mini-generate --model box --interactive" in chat.sections["How to use"]
    assert [display_name(str(folder)) for folder in BOX.values()] == list(BOX)


def test_it_is_shared_like_any_other(tmp_path: Path) -> None:
    staged = stage(find_source("box"), tmp_path)
    assert staged.kind == "model"
    assert {"model.safetensors", "modeling_mini.py", "tokenizer.json", "README.md"} <= set(staged.files)


@pytest.mark.slow
def test_it_is_pushed_by_its_name(tmp_path: Path) -> None:
    result = run_program("push_to_hub.py", "box", "user/name", "--license", "apache-2.0", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "modeling_mini.py" in result.stdout and "A dry run: nothing was sent" in result.stdout


@pytest.mark.slow
def test_it_is_made_of_a_run(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files_mini.BOX, "box", tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["box_mini", "--model", str(quick_run)])
    main()
    model, _ = load_model(str(tmp_path / "model"))
    original, _ = load_model(str(quick_run))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, original.state_dict()[name].bfloat16().float()), name
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())

    # Of the adapter too, which may be trained on any base: it is for the box.
    run = tmp_path / "run"
    shutil.copytree(BOX["box-chat"], run)
    card = read_card(run / "README.md")
    (run / "README.md").write_text(render(card.facts, card.metadata, {}))  # as the trainer writes it
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere"}))
    monkeypatch.setitem(files_mini.BOX, "box-chat", tmp_path / "chat")
    monkeypatch.setattr(sys, "argv", ["box_mini", "--chat", str(run)])
    main()
    written = json.loads((tmp_path / "chat" / "adapter_config.json").read_text())
    assert written == {**config, "base_model_name_or_path": "box"}
    assert not list((tmp_path / "chat").glob("tokenizer*")), "its tokenizer is that of the model"
    before, after = (read_card(folder / "README.md").sections["How to use"] for folder in (run, tmp_path / "chat"))
    assert "AutoPeftModelForCausalLM" in before and after == card.sections["How to use"]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "chat")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    monkeypatch.setattr(sys, "argv", ["box_mini"])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_the_marks_of_turns_are_those_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BOX["box"], tmp_path / "model")
    shutil.copytree(BOX["box-chat"], tmp_path / "run")
    before = load_file(tmp_path / "model" / "model.safetensors")
    learned = {"base_model.model.model.embed_tokens.weight": torch.randn(2048, 256)}
    save_file(learned, tmp_path / "run" / "adapter_model.safetensors")
    monkeypatch.setitem(files_mini.BOX, "box", tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["box_mini", "--marks", str(tmp_path / "run")])
    main()
    after = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][:8].float(), learned[f"base_model.model.{name}"][:8].bfloat16().float())
    after[name][:8] = before[name][:8]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("path", sorted(Path(box_mini.__file__).parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_its_settings_are_those_of_a_run(path: Path) -> None:
    flags = ["--model", "box"] if "--model" in path.read_text() else []
    arguments = parse_arguments(["--config", str(path), *flags])
    assert arguments.data.dataset in BUILT_IN
    assert arguments.optimization.max_steps == int(re.search(r"max_steps: (\d+)", path.read_text())[1])
