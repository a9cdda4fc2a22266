"""peft knows Mini once `modeling_mini` is imported, whichever comes first, and who does not use peft does not pay."""

import subprocess
import sys

import peft
import pytest
import torch
from helpers import fork_server
from helpers.programs import ROOT
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.peft_defaults import TableFinder, register_peft_defaults
from peft.utils import constants

MINI_FIRST = """
import sys
import modeling_mini
assert "peft" not in sys.modules and "bitsandbytes" not in sys.modules, "a second for each import"
from modeling_mini import MiniConfig, MiniForCausalLM
from peft import LoraConfig, get_peft_model
model = get_peft_model(MiniForCausalLM(MiniConfig.preset("tiny")), LoraConfig())
print(sorted(model.peft_config["default"].target_modules))
"""


@pytest.mark.slow
def test_lora_without_targets_after_mini() -> None:
    result = subprocess.run(
        [fork_server.python(), "-c", MINI_FIRST], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['q_proj', 'v_proj']\n"


def test_peft_that_was_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "mini")
    register_peft_defaults()
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["mini"] == ["q_proj", "v_proj"]


def test_every_table_that_knows_llama_knows_mini() -> None:
    tables = {name: table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")}
    with_llama = {name for name, table in tables.items() if "llama" in table}
    assert len(with_llama) > 20 and with_llama == {name for name, table in tables.items() if "mini" in table}


@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config", "AdaLoraConfig", "VeraConfig", "LNTuningConfig"])
def test_methods_train_something_of_a_block(config: str) -> None:
    settings = {"total_step": 10} if config == "AdaLoraConfig" else {}
    shape = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    model = MiniForCausalLM(MiniConfig.preset("tiny", **shape, num_key_value_heads=2))
    adapted = peft.get_peft_model(model, getattr(peft, config)(**settings))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable and all("layers.0" in name or "norm" in name or "vera" in name for name in trainable)
    ids = torch.randint(8, 264, (1, 8))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


def test_registering_twice_adds_one_finder() -> None:
    register_peft_defaults()
    assert sum(isinstance(finder, TableFinder) for finder in sys.meta_path) <= 1
