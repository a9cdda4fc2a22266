"""
What the device is, which versions run on it, and its peaks as measured: a product in bfloat16, and memory bandwidth.

    python benchmarks/device.py [--device cuda]

Speeds of training and decoding are shares of these peaks. The last line is JSON.
"""

import importlib.metadata
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich.console import Console

from measuring import PlaceSettings, in_turns, machine, run_benchmark, settings_of  # isort: skip

# What is copied: more than any cache holds.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
NOT_PINNED = ("flash-attn", "triton", "pytest")  # installed or not, they decide what can run


@dataclass
class Settings(PlaceSettings):
    """What is measured, and how often."""

    rounds: int = option(7, "how often each is measured; the median counts", at_least=1)


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import torch
from training_mini.metrics import peak_flops

from training import SQUARE_SIDE, MatrixProducts, synchronize  # isort: skip
from training import Settings as TrainingSettings  # isort: skip


class Copy:
    """A copy within the memory of the device: half of what is moved is read, and half written."""

    def __init__(self, settings: Settings) -> None:
        size = COPIED_BYTES[settings.device]
        self.settings, self.bytes = settings, 2 * size
        self.source = torch.zeros(size // 4, device=settings.device)
        self.target = torch.empty_like(self.source)

    def turn(self) -> float:
        """The seconds of one copy."""
        synchronize(self.settings)
        start = time.perf_counter()
        self.target.copy_(self.source)
        synchronize(self.settings)
        return time.perf_counter() - start


def versions() -> dict[str, dict[str, str | None]]:
    """What is installed beside what Mini is tested with, by package."""
    lines = Path(__file__).parents[1].joinpath("requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    return {name: {"installed": version_of(name), "tested": pinned.get(name)} for name in (*pinned, *NOT_PINNED)}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts_of_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": None,
    }
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        facts["driver"] = answer[0] if answer else None
    return facts


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    product, copy = MatrixProducts.square(TrainingSettings(device=settings.device, bf16=True)), Copy(settings)
    seconds = in_turns({"product": product.turn, "copy": copy.turn}, settings.rounds)
    return {
        "benchmark": "device",
        "machine": machine(settings.device),
        "settings": asdict(settings),
        "gpu": facts_of_gpu() if settings.device == "cuda" else None,
        "versions": versions(),
        "bfloat16_flops_per_second": product.flops / statistics.median(seconds["product"]),
        "data_sheet_flops_per_second": peak_flops(torch.device(settings.device), torch.bfloat16, None),
        "bytes_per_second": copy.bytes / statistics.median(seconds["copy"]),
        "seconds": seconds,
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console(highlight=False)
    console.print(results["machine"]["device"])
    speed, sheet = results["bfloat16_flops_per_second"], results["data_sheet_flops_per_second"]
    of_sheet = "" if sheet is None else f", {speed / sheet:.0%} of the data sheet's {sheet / 1e12:,.0f}"
    side = SQUARE_SIDE[settings.device]
    console.print(f"A bfloat16 product of {side} x {side}: {speed / 1e12:,.2f} TFLOP/s{of_sheet}.")
    console.print(f"A copy, read and written: {results['bytes_per_second'] / 1e9:,.1f} GB/s.")
    for name, version in results["versions"].items():
        installed, tested = version["installed"] or "not installed", version["tested"]
        if tested not in (None, installed.split("+")[0]):  # as in 2.13.0+cpu
            console.print(f"{name} is {installed}; tested with {tested}.")


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
