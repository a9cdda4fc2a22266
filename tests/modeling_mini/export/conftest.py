"""Small models with weights that make every part matter, and their folders."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from modeling_mini import MiniForCausalLM
from random_models import SHAPE
from tokenization import ByteTokenizer


def random_model(**fields: Any) -> MiniForCausalLM:
    """Norms and biases are random too: at their start of 1 and 0, a mistake with them would not show."""
    model = MiniForCausalLM(MiniConfig(**{**SHAPE, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a small model of the default kind (LayerNorm), with a byte tokenizer."""
    folder = tmp_path / "checkpoint"
    random_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


def same_parameters(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_dtype(config: MiniConfig) -> dict[str, Any]:
    """The fields of a configuration, without how and where it was saved."""
    fields = copy.deepcopy(config.to_dict())
    for name in ("dtype", "auto_map", "architectures", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return fields
