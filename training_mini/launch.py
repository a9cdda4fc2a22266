"""Is a run launched as its user meant? A launch that would silently do something else is refused."""

import contextlib
import os
import re
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file

ON_CPUS = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {} train_accelerate.py ..."


def check_launch() -> None:
    """
    Raises `ValueError` for a launch that silently does something else: `accelerate launch --cpu --num_processes 2`
    starts one process, with DeepSpeed on a CPU every process trains alone, and with the store that torchrun keeps, the
    processes of a restart on several machines wait for dead ones.
    """
    machines, restarts = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if machines > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "Restarts on several machines would hang, because torchrun keeps the addresses of dead processes: "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or leave out --max_restarts."
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not torch.cuda.is_available():
        raise ValueError("DeepSpeed needs a GPU: on CPUs accelerate would train without it and not say so.")
    asked = asked_processes(psutil.Process().parent())
    if asked > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"accelerate was asked for {asked} processes and started 1, as it does on CPUs; "
            f"type {ON_CPUS.format(asked)}"
        )


def asked_processes(launcher: psutil.Process | None) -> int:
    """How many processes the `accelerate launch` that started this one was asked for, by flag or file; else 1."""
    try:
        command = " ".join(launcher.cmdline()) if launcher is not None else ""
    except psutil.Error:
        return 1
    # What follows the name of the training script are the flags of the script.
    command = command.split("train_accelerate")[0]
    if not re.search(r"accelerate(\S*)? launch|accelerate\S*launch", command):
        return 1
    if match := re.search(r"--num[_-]processes[= ](\d+)", command):
        return int(match[1])
    match = re.search(r"--config[_-]file[= ](\S+)", command)
    if match is None and "--cpu" in command.split():
        return 1  # then accelerate does not look at its default file
    config_file = Path(match[1] if match else default_config_file)
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
        return int(yaml.safe_load(config_file.read_text(encoding="utf-8")).get("num_processes", 1))
    return 1


def check_processes(accelerator: Accelerator) -> None:
    """Raises `ValueError` if processes that were started together would each train alone."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started and each would train alone; without GPUs, type {ON_CPUS.format(started)}"
        )
