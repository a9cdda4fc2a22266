"""What every test needs: no network, small caches of its own, and ways to run the programs as a user does."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores already
os.environ["MINI_CACHE"] = tempfile.mkdtemp(prefix="mini-test-cache-")

import nursery
import pytest
import torch

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first: at the end, one process would run it while the others have nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests give the same result in any order."""
    torch.manual_seed(0)


def start_program(
    name: str, *arguments: object, cwd: Path, input: str | None = None, fresh: bool = False, **environment: str
) -> subprocess.Popen | nursery.Program:
    """
    Starts a program of the repository root as plain `python` does, in a process of its own and in a folder of the test;
    `fresh` with an interpreter of its own too, which takes seconds to import torch and transformers.
    """
    command = [str(ROOT / name), *map(str, arguments)]
    whole_environment = {**os.environ, **environment}
    if not fresh and nursery.can_start(whole_environment):
        return nursery.Program(command, cwd, whole_environment, input)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=whole_environment,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if input is not None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write(input)
            process.stdin.close()
        process.stdin = None
    return process


def run_program(name: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess:
    """`start_program`, and waits for its end."""
    process = start_program(name, *arguments, **settings)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# A run of seconds: a model of two narrow layers on the generated sample.
QUICK = (
    "--dataset sample --num_hidden_layers 2 --hidden_size 64 --intermediate_size 64 --num_attention_heads 2 "
    "--num_key_value_heads 1 --max_position_embeddings 64 --train_batch_size 8 --warmup_steps 2 --logging_steps 1 "
    "--max_eval_tokens 8192"
).split()


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only read it."""
    cwd = tmp_path_factory.mktemp("quick")
    result = run_program(
        "train_accelerate.py", *QUICK, "--max_steps", 40, "--eval_steps", 20, "--save_steps", 20, cwd=cwd, fresh=True
    )
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "tiny-sample"
