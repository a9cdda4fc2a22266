"""
What docs/SCALING.md computes with: how fast one process encodes, reads and streams a corpus and writes a checkpoint.

    python benchmarks/scaling.py [--megabytes 200] [--bpe_megabytes 20] [--bpe_entries 8000] [--size gpt2]
        [--steps 8] [--rounds 3] [--output FILE]

The text is Python's own standard library, repeated. Each figure is the best of the rounds, because the disk and its
cache have moods; reading is from the page cache. The last line is JSON.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, machine, run_benchmark, settings_of  # isort: skip

WINDOWS, CONTEXT = 512, 1024


@dataclass
class ScalingSettings(OutputSettings):
    """How much to measure with."""

    megabytes: int = option(200, "text to encode as bytes, to read and to stream", at_least=1)
    bpe_megabytes: int = option(20, "text to encode as BPE", at_least=1)
    bpe_entries: int = option(8000, "entries of that BPE, which are learned first", at_least=264)
    size: str = option("gpt2", "the model whose checkpoint is written")
    steps: int = option(8, "training steps beside which a checkpoint is written", at_least=1)
    rounds: int = option(3, "measure so many times and take the best", at_least=1)


if __name__ == "__main__":
    SETTINGS = settings_of(ScalingSettings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
from tokenization import ByteTokenizer
from training_mini.arguments import DataArguments, parse_arguments
from training_mini.checkpoints import damage_of, states_of
from training_mini.data.batches import Collator, TrainingBatches
from training_mini.data.corpus import load_corpus
from training_mini.data.packages import standard_library_files
from training_mini.data.streaming import StreamBatches
from training_mini.evaluation import compressor_bits_per_byte
from training_mini.trainer import Trainer


def best_seconds(rounds: int, action: Callable[[Path], object]) -> float:
    """The shortest time of an action, which gets an empty folder each time."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            action(Path(folder))
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_text(path: Path, sources: list[str], megabytes: int, form: Callable[[str], str]) -> None:
    """The sources, again and again, up to so many megabytes of text; `form` is what is written of each."""
    left = megabytes * 10**6
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            for source in sources:
                file.write(form(source))
                left -= len(source.encode())
                if left <= 0:
                    break


def save_bpe(folder: Path, sources: list[str], entries: int) -> None:
    ByteTokenizer().train_new_from_iterator(sources, entries).save_pretrained(folder)


def corpus_of(dataset: Path, cache: Path, **settings: Any):
    return load_corpus(DataArguments(dataset=str(dataset), cache_dir=str(cache), **settings), 10**6, False)


def measure_data(settings: ScalingSettings, folder: Path) -> dict[str, float]:
    rounds = settings.rounds
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library_files()]
    text, some, records, bpe = (folder / name for name in ("text.txt", "some.txt", "text.jsonl", "bpe"))
    write_text(text, sources, settings.megabytes, str)
    write_text(some, sources, settings.bpe_megabytes, str)
    write_text(records, sources, settings.megabytes, lambda source: json.dumps({"text": source}) + "\n")
    save_bpe(bpe, sources[: len(sources) // 4], settings.bpe_entries)

    as_bytes = best_seconds(rounds, lambda cache: corpus_of(text, cache))
    as_bpe = best_seconds(rounds, lambda cache: corpus_of(some, cache, tokenizer=str(bpe)))
    encoded = corpus_of(some, folder / "cache", tokenizer=str(bpe))
    bpe_tokens = len(encoded.train) + len(encoded.validation)

    corpus = corpus_of(text, folder / "cache")
    batches = TrainingBatches(corpus.train, Collator(CONTEXT, bos_token_id=1), WINDOWS, seed=0)
    steps = max(1, len(corpus.train) // (WINDOWS * CONTEXT))
    reading = best_seconds(rounds, lambda _: [list(batches.micro_batches(step)) for step in range(steps)])

    def stream(cache: Path) -> None:
        ids = corpus_of(records, cache, streaming=True).train
        batches = StreamBatches(ids, Collator(CONTEXT, bos_token_id=1), WINDOWS, seed=0)
        for step in range(steps):
            list(batches.micro_batches(step))

    held_out = some.read_bytes()[: 10**7]
    compressing = best_seconds(rounds, lambda _: compressor_bits_per_byte(held_out))
    return {
        "encoding_bytes_megabytes_per_second": text.stat().st_size / as_bytes / 1e6,
        "encoding_bpe_megabytes_per_second": some.stat().st_size / as_bpe / 1e6,
        "bytes_per_bpe_token": some.stat().st_size / bpe_tokens,
        "compressing_megabytes_per_second": len(held_out) / compressing / 1e6,
        "reading_tokens_per_second": steps * WINDOWS * CONTEXT / reading,
        "streaming_tokens_per_second": steps * WINDOWS * CONTEXT / best_seconds(rounds, stream),
    }


def measure_checkpoint(settings: ScalingSettings, folder: Path) -> dict[str, float]:
    flags = f"--dataset sample --size {settings.size} --train_batch_size 1 --max_steps 1000".split()
    trainer = Trainer(parse_arguments([*flags, "--output_dir", str(folder / "run")]))
    with trainer.stop, contextlib.closing(trainer.monitor), contextlib.closing(trainer.saving.writer):
        trainer.begin()
        trainer.training_step()  # the moments exist from the first step on
        writing, checking = [], []
        for _ in range(settings.rounds):
            start = time.perf_counter()
            trainer.saving.save()
            writing.append(time.perf_counter() - start)
            (state,) = states_of(folder / "run")
            start = time.perf_counter()
            assert damage_of(state) == ""
            checking.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in state.iterdir())
        lost = steps_lost(trainer, settings)
    return {
        "checkpoint_bytes": size,
        "checkpoint_bytes_per_parameter": size / trainer.run.unwrapped_model.num_parameters(),
        "checkpoint_seconds": min(writing),
        "checkpoint_check_seconds": min(checking),
        **lost,
    }


def steps_lost(trainer: Trainer, settings: ScalingSettings) -> dict[str, float]:
    """
    How many training steps a checkpoint costs: the time of some steps with one, less that of as many without, in steps.
    If a checkpoint in the background takes longer than the steps, the rest of its time counts too. Medians over turns.
    """
    seconds: dict[str, list[float]] = {"without": [], "waiting": [], "in_background": []}
    for turn in range(settings.rounds + 1):  # the first turn warms up
        for how, times in seconds.items():
            start = time.perf_counter()
            if how != "without":
                trainer.saving.save(in_background=how == "in_background")
            for _ in range(settings.steps):
                trainer.training_step()
            trainer.saving.complete()
            times += [time.perf_counter() - start] * (turn > 0)
    medians = {how: statistics.median(times) for how, times in seconds.items()}
    step = medians["without"] / settings.steps
    lost = {how: (medians[how] - medians["without"]) / step for how in ("waiting", "in_background")}
    return {"step_seconds": step, **{f"steps_lost_{how}": steps for how, steps in lost.items()}}


def measure(settings: ScalingSettings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = measure_data(settings, Path(folder))
        return {**data, **measure_checkpoint(settings, Path(folder)), "machine": machine("cpu")}


def show(results: dict[str, Any], settings: ScalingSettings) -> None:
    table = Table("", "", title="One process", show_header=False)
    for name, value in results.items():
        if name != "machine":
            table.add_row(name.replace("_", " "), f"{value:,.2f}" if value < 1000 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
