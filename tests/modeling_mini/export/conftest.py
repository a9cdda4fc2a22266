"""The folder of a small model."""

from pathlib import Path

import pytest
from helpers.exports import random_model
from tokenization import ByteTokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a small model of the default kind (LayerNorm), with a byte tokenizer."""
    folder = tmp_path / "checkpoint"
    random_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder
