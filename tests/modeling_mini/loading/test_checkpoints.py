"""What `--model` means, before anything is loaded."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import files_mini
import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.loading.checkpoints import (
    existing_device,
    find_checkpoint,
    is_chat_model,
    load_checkpoint,
    load_model,
    load_tokenizer,
)
from safetensors.torch import load_file, save_file
from tokenization import ByteTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TokenizersBackend


def make(folder: str, name: str = "config.json", age: int = 0) -> None:
    """A folder that looks like a checkpoint, written so many seconds ago."""
    path = Path("runs", folder)
    path.mkdir(parents=True)
    (path / name).touch()
    os.utime(path / name, (1_700_000_000 - age,) * 2)


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_name_it_is_the_newest_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_checkpoint(None) == str(files_mini.BOX["box"]), "without a run, it is the model that comes with Mini"
    monkeypatch.setitem(files_mini.BOX, "box", tmp_path / "stripped")
    with pytest.raises(ValueError, match=r"no trained model under runs/: train one first, or name it by --model\.$"):
        find_checkpoint(None)
    make("old/best", age=20)
    make("new/best", age=10)
    make("older/final", age=30)
    assert find_checkpoint(None) == "runs/new/best"
    make("adapter/best", "adapter_config.json", age=5)
    assert find_checkpoint(None) == "runs/adapter/best"


def test_code_of_its_own_runs_only_if_somebody_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=264, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1)).save_pretrained(tmp_path / "own")  # fmt: skip
    ByteTokenizer().save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"},
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^'own' has Python code of its own, .* give trust_remote_code\.$"):
        load_checkpoint("own")
    assert "own_kind" not in capsys.readouterr().err + caplog.text, "and transformers says nothing before it"


def test_of_a_run_it_is_the_best_model_or_what_a_crash_left_of_it() -> None:
    for name in (".final.previous", "final", ".best.previous", "best"):
        make(f"run/{name}")
        assert find_checkpoint("runs/run") == f"runs/run/{name}"
    assert find_checkpoint("runs/run/final") == "runs/run/final"
    assert find_checkpoint("user/name") == "user/name"


def test_devices_that_are_not_there_or_hold_nothing() -> None:
    assert existing_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"^There is no device 'tpu:9' here; there is cpu.*\.$"):
        existing_device("tpu:9")
    with pytest.raises(ValueError, match=r"^The device 'meta' holds no numbers\.$"):
        existing_device("meta")


def test_another_model_may_have_weights_that_belong_to_nothing_and_must_have_its_own(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq_of_old": torch.ones(4)}
    save_file(weights | frequencies, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_checkpoint(str(tmp_path))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: 1 are not there, first model\.norm\.weight\.$"):
        load_checkpoint(str(tmp_path))


def test_weights_that_are_integers_are_refused(tmp_path: Path) -> None:
    """transformers converts them, and the model writes noise."""
    MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, name = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    for dtype, word in ((torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL")):
        save_file({**weights, name: weights[name].to(dtype)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"are integers \({name}: {word}\), and its config.json names no quant"):
            load_checkpoint(str(tmp_path))
    save_file({**weights, name: weights[name].half()}, file, metadata={"format": "pt"})
    load_checkpoint(str(tmp_path))


@pytest.mark.slow
def test_a_model_that_does_not_continue_texts_is_one_sentence(tmp_path: Path) -> None:
    """transformers lists some two hundred classes that would do."""
    shape = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 1, "d_kv": 16}
    T5ForConditionalGeneration(T5Config(vocab_size=264, **shape)).save_pretrained(tmp_path / "t5")
    ByteTokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"^'t5' is a model of the type 't5', which is not made to continue texts\.$"):
        load_checkpoint("t5")


def test_the_address_of_a_page_of_the_hub_is_told_its_name() -> None:
    for address in ("https://huggingface.co/user/name", "https://huggingface.co/user/name/tree/main"):
        with pytest.raises(ValueError, match="is an address: the name of that model on the Hub is user/name"):
            find_checkpoint(address)


@pytest.mark.slow
def test_the_adapter_that_comes_with_mini_is_found_by_its_name() -> None:
    model, _ = load_model("box", adapter="box-chat")
    again, _ = load_model("box-chat")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_without_the_mark_of_an_end_of_a_turn_is_none_that_chats() -> None:
    for names in ({"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, {}):
        tokenizer = TokenizersBackend(tokenizer_object=Tokenizer(WordLevel({"<|endoftext|>": 0})), **names)
        tokenizer.chat_template = "{{ messages[0].content }}"
        settings = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        assert not is_chat_model(SimpleNamespace(generation_config=settings), tokenizer)
        tokenizer.add_tokens(["<|end|>"], special_tokens=True)
        settings.eos_token_id = [0, 1]
        assert is_chat_model(SimpleNamespace(generation_config=settings), tokenizer)


def test_a_length_of_a_tokenizer_that_is_no_number(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "long"}))
    with pytest.raises(ValueError, match="is damaged: model_max_length is no number, but 'long'"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)
