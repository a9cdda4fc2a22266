"""What the benchmarks share: the peer of the same shape, turns, memory, and the machine."""

import contextlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from configuration_mini import MiniConfig
from transformers import LlamaConfig


def llama_config_of(config: MiniConfig) -> LlamaConfig:
    """Llama in the shape of Mini; what is left to differ is Llama's: RMSNorm, and its own code."""
    shape = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return LlamaConfig(**{name: getattr(config, name) for name in shape})


def in_turns(turns: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each, round by round: whatever slows the machine for a while slows all of them."""
    seconds: dict[Any, list[float]] = {key: [] for key in turns}
    for round_number in range(rounds + 1):
        for key, turn in turns.items():
            measured = turn()
            if round_number:  # the first round warms up
                seconds[key].append(measured)
    return seconds


def peak_resident_memory(reset: bool = False) -> int | None:
    """
    The peak of the memory of this process in bytes, `None` where the system has no /proc.

    `getrusage` will not do: on Linux a process inherits the ru_maxrss of the one that started it.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): resets the peak
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on, for the JSON."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
