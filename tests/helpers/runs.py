"""Small training runs, and what they leave behind."""

import json
import math
import resource
import subprocess
import time
from pathlib import Path

import torch
import yaml
from helpers import fork_server
from helpers.programs import ROOT, free_port, run_program, start_program
from safetensors.torch import load_file
from training_mini.arguments import parse_arguments
from training_mini.hooks import Hooks
from training_mini.result import TrainingResult
from training_mini.trainer import Trainer

# A run of seconds: a model of two narrow layers on the generated sample.
QUICK = (
    "--dataset sample --num_hidden_layers 2 --hidden_size 64 --intermediate_size 64 --num_attention_heads 2 "
    "--num_key_value_heads 1 --max_position_embeddings 64 --train_batch_size 8 --warmup_steps 2 --logging_steps 1 "
    "--max_eval_tokens 2048"
).split()
# More steps than any test waits for, and few enough that the trainer compiles nothing.
ENDLESS = 20_000
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def train(cwd: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return run_program("train_accelerate.py", *QUICK, *arguments, cwd=cwd, **environment)


def train_here(
    folder: Path, *arguments: object, bad_steps: range = range(0), callbacks: tuple[object, ...] = ()
) -> tuple[Trainer, TrainingResult]:
    """A run in this process, in which the gradients of some steps are not finite."""
    settings = parse_arguments([*QUICK, "--output_dir", str(folder), *map(str, arguments)])
    trainer = Trainer(settings, Hooks(callbacks=callbacks))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if trainer.state.step + 1 in bad_steps else gradient

    trainer.run.unwrapped_model.model.norm.weight.register_hook(spoil)
    return trainer, trainer.train()


def forked(config: str | None, cwd: Path, *arguments: object, program: str = "train_accelerate.py") -> str:
    """
    What training, or another program, printed on the processes that a configuration starts, or on one for `None`. They
    are forked, with the variables that `accelerate launch` sets, which saves the imports of launcher and processes.
    """
    if config is None:
        result = run_program(program, *arguments, cwd=cwd, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        assert result.returncode == 0, result.stderr
        return result.stdout
    environments = [{**environment, "PYTHONPATH": str(ROOT)} for environment in environments_of(config)]
    processes = [start_program(program, *arguments, cwd=cwd, **environment) for environment in environments]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0][0]


def environments_of(config: str) -> list[dict[str, str]]:
    """The variables that `accelerate launch` sets for each of the processes of a configuration."""
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / config).read_text())
    count = settings["num_processes"]
    environment = {**ON_CPU, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if settings["distributed_type"] == "FSDP":
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if mesh := settings.get("parallelism_config"):
        environment |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
        environment |= {name.upper(): str(size) for name, size in mesh.items()}
    return [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_on_a_full_disk(cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Training that can write no file of more than 50 KB: the model has 160, so metrics can be written, weights not."""
    process = start_program("train_accelerate.py", *arguments, cwd=cwd)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for_steps(
    run: Path, steps: int, process: subprocess.Popen | fork_server.Program, seconds: float = 120
) -> None:
    """Waits until a run has logged so many steps."""
    deadline = time.monotonic() + seconds
    while not (run / "metrics.jsonl").is_file() or len(losses_so_far(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or hangs"
        time.sleep(0.01)


def losses_so_far(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(run: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")
