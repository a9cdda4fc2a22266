"""The commands of docs/SHARING.md, in order, against a Hub on loopback."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.hub_server import HubServer
from helpers.programs import ROOT
from sharing_mini.arguments import parse_arguments

DOCUMENT = (ROOT / "docs" / "SHARING.md").read_text(encoding="utf-8").split("## Other runtimes")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_blocks(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run, tmp_path / "runs" / "tiny-python-stdlib")
    (tmp_path / "push_to_hub.py").symlink_to(ROOT / "push_to_hub.py")
    path = f"{Path(fork_server.python()).parent}:{os.environ['PATH']}"
    ran = 0
    with HubServer().running() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "hf"), "PATH": path, "PYTHONPATH": str(ROOT)}
        for language, block in BLOCKS:
            if language == "text":
                continue
            command = (
                ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [fork_server.python(), "-c", block]
            )
            result = subprocess.run(
                command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
            ran += 1
        models = {("model", "user/name"), ("model", "user/again")}
        assert ran == 5 and set(hub.repositories) == {*models, ("space", "user/name-page")}
        page = hub.repositories["space", "user/name-page"]
        assert page.settings["sdk"] == "static" and {"index.html", "worker.js", "onnx/model.onnx"} <= set(page.files())
        assert hub.model("user/again").private and "v1" in hub.model("user/name").tags
        weights = "model.safetensors"
        assert hub.model("user/again").files()[weights] == hub.model("user/name").files()[weights]


def test_commands_that_are_only_shown_have_flags_that_exist() -> None:
    shown = [line for language, block in BLOCKS if language == "text" for line in block.splitlines()]
    assert len(shown) >= 5
    for line in shown:
        words = line.split("    ")[0].split()
        source, repository, _ = parse_arguments(words[2:])
        assert words[1] == "push_to_hub.py" and source.startswith("runs/") and "/" in repository
