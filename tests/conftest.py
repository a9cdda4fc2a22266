"""What every test needs: no network, small caches of its own, and ways to run the programs as a user does."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores already
os.environ["MINI_CACHE"] = tempfile.mkdtemp(prefix="mini-test-cache-")

import pytest
import torch

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests give the same result in any order."""
    torch.manual_seed(0)


def run_program(name: str, *arguments: object, cwd: Path, input: str | None = None, **environment: str):
    """Runs a program of the repository root with plain `python`, in a folder of the test."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        input=input,
        stdin=None if input is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# A run of seconds: a model of two narrow layers on the generated sample.
QUICK = (
    "--dataset sample --num_hidden_layers 2 --hidden_size 64 --intermediate_size 64 --num_attention_heads 2 "
    "--num_key_value_heads 1 --max_position_embeddings 64 --train_batch_size 8 --warmup_steps 2 --logging_steps 1"
).split()


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only read it."""
    cwd = tmp_path_factory.mktemp("quick")
    result = run_program(
        "train_accelerate.py", *QUICK, "--max_steps", 40, "--eval_steps", 20, "--save_steps", 20, cwd=cwd
    )
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "tiny-sample"
