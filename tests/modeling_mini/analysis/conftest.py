"""A small checkpoint of a run, with random weights."""

from pathlib import Path

import pytest
import torch
from configuration_mini import MiniConfig
from helpers.random_models import SHAPE
from modeling_mini import MiniForCausalLM
from tokenization import ByteTokenizer


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/tiny-python-stdlib` in a folder of its own, for tests that only read it."""
    folder = tmp_path_factory.mktemp("analysis") / "runs" / "tiny-python-stdlib"
    torch.manual_seed(0)
    # Weights larger than at the start of training: heads that differ.
    model = MiniForCausalLM(MiniConfig(**SHAPE, initializer_range=0.2))
    model.save_pretrained(folder / "best")
    ByteTokenizer().save_pretrained(folder / "best")
    return folder
