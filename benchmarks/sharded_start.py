"""
What docs/SCALING.md says of the start of a large model: seconds, and memory of a process, to make it in shards.

    python benchmarks/sharded_start.py [--processes 4] [--hidden_size 2048] [--num_hidden_layers 20]
        [--intermediate_size 5632] [--output FILE]

The processes are on CPUs, on this machine. The model is made on the meta device, sharded by FSDP2, and filled with the
weights that one process would draw. The last line is JSON.
"""

import functools
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of  # isort: skip

MAXIMUM_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass
class StartSettings(OutputSettings):
    """The model and the processes."""

    processes: int = option(4, "processes that share the model", at_least=2)
    hidden_size: int = option(2048, "width of the model, a multiple of 64, which heads have", at_least=64)
    num_hidden_layers: int = option(20, "blocks of the model", at_least=1)
    intermediate_size: int = option(5632, "width of the MLP", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64, got {self.hidden_size}.")


if __name__ == "__main__":
    SETTINGS = settings_of(StartSettings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import psutil
import torch
import torch.distributed as dist
from configuration_mini import MiniConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_mini.distributed import blocks_of
from training_mini.sharded_start import ShardedStart
from transformers import AutoModelForCausalLM


def start_on(rank: int, settings: StartSettings, folder: str) -> None:
    """One of the processes. Writes what it measured into `folder`."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=settings.processes)
    config = MiniConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=settings.hidden_size // 64,
    )
    dist.barrier()
    before, begun, worked = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    start = ShardedStart(functools.partial(AutoModelForCausalLM.from_config, config))
    mesh = init_device_mesh("cpu", (settings.processes,))
    for module in (*blocks_of(start.model), start.model):
        fully_shard(module, mesh=mesh)
    start.materialize(torch.device("cpu"))
    start.fill(42)
    seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXIMUM_UNIT - before
    held = sum(parameter.to_local().nbytes for parameter in start.model.parameters())
    figures = {"seconds": seconds, "processor_seconds": worked, "peak_bytes": peak, "held_bytes": held}
    figures["parameters"] = start.model.num_parameters()
    torch.save(figures, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: StartSettings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(start_on, (settings, folder), settings.processes)
        each = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(settings.processes)]
    largest = {name: max(figures[name] for figures in each) for name in each[0]}
    return {
        "parameters": largest["parameters"],
        "whole_bytes": 4 * largest["parameters"],
        "processes": settings.processes,
        "seconds": largest["seconds"],
        "processor_seconds_of_a_process": largest["processor_seconds"],
        "held_bytes_of_a_process": largest["held_bytes"],
        "peak_bytes_of_a_process": largest["peak_bytes"],
        "machine": machine("cpu"),
    }


def show(results: dict[str, Any], settings: StartSettings) -> None:
    table = Table("", "", title=f"{settings.processes} processes", show_header=False)
    for name, value in results.items():
        if name != "machine":
            table.add_row(name.replace("_", " "), f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
