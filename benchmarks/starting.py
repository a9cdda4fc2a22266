"""
How long programs take to start: help and mistakes, the first character of a text, the first step of a run.

    python benchmarks/starting.py [--only help writing training] [--rounds 3]

Figures are seconds of the processor and of the clock. "The libraries" is what any program has to import to load a
model: what is left of `writing` and `training` is Mini's. Like Mini's programs, they are imported without garbage
collection, and once more with it, as they come. The corpus of the run is encoded before. Medians over the rounds; the
last line is JSON.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from entry_points_mini import option
from rich import box
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of  # isort: skip

ROOT = Path(__file__).parent.parent
KINDS = ("help", "writing", "training")
GOALS = {"help": 1.0, "writing": 3.0, "training": 5.0}  # seconds of the processor
PROMPT = "def f"
IMPORTED = "imported"
LIBRARIES = "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel"


@dataclass
class Settings(OutputSettings):
    """What is started, and how often."""

    only: list[str] = option(list(KINDS), "help, writing and training, or some of them", choices=KINDS)
    rounds: int = option(3, "how often each program is started; the median counts", at_least=1)


def starts(settings: Settings, folder: Path) -> list[tuple[str, str, list[str], Callable[[str], bool]]]:
    """Each start: its kind, its name, the program with its flags, and what it has written when it counts as started."""

    def to_the_end(text: str) -> bool:
        return False

    def imported(text: str) -> bool:
        return IMPORTED in text

    quick, said = "import gc; gc.disable()", f"print({IMPORTED!r})"
    write = ["generate.py", "--model", "box", "--prompt", PROMPT, "--seed", "1", "--stream"]
    train = ["train_accelerate.py", "--dataset", "sample", "--max_steps", "1", "--overwrite", "--output_dir"]
    known = [
        ("help", "train_accelerate.py --help", ["train_accelerate.py", "--help"], to_the_end),
        ("help", "generate.py --help", ["generate.py", "--help"], to_the_end),
        ("help", "push_to_hub.py --help", ["push_to_hub.py", "--help"], to_the_end),
        ("help", "mini-transformers --help", ["-m", "generation_mini.transformers_cli", "--help"], to_the_end),
        ("help", "benchmarks/training.py --help", ["benchmarks/training.py", "--help"], to_the_end),
        ("help", "a flag that does not exist", ["generate.py", "--temprature", "1"], to_the_end),
        ("help", "a file that does not exist", ["train_accelerate.py", "--dataset", "none.txt"], to_the_end),
        ("writing", "import torch", ["-c", f"{quick}; import torch; {said}"], imported),
        ("writing", "the libraries", ["-c", f"{quick}; {LIBRARIES}; {said}"], imported),
        ("writing", "the libraries, as they come", ["-c", f"{LIBRARIES}; {said}"], imported),
        ("writing", "generate.py, first character", write, lambda text: len(text) > len(PROMPT)),
        ("writing", "generate.py, 20 tokens, to its end", [*write, "--max_new_tokens", "20"], to_the_end),
        ("training", "train_accelerate.py, first step", [*train, str(folder / "run")], lambda text: "step 1/1" in text),
    ]
    return [start for start in known if start[0] in settings.only]


def start(arguments: list[str], has_started: Callable[[str], bool]) -> tuple[float, float]:
    """The seconds of the processor and of the clock until a program of Python has started, or until its end."""
    begun, text = time.perf_counter(), ""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with psutil.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as program:
        while not has_started(text):
            piece = program.stdout.read1()
            if not piece:  # it ends, and its times can be read until it is waited for
                break
            text += piece.decode("utf-8", "replace")
        times, seconds = program.cpu_times(), time.perf_counter() - begun
        program.kill()
    return times.user + times.system, seconds


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        programs = starts(settings, Path(folder))
        for round_number in range(settings.rounds + 1):
            for _, name, arguments, has_started in programs:
                measured = start(arguments, has_started)
                if round_number:  # the first round fills the caches of the system, and encodes the corpus
                    seconds.setdefault(name, []).append(measured)
    medians = {name: [statistics.median(each) for each in zip(*turns, strict=True)] for name, turns in seconds.items()}
    return {
        "benchmark": "starting",
        "machine": machine("cpu"),
        "settings": asdict(settings),
        "starts": [
            {"kind": kind, "name": name, "processor_seconds": medians[name][0], "seconds": medians[name][1]}
            for kind, name, _, _ in programs
        ],
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    table = Table("", "processor", "clock", "goal", box=box.SIMPLE_HEAD, title="Seconds to start")
    for row in results["starts"]:
        processor, clock = (f"{row[key]:.2f}" for key in ("processor_seconds", "seconds"))
        table.add_row(row["name"], processor, clock, str(GOALS[row["kind"]]))
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(settings_of(Settings, __doc__), measure, show)
