"""
What is learned in a given time: whole programs, from their start to their end, in turns.

    python benchmarks/learning.py [--only a b c] [--seeds 1 2 3] [--shakespeare FILE] [--nanogpt FOLDER] [--output FILE]

- a: Tiny Shakespeare by characters, nats of the last tenth of the text: configs/shakespeare_char.yaml beside nanoGPT's
  recipe for a CPU, whose best checkpoint is evaluated on the same characters
- b: README's first command, in bits per byte, beside the recipe that it had before Muon
- c: the same with a BPE of 2,048 tokens that is learned from the corpus, in steps that take about as long

Every run of Mini encodes its corpus anew. Of b and c, the share of 100 functions that are valid Python is shown too.
The last line is JSON, in which each run of Mini has a sample.
"""

import contextlib
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich import box
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of, write_results  # isort: skip

ROOT = Path(__file__).parent.parent
PARTS = ("a", "b", "c")
# In the unit of the part.
GOALS = {"a": 1.50, "b": 1.50, "c": 1.35}
UNITS = {"a": "nats", "b": "bits/byte", "c": "bits/byte"}
FORMER_RECIPE = (
    "--optimizer", "adamw", "--norm_type", "layernorm", "--qk_norm", "false", "--train_batch_size", "16",
    "--max_steps", "1200", "--eval_steps", "300",
)  # fmt: skip
# So many tokens are about the bytes that part b is evaluated on; how many exactly depends on the version of Python.
BPE = ("--tokenizer", "bpe", "--vocab_size", "2048", "--max_eval_tokens", "85444")
# Of nanoGPT's README; its evaluations are part of the recipe.
NANOGPT_RECIPE = (
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
)  # fmt: skip
NANOGPT_STEPS = 2000
console = Console(stderr=True, highlight=False)


@dataclass
class Settings(OutputSettings):
    """What is run, and how often."""

    only: list[str] = option(list(PARTS), "the parts to run, of a, b and c", choices=PARTS)
    seeds: list[int] = option([1, 2, 3], "seeds of Mini; nanoGPT has one, and runs once for each all the same")
    shakespeare: str | None = option(None, "the text file of Tiny Shakespeare, for part a")
    nanogpt: str | None = option(None, "folder of a nanoGPT checkout, which then takes part in a")
    former: bool = option(True, "in part b, also run the recipe that it had before Muon")
    bpe_steps: int = option(1400, "steps of part c")
    max_steps: int | None = option(None, "for a trial: so many steps for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "a" in self.only and (self.shakespeare is None or not Path(self.shakespeare).is_file()):
            raise ValueError(
                f"Part a needs the text of Tiny Shakespeare: name its file by --shakespeare, or leave the part out by "
                f"--only b c; got {self.shakespeare!r}."
            )
        if self.nanogpt is not None and not (Path(self.nanogpt) / "train.py").is_file():
            raise ValueError(f"There is no train.py in {self.nanogpt!r}; nanogpt is the folder of a nanoGPT checkout.")
        for name in ("bpe_steps", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.seeds:
            raise ValueError("seeds must name at least one seed.")
        self.only = [part for part in PARTS if part in self.only]


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import numpy as np
import torch
from torch.nn import functional
from training_mini.monitoring import read_metrics

from training import import_nanogpt  # isort: skip


@dataclass
class Result:
    """What one program came to."""

    seconds: float  # of the whole program
    value: float  # in the unit of its part
    parameters: int
    valid_functions: float | None = None  # of a model of Python, from 0 to 1
    sample: str | None = None  # what it wrote at the end


def contenders(settings: Settings) -> dict[tuple[str, str], Callable[[int, Path], Result]]:
    """What takes part, by part and name; called with a seed and an empty folder."""
    trial = [] if settings.max_steps is None else ["--max_steps", str(settings.max_steps), "--warmup_steps", "0"]

    def mini(figure: str, *flags: str) -> Callable[[int, Path], Result]:
        return lambda seed, folder: run_mini([*flags, *trial], seed, folder, figure)

    known: dict[tuple[str, str], Callable[[int, Path], Result]] = {}
    if "a" in settings.only:
        if settings.nanogpt is not None:
            known["a", "nanoGPT"] = lambda seed, folder: run_nanogpt(settings, folder)
        config = str(ROOT / "configs" / "shakespeare_char.yaml")
        known["a", "Mini"] = mini("eval_loss", "--config", config, "--dataset", os.path.abspath(settings.shakespeare))
    if "b" in settings.only:
        if settings.former:
            known["b", "Mini before Muon"] = mini("eval_bits_per_byte", *FORMER_RECIPE)
        known["b", "Mini"] = mini("eval_bits_per_byte")
    if "c" in settings.only:
        known["c", "Mini, BPE"] = mini("eval_bits_per_byte", *BPE, "--max_steps", str(settings.bpe_steps))
    return known


def run_program(command: list[str], folder: Path) -> float:
    """
    The seconds that a program took; what it prints goes to `log.txt` in the folder that it runs in.

    Raises:
        ValueError: if it fails, with its last line.
    """
    log = folder / "log.txt"
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, *command], cwd=folder, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    seconds = time.perf_counter() - started
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(f"{' '.join(command)} ended with exit code {code}: {last}")
    return seconds


def run_mini(flags: list[str], seed: int, folder: Path, figure: str) -> Result:
    command = [str(ROOT / "train_accelerate.py"), *flags, "--seed", str(seed), "--output_dir", "run"]
    seconds = run_program([*command, "--cache_dir", "cache"], folder)
    lines = read_metrics(folder / "run")
    evaluations = [line[figure] for line in lines if figure in line]
    if not evaluations:
        raise ValueError(f"{' '.join(command)} recorded no {figure}.")
    parameters = next(line["parameters"] for line in lines if "parameters" in line)
    functions = [line["eval_valid_functions"] for line in lines if "eval_valid_functions" in line]
    samples = (folder / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return Result(
        seconds, evaluations[-1], parameters, functions[-1] if functions else None, json.loads(samples[-1])["text"]
    )


def run_nanogpt(settings: Settings, folder: Path) -> Result:
    """
    nanoGPT's recipe, with its data made beforehand: that is not part of its time, as it is of Mini's.

    Raises:
        ValueError: if it fails.
    """
    checkout = Path(settings.nanogpt).absolute()
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to(checkout / name)
    held_out = write_nanogpt_data(Path(settings.shakespeare), folder / "data" / "shakespeare_char")
    steps = settings.max_steps or NANOGPT_STEPS
    # Without a first evaluation that counts there is no checkpoint of a trial.
    every = ["--eval_interval=1"] if settings.max_steps is not None else []
    recipe = [*NANOGPT_RECIPE, f"--max_iters={steps}", f"--lr_decay_iters={steps}", *every]
    seconds = run_program(["train.py", *recipe], folder)
    value, parameters = evaluate_nanogpt(checkout, folder / "out-shakespeare-char" / "ckpt.pt", held_out)
    return Result(seconds, value, parameters)


def write_nanogpt_data(text_file: Path, folder: Path) -> np.ndarray:
    """The files that nanoGPT's prepare.py would download and write; gives the ids that are held out."""
    text = text_file.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids_of = {character: number for number, character in enumerate(characters)}
    ids = np.array([ids_of[character] for character in text], dtype=np.uint16)
    train, held_out = np.split(ids, [int(0.9 * len(ids))])
    folder.mkdir(parents=True)
    train.tofile(folder / "train.bin")
    held_out.tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids_of}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return held_out


@torch.no_grad()
def evaluate_nanogpt(checkout: Path, checkpoint: Path, ids: np.ndarray) -> tuple[float, int]:
    """
    Nats per character over all that is held out, in windows of its context, and the parameters. nanoGPT itself
    estimates the loss on random windows.
    """
    module = import_nanogpt(str(checkout))
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(sys.stderr):  # its constructor prints
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict({re.sub(r"^_orig_mod\.", "", name): value for name, value in saved["model"].items()})
    model.eval()
    length, nats = saved["model_args"]["block_size"], 0.0
    tokens = torch.from_numpy(ids.astype(np.int64))
    for start in range(0, len(tokens) - 1, length):
        inputs, targets = tokens[start : start + length], tokens[start + 1 : start + 1 + length]
        logits, _ = model(inputs[None, : len(targets)], targets[None])
        nats += functional.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    return nats / (len(tokens) - 1), sum(parameter.numel() for parameter in model.parameters())


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON. They are written after each seed, for the case that a later one fails."""
    runs: dict[tuple[str, str], list[Result]] = {key: [] for key in contenders(settings)}
    for seed in settings.seeds:
        # In turns: whatever slows the machine for a while slows all of them.
        for (part, name), run in contenders(settings).items():
            with tempfile.TemporaryDirectory(prefix="mini-learning-") as folder:
                result = run(seed, Path(folder))
            runs[part, name].append(result)
            console.print(f"{part}, seed {seed}, {name}: {result.value:.4f} {UNITS[part]}, {result.seconds:.0f} s")
        results = {
            "benchmark": "learning",
            "settings": asdict(settings),
            "machine": machine("cpu"),
            "contenders": [row_of(part, name, of_it) for (part, name), of_it in runs.items()],
        }
        write_results(results, settings)
    return results


def row_of(part: str, name: str, results: list[Result]) -> dict[str, Any]:
    """What the JSON has of one contender."""
    return {
        "part": part,
        "name": name,
        "unit": UNITS[part],
        "goal": GOALS[part],
        "mean": statistics.fmean(result.value for result in results),
        "standard_deviation": statistics.stdev(r.value for r in results) if len(results) > 1 else None,
        "seconds": statistics.fmean(result.seconds for result in results),
        "valid_functions": mean_of_known(result.valid_functions for result in results),
        "parameters": results[0].parameters,
        "runs": [asdict(result) for result in results],
    }


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def show(results: dict[str, Any], settings: Settings) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in ("part", "what"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "loss", "goal", "seconds", "valid"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["contenders"]:
        spread = f" ± {row['standard_deviation']:.3f}" if row["standard_deviation"] is not None else ""
        table.add_row(
            row["part"],
            row["name"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['mean']:.4f}{spread} {row['unit']}",
            f"{row['goal']:.2f}" if row["name"] in ("Mini", "Mini, BPE") else "",
            f"{row['seconds']:.0f}",
            f"{row['valid_functions']:.0%}" if row["valid_functions"] is not None else "",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
