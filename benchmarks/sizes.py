"""
How large a model, and how long, for so many megabytes of text: the table of docs/TRAINING.md.

    python benchmarks/sizes.py [--sizes tiny small medium large] [--seconds 20] [--processor_time true]

The rule: a model learns best from about 20 tokens for each parameter (Hoffmann et al. 2022,
https://arxiv.org/abs/2203.15556), and a text can be read four times with almost the gain of new text (Muennighoff et
al. 2023, https://arxiv.org/abs/2305.16264). What is measured is the speed: steps of the trainer with its defaults. The
last line is JSON.
"""

import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich import box
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of  # isort: skip

# `gpt2` is `large` with a vocabulary that a run takes from its tokenizer.
SIZES = ("tiny", "small", "medium", "large")
ON_A_CPU = ("tiny", "small", "medium")  # a step of `large` takes minutes there
TOKENS_PER_PARAMETER, EPOCHS = 20, 4
WARM_UP = 2  # steps: the first ones compile


@dataclass
class Settings(OutputSettings):
    """What is measured, and for how long."""

    sizes: list[str] = option(list(ON_A_CPU), "presets of MiniConfig", choices=SIZES)
    seconds: float = option(20.0, "how long steps are repeated; the median counts", above=0)
    processor_time: bool = option(
        False, "one thread, and seconds of the processor: for a machine that has other things to do as well"
    )


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import torch
from training_mini import TrainingSettings, train


class Clock:
    """A callback that takes the seconds of each step, and ends the run when there are enough."""

    def __init__(self, settings: Settings) -> None:
        self.clock = time.process_time if settings.processor_time else time.perf_counter
        self.enough = settings.seconds
        self.ends: list[float] = []

    def on_step_end(self, settings: Any, state: Any, control: Any, **about: Any) -> None:
        self.ends.append(self.clock())
        control.should_training_stop = len(self.ends) > WARM_UP and self.ends[-1] - self.ends[WARM_UP - 1] > self.enough

    @property
    def median(self) -> float:
        measured = self.ends[WARM_UP - 1 :]
        return statistics.median(end - start for start, end in itertools.pairwise(measured))


def measure_size(size: str, settings: Settings) -> dict[str, Any]:
    """The row of a size."""
    clock = Clock(settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingSettings(
            dataset="sample", size=size, max_steps=10**6, max_eval_tokens=2048, output_dir=f"{folder}/{size}"
        )
        run = train(arguments, callbacks=[clock]).run
    batch = run.arguments.optimization.train_batch_size * run.model.config.max_position_embeddings
    parameters = run.model.num_parameters()
    tokens = TOKENS_PER_PARAMETER * parameters
    return {
        "size": size,
        "parameters": parameters,
        "text_bytes": tokens / EPOCHS,  # a byte is a token
        "tokens": tokens,
        "steps": round(tokens / batch),
        "tokens_per_second": batch / clock.median,
        "hours": tokens / (batch / clock.median) / 3600,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    if settings.processor_time:
        torch.set_num_threads(1)
    return {
        "benchmark": "sizes",
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "settings": asdict(settings),
        "rows": [measure_size(size, settings) for size in settings.sizes],
    }


def words_of(hours: float) -> str:
    """`9 minutes`, `3 hours`, `40 days`."""
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:,.0f} days"


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console()
    table = Table(title="Text and time for each size", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("size", "parameters", "MB of text", "--max_steps", "tokens/s", "time"):
        table.add_column(heading, justify="left" if heading == "size" else "right")
    for row in results["rows"]:
        table.add_row(
            row["size"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['text_bytes'] / 1e6:,.1f}",
            f"{row['steps']:,}",
            f"{row['tokens_per_second']:,.0f}",
            words_of(row["hours"]),
        )
    console.print(table)
    console.print(f"{TOKENS_PER_PARAMETER} tokens for each parameter; the text is read {EPOCHS} times.")
    console.print(f"{results['machine']['device']}; {results['machine']['threads']} threads")


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
