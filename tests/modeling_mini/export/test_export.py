"""The frame of the formats: the command, the card, and what is refused before anything is written."""

import dataclasses
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from cards_mini import CARD, PLACEHOLDER, Facts, read_card, render
from entry_points_mini import Settings, option
from helpers.exports import random_model, same_parameters, write_adapter
from huggingface_hub import ModelCard
from modeling_mini.export import FORMATS, ExportCard, __main__, export, module_of, quantized
from modeling_mini.export.card import card_of_weights
from modeling_mini.export.formats import Format
from modeling_mini.loading.checkpoints import load_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenization import ByteTokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "folder" / "native"
    __main__.run(["native", str(checkpoint), str(out)])
    assert f"{out / 'model.safetensors'} (" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"There is something in .*native' already: name another folder, or --overwrite"
    ):
        __main__.run(["native", str(checkpoint), str(out)])
    (out / "old").write_text("")
    __main__.run(["native", str(checkpoint), str(out), "--overwrite"])
    assert not (out / "old").exists()
    assert [path.name for path in out.parent.iterdir()] == ["native"]


def test_help(capsys: pytest.CaptureFixture) -> None:
    __main__.run([])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in FORMATS)
    with pytest.raises(SystemExit):
        __main__.run(["gguf", "--help"])
    shown = capsys.readouterr().out
    assert "--types" in shown and "--overwrite" in shown


def test_a_format_is_a_module_and_an_entry_in_one_list(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A made-up format has its flags, its help and its card."""

    @dataclass
    class Options(Settings):
        shouted: bool = option(False, "write in capital letters")

    def export_names(model: PreTrainedModel, tokenizer: object, out: Path, shouted: bool) -> ExportCard:
        names = "\n".join(name for name, _ in model.named_parameters())
        (out / "names.txt").write_text(names.upper() if shouted else names)
        return ExportCard(title="Names of weights", usage="Read `names.txt`.", exactness="All names are there.")

    module = SimpleNamespace(export_names=export_names)
    monkeypatch.setitem(sys.modules, "modeling_mini.export.names", module)
    monkeypatch.setitem(FORMATS, "names", Format("as a list of names", Options))
    __main__.run([])
    assert "names    as a list of names" in capsys.readouterr().out
    __main__.run(["names", str(checkpoint), str(tmp_path / "out"), "--shouted"])
    assert "MODEL.NORM.WEIGHT" in (tmp_path / "out" / "names.txt").read_text()
    card = read_card(tmp_path / "out" / "README.md")
    assert card.facts.kind == "names" and "Read `names.txt`." in card.sections["How to use"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gguff", "a", "b"], "There is no format 'gguff'; .* did you mean 'gguf'"),
        (["native"], "The checkpoint and the folder to write come first"),
        (["native", "--overwrite", "a", "b"], "The checkpoint and the folder to write come first"),
        (["native", "nowhere", "b"], "There is no run or checkpoint folder 'nowhere'"),
        (["gguf", "a", "b", "--types", "Q4"], "types must be among F32, F16, Q8_0, got 'Q4'"),
        (["native", "a", "b", "--typs", "F32"], "There is no flag '--typs'"),
    ],
)
def test_wrong_commands(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        __main__.run(arguments)
    assert not list(tmp_path.iterdir())


def test_options_and_targets(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The format gguf has no option 'type', did you mean 'types'\?"):
        export("gguf", checkpoint, tmp_path / "out", type=["F32"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="OUT must be a folder"):
        export("native", checkpoint, tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="would be lost: name another folder"):
        export("native", checkpoint, checkpoint, overwrite=True)


@pytest.mark.parametrize("name", FORMATS)
def test_flags_are_what_the_module_takes(name: str) -> None:
    _, _, _, *taken = inspect.signature(getattr(module_of(name), f"export_{name}")).parameters
    assert taken == [field.name for field in dataclasses.fields(FORMATS[name].options)]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "modeling_mini.export.gguf", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="The format gguf needs the package gguf: pip install gguf"):
        module_of("gguf")


def test_the_card_keeps_what_is_true_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "README.md").write_text(
        "---\nlicense: mit\nlibrary_name: transformers\ntags: [mini, other]\nmini:\n  step: 5\n  dataset: books\n"
        "  settings: {train_batch_size: 8, learning_rate: 0.01, seed: 1}\n---\n"
        f"{PLACEHOLDER}\n\n| training | 7 steps |\n\n## Training\n\n| training | 6 steps |\n\n## Notes\n\nBaa.\n"
    )
    card = ModelCard.load(export("gguf", checkpoint, tmp_path / "out", types=["F32"]) / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "llama.cpp"
    assert card.data.tags == ["mini", "gguf", "stablelm"]
    assert "| training | 5 steps of 8 x 64 tokens, AdamW, peak learning rate 0.01, seed 1 |" in card.text
    assert "7 steps" not in card.text and "6 steps" not in card.text, "a fact is never read from Markdown"
    assert "trained on `books`" in card.text and "## Notes\n\nBaa." in card.text
    assert "checkpoint-F32.gguf" in card.text


def test_the_card_of_a_model_on_the_hub_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can be read; nobody here can set it right."""
    path = tmp_path / CARD
    monkeypatch.setattr("modeling_mini.web.cached_file", lambda name, file, **_: path if file == CARD else None)
    model = random_model()
    for text, license in {"---\nlicense: mit\n---\n": "mit", "---\nmini: 5\n---\n": None}.items():
        path.write_text(text)
        assert card_of_weights("user/name", model).metadata.get("license") == license


def test_words_of_a_person_go_along(checkpoint: Path, tmp_path: Path) -> None:
    """Also of a card that a person wrote as a whole, where the export says other things under the same heading."""
    (checkpoint / "README.md").write_text("# Sheep\n\nI made this.\n\n## How to use\n\nAsk me.\n")
    for _ in range(2):  # an export of an export, too
        out = export("mini", export("native", checkpoint, tmp_path / "native"), tmp_path / "out")
        text = (out / "README.md").read_text()
        assert "## The model\n\nI made this." in text and "## How to use (the model)\n\nAsk me." in text
        assert text.count("\n## How to use\n") == 1 == text.count("# Mini, ") and "trust_remote_code=True" in text
        assert text.count("## Exactness") == 1 and "It computes what the StableLmForCausalLM does" in text
        shutil.rmtree(tmp_path / "native")
        shutil.rmtree(checkpoint)
        out.rename(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["native", "quantized"])
def test_the_card_of_a_merged_adapter_has_the_figures_of_the_adapter(
    way: str, checkpoint: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(checkpoint, tmp_path / "adapter")
    facts = Facts(kind="adapter", dataset="questions", base="m", prompts=["Who"], compressors={"xz": 2.0})
    (adapter / CARD).write_text(render(facts, {"library_name": "peft", "tags": ["lora"], "base_model": "a/m"}, {}))
    if way == "native":
        export("native", adapter, tmp_path / "out")
    else:
        quantized.run([str(adapter), str(tmp_path / "out"), "--load_in_8bit"])
    card = read_card(tmp_path / "out" / CARD)
    assert card.facts.dataset == "questions" and card.facts.prompts == ["Who"] and card.facts.is_merged
    assert (
        card.facts.kind != "adapter" and card.facts.parameters > 0 and card.metadata["library_name"] == "transformers"
    )
    assert "base_model" not in card.metadata and "lora" not in card.metadata["tags"]


def test_an_adapter_is_merged(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    back = export("mini", export("native", tmp_path / "adapter", tmp_path / "native"), tmp_path / "mini")
    merged = adapted.merge_and_unload()
    assert same_parameters(AutoModelForCausalLM.from_pretrained(back), merged)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "gguf", "onnx", "lm_eval"])
def test_an_adapter_that_cannot_be_merged_is_refused(format: str, checkpoint: Path, tmp_path: Path) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), settings).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text").write_text("text")
    options = {"text_file": str(tmp_path / "text")} if format == "lm_eval" else {}
    with pytest.raises(ValueError, match=r"The adapter .*adapter' cannot be merged into the weights of .*checkpoint'"):
        export(format, tmp_path / "adapter", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="would be lost: name another folder"):
        export(format, tmp_path / "adapter", checkpoint, overwrite=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint", "text"]


def rewrite(**fields: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewrite(num_hidden_layers=3), r"do not fit its config\.json: 11 are not there, first model\.layers\.2\."),
        (rewrite(num_hidden_layers=1), r"do not fit its config\.json: 11 are left over, first model\.layers\.1\."),
        (rewrite(intermediate_size=128), r"do not fit its config\.json: 6 are of another shape"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json is not valid JSON"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), r"generation_config\.json is not valid"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), r"README\.md is not valid UTF-8"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), r"The metadata of .*README\.md"),
        (lambda folder: (folder / "README.md").write_text("---\n- a\n---\n"), r"The metadata of .*README\.md"),
    ],
)
def test_a_checkpoint_that_is_damaged(
    change: Callable[[Path], None], words: str, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would make up the weights that are missing, leave out layers, and pass over broken settings."""
    change(checkpoint)
    with pytest.raises(ValueError, match=words):
        export("native", checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert "LOAD REPORT" not in caplog.text


def test_a_disk_that_is_full(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ByteTokenizer, "save_pretrained", fail)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"/out could not be written \(No space left on device\)"):
        export("native", checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    random_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    export("native", folder, out)
    before = sorted(path.name for path in out.iterdir())
    random_model(mlp_bias=True).save_pretrained(folder)
    with pytest.raises(ValueError, match="mlp_bias is True"):
        export("native", folder, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_quantized_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    rounded.save_pretrained(tmp_path / "int8")
    ByteTokenizer().save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="int8' is quantized: export the checkpoint that it was made of"):
        export("native", tmp_path / "int8", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "onnx", "gguf"])
def test_the_card_of_a_model_that_answers_asks_it(
    checkpoint: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip({"native": "torch", "gguf": "gguf", "onnx": "onnxruntime"}[format])
    (checkpoint / "README.md").write_text(render(Facts(is_chat=True, prompts=['"Who?"']), {}, {}))
    messages = [{"role": "user", "content": '"Who?"'}]
    model, tokenizer = load_model(str(checkpoint))
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, length:].tolist()
    end = next(k for k in range(30, 100) if ids[k] not in ids[:k])
    model.generation_config.update(eos_token_id=[2, ids[end]], do_sample=False)
    model.generation_config.save_pretrained(checkpoint)
    card = (export(format, checkpoint, tmp_path / "out") / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("PATH_OR_REPOSITORY", str(tmp_path / "out"))
    assert 'messages = [{"role": "user", "content": "\\"Who?\\""}]\n' in code
    capsys.readouterr()
    if format == "gguf":
        assert compile(code, "README.md", "exec") and "llama-cli -m checkpoint-Q8_0.gguf -cnv\n" in card
        return
    exec(code, {})
    answer = tokenizer.decode(ids[: end + 1], skip_special_tokens=True)
    assert capsys.readouterr().out.strip("\n") == answer.strip("\n")
