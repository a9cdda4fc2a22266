"""
How large a model, and how long, for so many megabytes of text: the table of docs/TRAINING.md.

    python benchmarks/sizes.py [--sizes tiny small medium] [--seconds 20] [--processor_time true]

The rule: a model learns best from about 20 tokens for each parameter (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556),
and a text can be read four times with almost the gain of new text (Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264).
What is measured is the speed: forward and backward of one sequence, and a step of the trainer's default optimizer. A
step of the trainer is the first as often as its batch has sequences, and the second once. The last line is JSON.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from configuration_mini import PRESETS, MiniConfig
from entry_points_mini import option
from modeling_mini import MiniForCausalLM
from rich import box
from rich.console import Console
from rich.table import Table
from training_mini.arguments import parse_arguments
from training_mini.optimization import make_optimizers

from measuring import PlaceSettings, machine, run_benchmark  # isort: skip

TOKENS_PER_PARAMETER, EPOCHS = 20, 4
# A byte is a token of most sizes. `gpt2` has GPT-2's vocabulary, with about 4 bytes of English in a token.
BYTES_PER_TOKEN = {"gpt2": 4}
MOST_REPEATS = 20


@dataclass
class Settings(PlaceSettings):
    """What is measured, and for how long."""

    sizes: list[str] = option(list(PRESETS), "presets of MiniConfig", choices=tuple(PRESETS))
    seconds: float = option(20.0, "how long each part of a step is repeated; the median counts", above=0)
    processor_time: bool = option(
        False, "one thread, and seconds of the processor: for a machine that has other things to do as well"
    )


def median_seconds(action: Callable[[], None], settings: Settings) -> float:
    """After one call that warms up."""
    clock = time.process_time if settings.processor_time else time.perf_counter
    action()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < settings.seconds and len(seconds) < MOST_REPEATS):
        start = clock()
        action()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def measure_size(size: str, settings: Settings) -> dict[str, Any]:
    """The row of a size."""
    config = MiniConfig.preset(size)
    arguments = parse_arguments(["--size", size])
    model = MiniForCausalLM(config).to(settings.device)
    optimizers = make_optimizers(model, arguments.optimization)
    length = config.max_position_embeddings
    ids = torch.randint(8, config.vocab_size, (1, length), device=settings.device)

    def forward_and_backward() -> None:
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.device == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()

    def optimizer_step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    of_sequence = median_seconds(forward_and_backward, settings)
    of_optimizer = median_seconds(optimizer_step, settings)
    batch = arguments.optimization.train_batch_size
    parameters = model.num_parameters()
    tokens_per_second = batch * length / (batch * of_sequence + of_optimizer)
    tokens = TOKENS_PER_PARAMETER * parameters
    return {
        "size": size,
        "parameters": parameters,
        "text_bytes": tokens * BYTES_PER_TOKEN.get(size, 1) / EPOCHS,
        "tokens": tokens,
        "steps": round(tokens / (batch * length)),
        "tokens_per_second": tokens_per_second,
        "hours": tokens / tokens_per_second / 3600,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    if settings.processor_time:
        torch.set_num_threads(1)
    return {
        "benchmark": "sizes",
        "machine": machine(settings.device),
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
    place = f"{results['machine']['device']}, {results['machine']['threads']} threads"
    table = Table(title=f"Text and time for each size: {place}", box=box.SIMPLE_HEAD, padding=(0, 1))
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


if __name__ == "__main__":
    run_benchmark(Settings, __doc__, measure, show)
