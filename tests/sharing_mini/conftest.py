"""A Hub for a test, and folders to push to it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import sharing_mini.hub
import torch
from helpers import fork_server
from helpers.hub_server import HubServer
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import ByteTokenizer

SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean processes that look at a model are forked, where they need seconds to import torch."""
    monkeypatch.setattr(sys, "executable", fork_server.python())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub on loopback that this process and those that it starts talk to, with a token at hand."""
    home = tmp_path_factory.mktemp("hub-home")
    with HubServer().running() as server:
        server.use(monkeypatch, home)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before further tries, in seconds, that were asked for and not made."""
    asked: list[float] = []
    clock = SimpleNamespace(sleep=asked.append)
    monkeypatch.setattr(sharing_mini.hub, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    return asked


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a model that was never trained; tests that change it take a copy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = ByteTokenizer(model_max_length=64)
    MiniForCausalLM(MiniConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
