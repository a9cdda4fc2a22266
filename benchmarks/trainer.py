"""
What the trainer adds to a training step, and how soon a second start takes its first one.

    python benchmarks/trainer.py [--size small] [--train_batch_size 8] [... any flag of train_accelerate.py]

The same model in the same process, in turns: steps of the trainer with its data, its checks, its logging every 10 steps
and its display; and the bare step (forward, backward, clipping, AdamW) on batches that lie ready. Medians over the
turns; the last line is JSON.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import one_sentence_errors
from training_mini.arguments import parse_arguments

if __name__ == "__main__":
    with one_sentence_errors():
        parse_arguments(sys.argv[1:])  # help and mistakes come before torch, which takes seconds to load

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import torch
from torch import nn
from training_mini.data.batches import Batch
from training_mini.trainer import Trainer

TURNS, STEPS = 10, 10


def bare_step(trainer: Trainer, batch: Batch) -> None:
    loss, _ = trainer.loss(batch, batch.targets.numel())
    loss.backward()
    nn.utils.clip_grad_norm_(trainer.run.model.parameters(), 1.0)
    for optimizer in trainer.run.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def trainer_steps(trainer: Trainer) -> None:
    for _ in range(STEPS):
        trainer.stop.agreed()
        trainer.training_step()
    trainer.log()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    with one_sentence_errors(), tempfile.TemporaryDirectory() as folder:
        flags = ["--size", "small", "--train_batch_size", "8", "--max_steps", "100000", *sys.argv[1:]]
        first, second = (parse_arguments([*flags, "--output_dir", f"{folder}/{name}"]) for name in ("first", "second"))
        Trainer(first)  # encodes the corpus, where that was not done before
        started = time.perf_counter()
        trainer = Trainer(second)
        with trainer.stop:
            trainer.begin()
            trainer.training_step()
            synchronize()
            first_step = time.perf_counter() - started
            device = trainer.accelerator.device
            batches = [batch.to(device) for step in range(STEPS) for batch in trainer.run.batches.micro_batches(step)]
            for turn in range(TURNS + 1):
                times = {
                    "trainer": seconds(lambda: trainer_steps(trainer)) / STEPS,
                    "bare": seconds(lambda: [bare_step(trainer, batch) for batch in batches]) / STEPS,
                }
                if turn == 0:
                    results = {name: [] for name in times}  # the first turn warms up
                else:
                    for name, value in times.items():
                        results[name].append(value)
            trainer.monitor.close()
        medians = {name: statistics.median(values) for name, values in results.items()}
        overhead = medians["trainer"] / medians["bare"] - 1
        assert math.isfinite(overhead)
        print(f"trainer {medians['trainer'] * 1e3:.1f} ms a step, bare {medians['bare'] * 1e3:.1f} ms: {overhead:+.1%}")
        print(f"second start: first step done {first_step:.2f} s after the imports")
        print(json.dumps({"benchmark": "trainer", "seconds_per_step": medians, "overhead": overhead,
                          "seconds_to_first_step": first_step, "torch": torch.__version__}))  # fmt: skip


if __name__ == "__main__":
    main()
