"""`pip install .` into an environment that has what it asks for and nothing else, used from another folder."""

import configparser
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest
from helpers.environments import installed_for, lend_libraries
from helpers.programs import INSTALLING, ROOT

PROGRAM = """
import configuration_mini, generation_mini, modeling_mini, push_to_hub, tokenization, train_accelerate, training_mini
import generation_mini.transformers_cli
from pathlib import Path
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(configuration_mini.MiniConfig.preset("tiny"))
assert "site-packages" in modeling_mini.__file__, modeling_mini.__file__
packages = Path(modeling_mini.__file__).parents[1]
for name in ("modeling_mini/web/index.html", "modeling_mini/export/web/worker.js", "generation_mini/demo/writer.js"):
    assert (packages / name).is_file(), name
print(type(model).__name__, len(tokenization.ByteTokenizer()))
"""


@pytest.mark.slow
def test_installed_package_works_outside_the_repository(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    temporary = tempfile.TemporaryDirectory(prefix="mini-package-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    request.addfinalizer(temporary.cleanup)
    venv.create(temporary.name)
    python = Path(temporary.name, "bin", "python")
    environment = {**os.environ, **INSTALLING}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = setup["options"]["install_requires"].split("\n")
    lend_libraries(Path(temporary.name), installed_for(filter(None, asked)), tmp_path / "lent")
    # The constraints are the tested versions. pip installs what is not there in them.
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "-c", ROOT / "requirements.txt", ROOT]
    subprocess.run(install, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    result = subprocess.run([python, "-c", PROGRAM], **run)
    assert result.stdout == "MiniForCausalLM 264\n", result.stderr
    for command in ("mini-train", "mini-generate", "mini-push", "mini-transformers"):
        assert python.with_name(command).is_file()
    for command, words in (("mini-train", "--dataset"), ("mini-generate", "--max_new_tokens")):
        result = subprocess.run([python.with_name(command), "--help"], **run)
        assert result.returncode == 0 and words in result.stdout, result.stderr
    for name in ("fsdp2", "train.sh"):
        result = subprocess.run([python, "-m", "training_mini.launch_files", name], **run)
        file = Path(result.stdout.strip())
        assert file.is_relative_to(temporary.name) and file.is_file(), result.stderr
    # Before anything was trained, the model that comes with Mini writes.
    prompt = "def read_lines(path):"
    command = [python.with_name("mini-generate"), "--prompt", prompt, "--max_new_tokens", "20"]
    result = subprocess.run(command, **run)
    assert result.returncode == 0 and result.stdout.startswith(prompt), result.stderr
    assert "train one on text of your own: mini-train --dataset FILE" in result.stderr
    train = (
        "--dataset sample --hidden_size 64 --num_hidden_layers 1 --max_steps 3 --warmup_steps 1 --train_batch_size 2 "
        "--max_eval_tokens 2048"
    )
    result = subprocess.run([python.with_name("mini-train"), *train.split()], **run)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([python.with_name("mini-generate"), "--prompt", "a"], **run)
    assert result.returncode == 0 and result.stdout.startswith("a"), result.stderr
