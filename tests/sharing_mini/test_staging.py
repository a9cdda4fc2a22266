"""What may go up and what may not, and that nothing is changed on the way."""

import importlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from files_mini import replace_folder
from helpers.modules import importable
from helpers.programs import ROOT
from modeling_mini.loading.checkpoints import load_model
from safetensors.torch import load_file, save_file
from sharing_mini.clean_process import is_of_mini
from sharing_mini.staging import Staged, bytes_of, check_secrets, find_source, is_pickle, stage
from sharing_mini.verification import prove
from tokenization import ByteTokenizer
from training_mini.own_model import name_code, write_code
from transformers import AutoModelForCausalLM, MambaConfig


def refusal(model: Path, tmp_path: Path, **settings: str) -> str:
    (tmp_path / "staged").mkdir(exist_ok=True)
    with pytest.raises(ValueError) as caught:
        stage(find_source(str(model)), tmp_path / "staged", **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_all_files_byte_by_byte(model: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(model)), tmp_path / "staged")
    assert {name: path.read_bytes() for name, path in staged.files.items()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    assert staged.kind == "model" and staged.has_code
    assert "modeling_mini.py" in staged.files and "tokenizer.json" in staged.files


def test_run_brings_its_best_model_and_its_curve(quick_run: Path, tmp_path: Path) -> None:
    source = find_source(str(quick_run))
    assert (source.folder, source.run) == (quick_run / "best", quick_run)
    staged = stage(source, tmp_path)
    assert staged.files["curves.png"].read_bytes() == (quick_run / "curves.png").read_bytes()
    assert find_source(str(quick_run / "final")).run == quick_run


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("training_args.bin", b"anything", "is a pickle"),
        ("pytorch_model.pt", b"anything", "is a pickle"),
        ("vocab.json", pickle.dumps({"a": 1}), "is a pickle"),  # by what it holds, whatever its name
        ("notes.txt", b"hello", "'notes.txt'"),
        (".env", b"KEY=1", "'.env'"),
        ("optimizer/state.json", b"{}", "'optimizer/state.json'"),
        ("train.py", b"print()", "'train.py'"),
        ("merges.txt", b"#\nghp_" + b"a1B2" * 10, "a GitHub token"),
        ("LICENSE", b"-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ],
)
def test_refused_files(model: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(content)
    sentence = refusal(model, tmp_path)
    assert words in sentence and Path(name).name in sentence
    if "token" in words or "key" in words:
        assert "line " in sentence and "a1B2" not in sentence


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10280])
def test_safetensors_whose_first_bytes_are_like_those_of_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    room = length - len('{"__metadata__":{"a":""},"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')
    save_file({"weight": torch.ones(1)}, path, metadata={"a": "b" * room})
    assert path.read_bytes()[:2] == length.to_bytes(8, "little")[:2] and not is_pickle(path)


def test_all_that_should_not_go_up_is_named(model: Path, tmp_path: Path) -> None:
    for number in range(7):
        (model / f"notes{number}.txt").write_text("")
    sentence = refusal(model, tmp_path)
    assert all(f"'notes{number}.txt'" in sentence for number in range(5)) and " and 2 more in " in sentence


@pytest.mark.slow
def test_the_code_of_an_own_class_goes_along(model: Path, tmp_path: Path) -> None:
    """The class of docs/EXTENDING.md, with its module and no other: it loads and writes in a process without Mini."""
    page = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
    (tmp_path / "square_mini.py").write_text(
        re.search(r"^```python file=square_mini.py\n(.*?)^```$", page, re.M | re.S)[1]
    )
    folder = tmp_path / "own"
    with importable(tmp_path):
        square_mini = importlib.import_module("square_mini")
        own = square_mini.SquareForCausalLM(square_mini.SquareConfig.from_pretrained(model, auto_map=None))
        assert name_code(own) == ""
        own.save_pretrained(folder)
        write_code(own, folder)
    ByteTokenizer().save_pretrained(folder)
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(folder)), tmp_path / "staged")
    assert {"square_mini.py", "modeling_mini.py", "configuration_mini.py"} <= set(staged.files)
    assert prove(staged, str(staged.folder), "def ").parameters == own.num_parameters()
    (folder / "other.py").write_text("print()")
    assert "'other.py' in" in refusal(folder, tmp_path)
    (folder / "other.py").unlink()
    (folder / "square_mini.py").unlink()
    assert "square_mini.py, code of the model, is missing" in refusal(folder, tmp_path)


def test_links(model: Path, tmp_path: Path) -> None:
    """What the cache of the Hub consists of goes up; a link to a folder would be left out without a word."""
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(model)), tmp_path / "staged")
    assert staged.files["model.safetensors"].read_bytes() == (tmp_path / "blob").read_bytes()
    for target in (tmp_path, tmp_path / "nowhere", model):
        (model / "LICENSE").symlink_to(target)
        assert "LICENSE' is a link to a folder or to nothing" in refusal(model, tmp_path)
        (model / "LICENSE").unlink()


def test_best_that_is_replaced_while_it_is_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that goes on training: half of one and half of another would be no model."""
    copy = shutil.copyfile
    shutil.copytree(model, tmp_path / "newer")

    def replace(path: Path, target: Path) -> None:
        copy(path, target)
        if path.name == "config.json":
            replace_folder(tmp_path / "newer", model)

    monkeypatch.setattr(shutil, "copyfile", replace)
    assert "was replaced by a newer one meanwhile: give the same command again" in refusal(model, tmp_path)


def test_disk_that_is_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(shutil, "copyfile", fail)
    (tmp_path / "staged").mkdir()
    with pytest.raises(OSError, match=r"/staged/.* could not be written \(No space left on device\)"):
        stage(find_source(str(model)), tmp_path / "staged")


def test_torch_save_under_another_name(model: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, model / "curves.png")
    assert "'curves.png' in" in refusal(model, tmp_path) and "is a pickle" in refusal(model, tmp_path)


SECRETS = {
    "a Hugging Face token": "hf_" + "Ab1" * 12,
    "an OpenAI or Anthropic key": "sk-proj-" + "Ab1" * 12,
    "an AWS key": "AKIA" + "AB12" * 4,
    "a Google key": "AIza" + "Ab-1_" * 7,
    "a Slack token": "xoxb-1234567890-abc",
    "a Weights & Biases key": "WANDB_API_KEY=" + "0a" * 20,
    "a password in an address": "postgres://me:secret@host/db",
    "your token": "hf_short",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SECRETS)
def test_secrets(model: Path, tmp_path: Path, what: str) -> None:
    """In a place where they come to lie: the settings of a tokenizer."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["notes"] = SECRETS[what]
    (model / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    lines = (model / "tokenizer_config.json").read_text().splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if '"notes"' in line)
    sentence = refusal(model, tmp_path, token="hf_short")
    assert f"tokenizer_config.json, line {number}, has what looks like {what}" in sentence
    assert SECRETS[what] not in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(model: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} in model.safetensors holds NaN or infinity" in refusal(model, tmp_path)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def forget_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (forget_a_shard, "model-00002-of-00002.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda folder: (folder / "generation_config.json").write_text("{"),
            "generation_config.json is not valid JSON",
        ),
        (lambda folder: (folder / "tokenizer_config.json").write_text(""), "tokenizer_config.json is not valid JSON"),
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_what_is_incomplete(model: Path, tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    change(model)
    assert words in refusal(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": "many"}, "must have a whole number as max_new_tokens, got 'many'"),
        ({"eos_token_id": [2, "x"]}, "must have a whole number as eos_token_id, got [2, 'x']"),
        ({"cache_implementation": "best"}, "has settings that do not fit: Invalid `cache_implementation` (best)"),
    ],
)
def test_generation_settings_that_do_not_fit(
    model: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps(settings))
    assert f"{path} {words}" in refusal(model, tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_model(str(model))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", "{% for message in messages %}", "Unexpected end of template"),
        ("chat_template.jinja", "{{ messages | words }}", "No filter named 'words'"),
        ("tokenizer_config.json", {"chat_template": "{{ messages"}, "unexpected end of template"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "{% if %}"}]}, "Expected an expr"),
        ("tokenizer_config.json", {"chat_template": 5}, "no Jinja"),
    ],
)
def test_chat_template_that_is_no_jinja(
    model: Path, tmp_path: Path, name: str, content: str | dict[str, object], words: str
) -> None:
    if isinstance(content, dict):
        content = json.dumps({**json.loads((model / name).read_text()), **content})
    (model / name).write_text(content)
    sentence = refusal(model, tmp_path)
    assert f"{name}' holds a chat template that is no Jinja: " in sentence and words in sentence


def test_a_process_that_found_another_mini_is_not_clean() -> None:
    modules = {path.stem for path in [*ROOT.glob("*_mini"), *ROOT.glob("*_mini.py"), ROOT / "tokenization"]}
    assert {"files_mini", "modeling_mini", "tokenization"} < modules and all(map(is_of_mini, modules))
    assert is_of_mini("modeling_mini.loading") and not is_of_mini("transformers_modules.best.modeling_mini")


@pytest.mark.slow
def test_a_model_without_a_context_writes_in_a_clean_process(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(tmp_path / "model")), tmp_path / "staged")
    assert len(prove(staged, str(staged.folder), "def ").ids) > 4


@pytest.mark.parametrize("name", ["model.onnx", "onnx/model.onnx_data_1", "model.onnx.data", "model.gguf"])
def test_in_weights_no_secret_is_looked_for(tmp_path: Path, name: str) -> None:
    """They may be larger than the memory, and any bytes come to stand in them."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(SECRETS["an AWS key"])
    check_secrets(Staged(tmp_path, "onnx"))
    (tmp_path / "labels.json").write_text(SECRETS["an AWS key"])
    with pytest.raises(ValueError, match=r"labels\.json, line 1, has what looks like an AWS key"):
        check_secrets(Staged(tmp_path, "onnx"))


@pytest.mark.slow
def test_a_folder_of_mini_without_its_code_goes_up_with_it(model: Path, tmp_path: Path) -> None:
    """As a copy of the model that comes with Mini is."""
    for path in model.glob("*.py"):
        path.unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "auto_map"}))
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(model)), tmp_path / "staged")
    assert staged.has_code and "modeling_mini.py" in staged.files
    assert prove(staged, str(staged.folder), "def ") is not None


@pytest.mark.parametrize("is_sharded_last", [True, False])
def test_weights_of_two_saves_do_not_go_up_together(model: Path, tmp_path: Path, is_sharded_last: bool) -> None:
    """As transformers' own `save_pretrained` leaves them; Mini's removes the older ones."""
    loaded, single = AutoModelForCausalLM.from_pretrained(model), model / "model.safetensors"
    before = single.read_bytes()
    loaded.save_pretrained(model, max_shard_size="50KB")
    assert not single.exists()
    assert stage(find_source(str(model)), (tmp_path / "last").absolute()).kind == "model"
    single.write_bytes(before)
    if not is_sharded_last:
        (model / "model.safetensors.index.json").unlink()
    assert "holds the weights of two saves" in refusal(model, tmp_path)


def test_no_model(tmp_path: Path, quick_run: Path) -> None:
    for place, words in (
        (tmp_path / "none", "There is no run or checkpoint folder"),
        (tmp_path, "holds no trained model"),
        (quick_run / "checkpoints" / "step_40", "is a state to resume training from"),
        ("user/name", "There is no run or checkpoint folder 'user/name'"),
    ):
        with pytest.raises(ValueError, match=words):
            find_source(str(place))


def test_large_weights_are_split_and_load_as_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(model)), tmp_path / "staged", max_shard_size="100KB")
    shards = [path for name, path in staged.files.items() if name.endswith(".safetensors")]
    # The embedding alone may be larger than a shard, which no tensor is cut for.
    assert len(shards) == 3 and sorted(path.stat().st_size < 101_000 for path in shards)[1:] == [True, True]
    whole, split = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, staged.folder))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters(), strict=True))
    assert (bytes_of("5GB"), bytes_of("1.5 MB"), bytes_of("10KB")) == (5 * 10**9, 1_500_000, 10_000)


def test_page_that_needs_no_network_goes_up_as_a_whole(model: Path, tmp_path: Path) -> None:
    from modeling_mini.export import export
    from modeling_mini.export.onnx import VENDORED

    pytest.importorskip("onnxruntime")
    for name in VENDORED:
        (tmp_path / "node_modules" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "node_modules" / name).write_bytes(b"\0asm or a script")
    page = export("onnx", model, tmp_path / "page", node_modules=str(tmp_path / "node_modules"))
    (tmp_path / "staged").mkdir()
    staged = stage(find_source(str(page)), tmp_path / "staged")
    assert staged.kind == "onnx" and sum(name.startswith("vendor/") for name in staged.files) == len(VENDORED)
