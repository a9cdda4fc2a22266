"""Saving into a folder that holds an earlier save."""

import json
from pathlib import Path

import pytest
import torch
from helpers.random_models import make_model
from modeling_mini import MiniForCausalLM
from modeling_mini.loading.quantization import quantization_config
from transformers import AutoModelForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MANY, FEW = {"max_shard_size": "50KB"}, {"max_shard_size": "150KB"}


def weights_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("model.") or path.suffix == ".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[{}, MANY], [MANY, {}], [MANY, FEW], [FEW, MANY], [{}, MANY, FEW, {}]])
def test_a_folder_holds_the_weights_of_the_last_save_alone(settings: list[dict[str, str]], tmp_path: Path) -> None:
    model = make_model()
    for step, setting in enumerate(settings):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        model.save_pretrained(tmp_path, **setting)
        loaded = MiniForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    if (tmp_path / INDEX).exists():
        shards = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert weights_in(tmp_path) == {INDEX, *shards} and len(shards) > 1
    else:
        assert weights_in(tmp_path) == {SINGLE}


def test_weights_of_another_variant_stay(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, variant="fp16", **MANY)
    model.save_pretrained(tmp_path, variant="other.one")
    model.save_pretrained(tmp_path, variant="fp16")
    assert weights_in(tmp_path) == {"model.fp16.safetensors", "model.other.one.safetensors"}
    model.save_pretrained(tmp_path, variant="fp16", **MANY)
    assert "model.fp16.safetensors" not in weights_in(tmp_path)
    assert "model.other.one.safetensors" in weights_in(tmp_path)
    MiniForCausalLM.from_pretrained(tmp_path, variant="fp16")


def test_quantized_weights_take_the_place_of_shards(tmp_path: Path) -> None:
    make_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path, **MANY)
    config = MiniForCausalLM.config_class.from_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config("8bit", config, torch.device("cpu")), device_map="cpu"
    )
    quantized.save_pretrained(tmp_path)
    assert weights_in(tmp_path) == {SINGLE}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(1, 97, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, quantized(ids).logits)


def test_only_the_main_process_removes(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False, **MANY)
    assert weights_in(tmp_path) == {SINGLE}
