"""
Mini's Muon beside torch's and AdamW: what a run learns with each, and how long its steps take.

    python benchmarks/muon.py [--seeds 1 2 3] [--max_steps 300]

The trainer trains its default model on the source of the standard library with each of them, in turns.
`torch.optim.Muon` stands in the place of Mini's, for the matrices of the blocks and with the same learning rates; AdamW
has rates of its own. Milliseconds are those of the processor for a whole step, as the median over all seeds. The last
line is JSON.
"""

import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich import box
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of, write_results  # isort: skip


@dataclass
class Settings(OutputSettings):
    """What is trained, and how often."""

    seeds: list[int] = option([1, 2, 3], "each optimizer trains once with each of these seeds")
    max_steps: int = option(300, "steps of each run", at_least=2)
    dataset: str = option("python-stdlib", "the text to learn from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("seeds must name at least one seed.")


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import torch
from training_mini import TrainingSettings, train
from training_mini.arguments import OptimizationArguments
from training_mini.optimizers import OPTIMIZERS, Optimizer, ParameterGroups, make_adamw


def make_torch_muon(groups: ParameterGroups, settings: OptimizationArguments) -> list[torch.optim.Optimizer]:
    rest = dict(groups)
    muon = torch.optim.Muon([rest.pop("matrices")], momentum=settings.muon_momentum, ns_steps=settings.muon_iterations)
    return [muon, *make_adamw(rest, settings)]


MUON = OPTIMIZERS["muon"]
OPTIMIZERS["torch_muon"] = Optimizer("torch.optim.Muon", make_torch_muon, MUON.defaults, MUON.rates, is_single=False)
CONTENDERS = {"muon": "Mini's Muon", "torch_muon": "torch.optim.Muon", "adamw": "AdamW"}


@dataclass
class StepTimes:
    """A callback that notes the processor time after each step."""

    seconds: list[float] = field(default_factory=list)

    def on_step_end(self, *_: object, **about: object) -> None:
        self.seconds.append(time.process_time())

    def of_steps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.seconds)]


@dataclass
class Contender:
    """What all runs with one optimizer came to."""

    name: str
    bits_per_byte: list[float] = field(default_factory=list)  # at the end, of each seed
    seconds: list[float] = field(default_factory=list)  # of the processor, of each step of all seeds


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON. They are written after each seed, for the case that a later one fails."""
    contenders = {optimizer: Contender(name) for optimizer, name in CONTENDERS.items()}
    for seed in settings.seeds:
        for optimizer, contender in contenders.items():
            times = StepTimes()
            with tempfile.TemporaryDirectory(prefix="mini-muon-") as folder:
                result = train(
                    TrainingSettings(
                        dataset=settings.dataset, optimizer=optimizer, seed=seed, max_steps=settings.max_steps,
                        output_dir=f"{folder}/run",
                    ),
                    callbacks=[times], progress=False,
                )  # fmt: skip
            contender.bits_per_byte.append(result.evaluation.bits_per_byte)
            contender.seconds += times.of_steps()
            print(f"seed {seed}, {contender.name}: {contender.bits_per_byte[-1]:.4f} bits per byte", file=sys.stderr)
        results = {
            "benchmark": "muon",
            "machine": machine("cpu"),
            "settings": asdict(settings),
            "optimizers": [row_of(contender) for contender in contenders.values()],
        }
        write_results(results, settings)
    return results


def row_of(contender: Contender) -> dict[str, Any]:
    """What the JSON has of one optimizer."""
    bits_per_byte = contender.bits_per_byte
    return {
        "name": contender.name,
        "bits_per_byte": bits_per_byte,
        "mean": statistics.fmean(bits_per_byte),
        "standard_deviation": statistics.stdev(bits_per_byte) if len(bits_per_byte) > 1 else None,
        "milliseconds": 1e3 * statistics.median(contender.seconds),
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    table = Table("", "bits per byte", "ms per step", box=box.SIMPLE_HEAD, title=f"After {settings.max_steps} steps")
    for row in results["optimizers"]:
        spread = f" ± {row['standard_deviation']:.4f}" if row["standard_deviation"] is not None else ""
        table.add_row(row["name"], f"{row['mean']:.4f}{spread}", f"{row['milliseconds']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
