"""transformers' own server and chat on a checkpoint of Mini, over loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pexpect
import pytest
import torch
import transformers
from generation_mini import transformers_cli
from helpers.programs import ROOT
from modeling_mini.loading.checkpoints import load_model

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "generation_mini.transformers_cli"]
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def checkpoint(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says it can chat, with plain text as the likeliest answer."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(quick_run / "best", folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**ENVIRONMENT, "HF_HOME": str(log.parent)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(checkpoint), "--port", str(port)], env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


def continuation(checkpoint: Path, prompt: str | list[dict]) -> str:
    """What the model writes greedily, without a server."""
    model, tokenizer = load_model(str(checkpoint))
    if isinstance(prompt, str):
        ids = torch.tensor([tokenizer(prompt).input_ids])
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    output = model.generate(ids, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(text) > 5
    return text


def test_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": str(checkpoint), "prompt": "the ", "max_tokens": 20, "temperature": 0}
    expected = continuation(checkpoint, "the ")
    answer = client.completions.create(**arguments)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 20
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**arguments, stream=True)]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3


def test_chat_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": str(checkpoint), "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    expected = continuation(checkpoint, MESSAGES)
    answer = client.chat.completions.create(**arguments)
    assert answer.choices[0].message.content == expected
    chunks = client.chat.completions.create(**arguments, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3


def test_list_of_models_is_no_error(client: openai.OpenAI) -> None:
    assert list(client.models.list()) == []


def test_chat_in_the_terminal(server: str, checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMMAND[1:], "chat", str(checkpoint), server, "max_new_tokens=8", "--user", "me"]
    # Offline, huggingface_hub refuses every request, also this one to our own machine.
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "0"}
    chat = pexpect.spawn(
        sys.executable, command, env=environment, encoding="utf-8", timeout=60, dimensions=(50, 200), cwd=tmp_path
    )
    chat.expect("was already loaded")
    chat.expect("me")
    chat.sendline("hello")
    chat.expect("tokens in")
    chat.expect("Continue generating")  # eight tokens are few
    chat.sendline("n")
    chat.expect("me")
    chat.sendline("!exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_what_is_no_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "serve", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "holds no trained model" in result.stderr


def test_a_package_that_only_a_server_needs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.cli import serve

    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    monkeypatch.setattr(transformers, "MiniForCausalLM", None, raising=False)  # put back as it was
    monkeypatch.setattr(sys, "argv", ["mini-transformers", "serve", str(checkpoint)])
    with pytest.raises(SystemExit) as ended:
        transformers_cli.main()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*pip install .*\n", capsys.readouterr().err)
