"""Trains a Mini language model: `accelerate launch train_accelerate.py`, or `--help` for every setting."""

import os
import signal
import sys

# Before torch is loaded, which loads OpenMP, which reads it: its threads spin while they wait for each other, so long
# that training crawls where other programs want the cores (docs/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from typing import TYPE_CHECKING

from entry_points_mini import EXIT_INTERRUPTED, EXIT_STOPPED, one_sentence_errors
from training_mini.arguments import Arguments, parse_arguments
from training_mini.data.files import find_files

if TYPE_CHECKING:
    from training_mini.result import TrainingResult


def report(result: "TrainingResult", arguments: Arguments) -> str:
    """What came out, where it lies, and how to go on."""
    from training_mini.monitoring import format_seconds

    run, folder = result.run, result.run.folder
    prompt = "def " if arguments.data.dataset == "python-stdlib" else "The "
    how = "--interactive" if run.corpus.is_chat else f'--prompt "{prompt}"'
    if run.has_own_code:
        how += " --trust_remote_code"
    if result.stopped_by is not None:
        return (
            f"Stopped at step {run.state.step}; everything is in {folder}/checkpoints.\n"
            f"Go on:  python train_accelerate.py --resume --output_dir {folder}"
        )
    baselines = ", ".join(f"{name} -9 {bits:.3f}" for name, bits in run.compressors.items())
    steps = run.state.step
    valid = []
    if result.valid_functions is not None:
        valid = [f"Of 100 functions that it began with 'def ', {100 * result.valid_functions:.0f} are valid Python."]
    early = "" if steps >= run.arguments.optimization.max_steps else " (stopped early: no better for a while)"
    samples = "\n----------------\n".join(result.samples)
    return "\n".join(
        (
            f"\nTrained {steps} steps in {format_seconds(result.seconds)}{early}.",
            f"Bits per byte on {run.held_out_bytes:,} held-out bytes: Mini {result.evaluation.bits_per_byte:.3f}, "
            f"{baselines}.",
            *valid,
            f"\n--- a sample ---\n{samples}\n----------------\n",
            f"Best model   {folder}/best  (step {run.state.best_step})",
            f"Last model   {folder}/final",
            f"Curves       {folder}/curves.png",
            f"Metrics      {folder}/metrics.jsonl",
            *([f"Merged       {folder}/merged"] if arguments.adapter.merge else []),
            f"\nWrite more:  python generate.py --model {folder} {how}",
            f"Train more:  python train_accelerate.py --resume --output_dir {folder} --max_steps {2 * steps}",
        )
    )


def main() -> None:
    with one_sentence_errors():
        arguments = parse_arguments(sys.argv[1:])
        if not arguments.run.resume:  # there, what changed in the settings is said first
            find_files(arguments.data)  # a file that is missing is an error before torch is loaded, which takes seconds
        if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
            print("Loading PyTorch and transformers ...")
        import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
        from training_mini.trainer import train

        result = train(arguments)
        if result.run.accelerator.is_main_process:
            print(report(result, arguments))
        code = 0
        if result.stopped_by is not None:
            code = EXIT_INTERRUPTED if result.stopped_by == signal.SIGINT else EXIT_STOPPED
        if "WORLD_SIZE" in os.environ:
            # All is written, and taking down a process group over gloo hangs or aborts now and then.
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)


if __name__ == "__main__":
    main()
