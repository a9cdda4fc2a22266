"""What the benchmarks share: settings and report, the peer of the same shape, turns, memory, and the machine."""

import json
import multiprocessing
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entry_points_mini import ArgumentParser, Settings, one_sentence_errors, option
from files_mini import write_text

# What loads torch stands where it is needed, for the help of a benchmark needs none of it.
if TYPE_CHECKING:
    from configuration_mini import MiniConfig
    from transformers import LlamaConfig


@dataclass
class OutputSettings(Settings):
    """Where the figures go."""

    output: str | None = option(None, "file to write the JSON to as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            raise ValueError(f"There is no folder for the output {self.output!r}.")


@dataclass
class PlaceSettings(OutputSettings):
    """Where to measure, and where the figures go."""

    device: str | None = option(None, "cpu or cuda; default: the GPU if there is one", choices=("cpu", "cuda"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu":
            return
        import torch

        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        elif not torch.cuda.is_available():
            raise ValueError("The device 'cuda' was asked for, but PyTorch finds no GPU here.")


def settings_of(settings_class: type[OutputSettings], description: str) -> Any:
    """The settings from the command line; its help, or what is wrong with them, ends the program."""
    with one_sentence_errors():
        parser = ArgumentParser(settings_class, description=description.strip().split("\n\n")[0])
        return parser.parse(sys.argv[1:])[0]


def run_benchmark(
    settings: OutputSettings,
    measure: Callable[[Any], dict[str, Any]],
    show: Callable[[dict[str, Any], Any], None],
) -> None:
    """Figures, a table for people, and a last line of JSON."""
    with one_sentence_errors():
        results = measure(settings)
        show(results, settings)
        write_results(results, settings)
        print(json.dumps(results))


def write_results(results: dict[str, Any], settings: OutputSettings) -> None:
    """The JSON into the file that was asked for, if one was. A long benchmark calls it for what it has so far."""
    if settings.output is not None:
        write_text(Path(settings.output), json.dumps(results) + "\n")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """
    What the function returns in a process of its own, forked where that is possible from a server that has imported
    the libraries and nothing else, and not from this one, so that nothing of this one counts.
    """
    is_possible = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if is_possible else "spawn")
    if is_possible:
        context.set_forkserver_preload(["torch._dynamo", "transformers.generation.utils"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def llama_config_of(config: "MiniConfig") -> "LlamaConfig":
    """Llama in the shape of Mini; what is left to differ is Llama's: RMSNorm, and its own code."""
    from modeling_mini.export.native import SHARED_FIELDS
    from transformers import LlamaConfig

    return LlamaConfig(**{name: getattr(config, name) for name in (*SHARED_FIELDS, "head_dim")})


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
    import torch
    import transformers
    from installation_mini import processor_name

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
