"""The page of the demo as a Space: it has all that it imports, and runs with nothing else."""

import os
import socket
import subprocess
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers import fork_server
from helpers.hub_server import HubServer
from sharing_mini.arguments import SharingArguments
from sharing_mini.pushing import push
from sharing_mini.space import PAGE, modules_of, write_space
from sharing_mini.staging import Staged


@pytest.mark.slow
def test_front_matter_and_requirements(tmp_path: Path) -> None:
    write_space("user/name", Staged(tmp_path, "model", {"quantization_config": {}}), tmp_path, "mit")
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and front["sdk_version"] == version("gradio") and front["app_file"] == "app.py"
    assert front["models"] == ["user/name"] and front["license"] == "mit"
    lines = (tmp_path / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "transformers", "tokenizers", "safetensors", "accelerate", "pyyaml"} <= names
    assert not any("+" in line for line in lines) and "gradio" not in names  # the SDK brings it
    assert "peft" not in names and '"--model", "user/name"' in (tmp_path / "app.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config", "library"), [("adapter", {}, "peft"), ("model", {}, None)])
def test_adapters_need_another_flag(tmp_path: Path, kind: str, config: dict, library: str | None) -> None:
    write_space("user/name", Staged(tmp_path, kind, config), tmp_path, None)
    names = {line.split("==")[0] for line in (tmp_path / "requirements.txt").read_text().split()}
    assert ("peft" in names) == (library == "peft") and "bitsandbytes" not in names
    assert (f'"--{"adapter" if library else "model"}", "user/name"') in (tmp_path / "app.py").read_text()
    assert "license" not in (tmp_path / "README.md").read_text()


def test_modules_are_those_that_the_page_imports() -> None:
    names = {path.as_posix() for path in modules_of(PAGE)}
    assert {
        "generation_mini/demo/__init__.py",
        "modeling_mini/loading/checkpoints.py",
        "generation_mini/text_generation.py",
    } <= names
    assert {"configuration_mini.py", "entry_points_mini.py", "modeling_mini/__init__.py"} <= names
    assert not any(name.startswith(("training_mini", "sharing_mini", "tests")) for name in names)


@pytest.mark.slow
def test_space_runs_from_what_was_pushed(hub: HubServer, model: Path, tmp_path: Path) -> None:
    arguments = SharingArguments(space=True, no_verify=True, license="mit")
    result = push(str(model), "user/name", arguments, lambda sentence: None)
    assert result.space.url == f"{hub.url}/spaces/user/name"
    space = hub.repositories["space", "user/name"]
    assert space.history() == ["Upload model", "initial commit"] and space.settings["sdk"] == "gradio"
    for name, content in space.files().items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [fork_server.python(), "app.py"], cwd=tmp_path / "space", env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline, page = time.monotonic() + 120, ""
        while not page:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.3)
        assert "Mini: user/name" in page and "Temperature" in page
        assert hub.count("GET", "^/cdn/") > 0  # the weights
    finally:
        process.kill()
        process.wait()
