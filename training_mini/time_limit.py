"""
Computes how many steps fit into `--max_minutes`, and fixes their number, so that schedules end when the time ends, and
a resume is exact.
"""

import bisect
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from .arguments import Arguments
from .build import Run
from .evaluation import evaluate
from .rehearsal import seconds_of_step
from .sampling import LONGEST_FUNCTION, share_of_valid_functions, write_samples

REHEARSED_SHARE = 0.03  # the share of the time that is used to time steps
EVALUATED_BATCHES = 3
SAMPLED_TOKENS = 16
WRITTEN_BYTES_PER_SECOND = 100e6  # of a slow disk, with flushing
SECONDS_OF_A_FOLDER = 0.5  # to write the small files of a checkpoint or a model
SECONDS_OF_CURVES = 1.0
RESERVE = 0.05  # the share of the time left that is kept free, because steps differ


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    step: float
    evaluation: float
    checkpoint: float
    model_folder: float
    samples: float
    functions: float = 0.0

    def of(self, steps: int, arguments: Arguments) -> float:
        """The seconds for so many steps, with all evaluations, samples and writes between them and at the end."""
        monitoring, save_steps = arguments.monitoring, arguments.run.save_steps
        evaluations = 1 + (steps - 1) // monitoring.eval_steps
        checkpoints = 1 + (steps - 1) // save_steps
        every = monitoring.steps_between_samples
        sampled = 1 + ((steps - 1) // every if every else 0)
        # Each evaluation may write a best model; at the end there are the last model and perhaps a merged one.
        folders = evaluations + 1 + arguments.adapter.merge
        return (
            steps * self.step
            + evaluations * (self.evaluation + SECONDS_OF_CURVES)
            + checkpoints * self.checkpoint
            + folders * self.model_folder
            + sampled * self.samples
            + self.functions
        )


def steps_that_fit(seconds: float, costs: Costs, arguments: Arguments) -> int:
    """The largest number of steps that fit into so many seconds, with all that `Costs.of` counts; may be 0."""
    most = max(0, math.floor(seconds / costs.step))
    return bisect.bisect_right(range(1, most + 1), seconds, key=lambda steps: costs.of(steps, arguments))


def fix_max_steps(
    run: Run, forward_and_backward: Callable[[int], object], micro_batches: int, started: float
) -> tuple[Arguments, str]:
    """
    The settings of a run with the number of steps that fit into `max_minutes`, and a line for the user. Every process
    calls it, and the main process decides.

    Args:
        forward_and_backward: computes both passes on the batch of a step.
        started: the time at which the run began, from `time.monotonic`.

    Raises:
        ValueError: if there is no time for a single step.
    """
    arguments, minutes = run.arguments, run.arguments.optimization.max_minutes
    costs = measure(run, forward_and_backward, micro_batches, REHEARSED_SHARE * 60 * minutes)
    gone = time.monotonic() - started
    steps = steps_that_fit((1 - RESERVE) * (60 * minutes - gone), costs, arguments)
    steps, costs, gone = run.parallel.from_main((steps, costs, gone))
    if steps < 1:
        needed = (gone + costs.of(1, arguments)) / (1 - RESERVE) / 60
        raise ValueError(
            f"max_minutes ({minutes:g}) is too short for one step: start, evaluation and saving alone take about "
            f"{needed:.2g} minutes here."
        )
    line = f"{minutes:g} minutes are enough for {steps:,} steps of {costs.step:.3g} s, with evaluation and saving."
    return arguments.with_max_steps(steps), line


def measure(run: Run, forward_and_backward: Callable[[int], object], micro_batches: int, seconds: float) -> Costs:
    """Times the parts of a run on its own data; steps for about so many seconds. The run does not change."""
    accelerator, arguments = run.accelerator, run.arguments
    step = seconds_of_step(run, forward_and_backward, seconds)
    # Only the first batches of an evaluation are timed.
    processes, tensor_size = run.parallel.data_processes, run.parallel.tensor_size
    batch_size = arguments.optimization.train_batch_size // micro_batches
    share = max(1, batch_size // processes)
    turns = max(len(run.held_out.groups(process, processes, share)) for process in range(processes))
    asked = itertools.count(1)
    began = time.monotonic()

    def should_stop() -> bool:
        return next(asked) > EVALUATED_BATCHES

    with run.uncompiled():
        evaluate(run.model, run.held_out, batch_size, accelerator, should_stop, tensor_size)
    evaluation = (time.monotonic() - began) * max(1.0, turns / EVALUATED_BATCHES)
    # Only the first tokens of the first sample are timed.
    began, samples, functions = time.monotonic(), 0.0, 0.0
    with run.full_model() as model:
        if model is not None:
            prompts = run.corpus.make_prompts(run.held_out, arguments.monitoring.sample_prompts)
            whole = run.config.max_position_embeddings
            length = min(whole, len(prompts[0][1]) + SAMPLED_TOKENS)
            write_samples(model, run.corpus, prompts[:1], length, arguments.run.seed)
            samples = (time.monotonic() - began) * len(prompts) * max(1.0, whole / SAMPLED_TOKENS)
            if run.corpus.is_python:
                began = time.monotonic()
                share_of_valid_functions(model, run.corpus.tokenizer, max_new_tokens=SAMPLED_TOKENS)
                functions = (time.monotonic() - began) * min(whole, LONGEST_FUNCTION) / SAMPLED_TOKENS
    size = 4 * run.unwrapped_model.num_parameters()
    folder = SECONDS_OF_A_FOLDER + size / WRITTEN_BYTES_PER_SECOND
    # A checkpoint has the weights and two moments for each of them.
    checkpoint = SECONDS_OF_A_FOLDER + 3 * size / WRITTEN_BYTES_PER_SECOND
    return Costs(step, evaluation, checkpoint, folder, samples, functions)
