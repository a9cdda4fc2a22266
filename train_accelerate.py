"""Trains a Mini language model: `accelerate launch train_accelerate.py`, or `--help all` for every setting."""

import contextlib
import os
import shlex
import signal
import sys
import textwrap

# OpenMP's threads spin while they wait for each other, by default so long that training crawls where other programs
# want the cores (docs/LOG.md). It reads the variable when torch loads it, so this stands before the imports.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from typing import TYPE_CHECKING

from entry_points_mini import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    command_of,
    one_sentence_errors,
    without_garbage_collection,
)
from training_mini.arguments import Arguments, after_restart, parse_arguments
from training_mini.data.files import find_files
from training_mini.processes import check_count, start_processes

if TYPE_CHECKING:
    from training_mini.result import TrainingResult

# A process that was started again cannot know whether an earlier start has written the run.
KEPT_AT_RESTART = (
    "The run in {folder!r} has the same settings and goes on: where torchrun restarts processes, --overwrite replaces "
    "a run of other settings only. To begin anew, remove the folder first."
)


def report(result: "TrainingResult", arguments: Arguments) -> str:
    """What came out, where it lies, and how to go on. The commands work as they stand, in the folder of the user."""
    from training_mini.data.corpus import python_prompt
    from training_mini.monitoring import BITS_PER_BYTE, console, format_seconds

    run, folder = result.run, shlex.quote(str(result.run.folder))

    def path(name: str) -> str:
        return shlex.quote(str(run.folder / name))

    prompt = run.corpus.make_prompts(run.held_out, arguments.monitoring.sample_prompts)[0][0]
    how = "--interactive" if run.corpus.is_chat else f"--prompt {shlex.quote(prompt)}"
    if run.has_own_code:
        how += " --trust_remote_code"
    write = f"{command_of('generate.py')} --model {folder} {how}"
    go_on = f"{command_of('train_accelerate.py')} --resume --output_dir {folder}"
    steps, most = run.state.step, run.arguments.optimization.max_steps
    if result.stopped_by is not None:
        where = f"Stopped at step {steps}; everything is in {path('checkpoints')}."
        return f"{where}\nGo on:       {go_on}\nWrite:       {write}"
    baselines = ", ".join(f"{name} -9 {bits:.3f}" for name, bits in run.compressors.items())
    bits_per_byte = f"Mini {result.evaluation.bits_per_byte:.3f}, {baselines}"
    sentences = [f"Bits per byte on {run.held_out_bytes:,} held-out bytes: {bits_per_byte}.", f"({BITS_PER_BYTE})"]
    if result.valid_functions is not None:
        valid = round(100 * result.valid_functions)
        beginning = python_prompt(run.corpus.tokenizer)
        sentences.append(f"Of 100 functions that it began with {beginning!r}, {valid} are valid Python.")
    time = f" in {format_seconds(result.seconds)}"
    if result.start_step:
        new = steps - result.start_step
        time = f", the last {new}{time}" if new else f" before, and none now: max_steps is {most}"
    width = console.width if console.is_terminal else sys.maxsize  # lines break between words
    early = "" if steps >= most else " (stopped early: no better for a while)"
    samples = "\n----------------\n".join(result.samples)
    return "\n".join(
        (
            f"\nTrained {steps} steps{time}{early}.",
            *(textwrap.fill(sentence, width) for sentence in sentences),
            f"\n--- a sample ---\n{samples}\n----------------\n",
            f"Best model   {path('best')}  (step {run.state.best_step})",
            f"Last model   {path('final')}",
            f"Curves       {path('curves.png')}",
            f"Metrics      {path('metrics.jsonl')}",
            *([f"Merged       {path('merged')}"] if arguments.adapter.merge else []),
            f"\nWrite more:  {write}",
            f"Train more:  {go_on} --max_steps {2 * steps}",
        )
    )


def hear_ctrl_c() -> None:
    """
    Lets Ctrl-C end this process where a shell has told its launcher to ignore it (`trap '' INT`), so that the launcher
    prints no traceback: this process inherits that, and the terminal belongs to it all the same.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(OSError):  # standard input is no terminal, or that of another session
            if os.tcgetpgrp(0) == os.getpgrp():  # a job in the background goes on ignoring it
                signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    hear_ctrl_c()
    with one_sentence_errors():
        given = parse_arguments(sys.argv[1:])
        arguments = after_restart(given, sys.argv[1:])
        if given.run.overwrite and arguments.run.resume and os.environ.get("RANK", "0") == "0":
            print(KEPT_AT_RESTART.format(folder=str(arguments.output_dir)), flush=True)
        check_count(count := arguments.run.num_processes)
        if count > 1 and "WORLD_SIZE" not in os.environ:
            sys.exit(start_processes(count, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]]))
        if not arguments.run.resume:  # there, what changed in the settings is said first
            find_files(arguments.data)  # a file that is missing is an error before torch is loaded, which takes seconds
        if os.environ.get("RANK", "0") == "0":
            print("Loading PyTorch and transformers ...", flush=True)
        with without_garbage_collection():
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
