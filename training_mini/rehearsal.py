"""Tries steps out before a run begins, for the memory and the time that they take. The run does not change."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator

import torch
from memory_mini import GIB, free_memory
from modeling_mini.analysis.cost import ModelCost

from .build import Run
from .data.batches import Batch
from .memory import memory_of_micro_batch
from .muon import local
from .run_folder import contents

UNTIMED_STEPS = 2  # the first steps are slower: they compile and fill caches
MOST_STEPS = 50
# The allocator of glibc leaves gaps between tensors of less than 32 MiB: peaks were 1.2 to 1.8 times the formula, and
# 1.05 times with larger ones (docs/LOG.md).
GAPS, LARGE_TENSOR = 1.8, 2**25


def find_micro_batches(run: Run, loss: Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]) -> int:
    """
    How many micro-batches the share of a process in a batch is split into, so that one fits into memory beside all that
    is there from the second step on: the states of the optimizers, and the gradients of the micro-batches before it. On
    a CPU, trying too much would kill the process: there a formula says what fits, if the model is Llama-shaped.
    """
    optimization = run.arguments.optimization
    share = optimization.train_batch_size // run.parallel.data_processes
    gradients = bytes_of_gradients(run)

    def try_micro_batches(sequences: int) -> None:
        if memory_on_cpu(run, sequences, gradients if sequences < share else 0) > free_memory():
            raise torch.OutOfMemoryError("The CPU would be out of memory.")
        ids = torch.zeros(sequences, run.config.max_position_embeddings, dtype=torch.long).to(run.accelerator.device)
        for _ in range(min(2, share // sequences)):
            with run.parallel.no_sync(run.model), run.attention():
                with run.autocast():
                    of_batch, _ = loss(Batch({"input_ids": ids}, ids), ids.numel())
                run.accelerator.backward(of_batch)

    count = optimization.gradient_accumulation_steps
    with optimizer_states(run.optimizers):
        return run.parallel.double_until_it_fits(run.model, share, count, try_micro_batches)


def lack_of_memory(run: Run, micro_batches: int) -> str:
    """A sentence for the user if a step on a CPU may need more memory than is free; otherwise it is empty."""
    needed, free = memory_of_step(run, micro_batches), free_memory()
    if needed <= free:
        return ""
    sequences = sequences_at_once(run, micro_batches)
    return (
        f"A step on {sequences:,} x {run.config.max_position_embeddings:,} tokens at once may need "
        f"{needed / GIB:,.1f} GiB of memory beside the model, and {free / GIB:,.1f} are free: if the system ends this "
        f"run without a word, give a smaller train_batch_size or more gradient_accumulation_steps."
    )


def memory_of_step(run: Run, micro_batches: int) -> int:
    """
    Bytes that a step needs, by formula, on the CPUs of a machine beside the weights, from the second step on. What
    compiled blocks would not keep is counted too. 0 where `memory_on_cpu` is 0.

    Args:
        micro_batches: how many the share of a process in a batch is split into.
    """
    # Each of AdamW's two moments is as large as the gradients. A run that is resumed has them already.
    copies = 1 if any(optimizer.state for optimizer in run.optimizers) else 3
    return memory_on_cpu(run, sequences_at_once(run, micro_batches), copies * bytes_of_gradients(run))


def sequences_at_once(run: Run, micro_batches: int) -> int:
    """The sequences of a micro-batch on one process."""
    return run.arguments.optimization.train_batch_size // run.parallel.data_processes // micro_batches


def bytes_of_gradients(run: Run) -> int:
    """The bytes of the gradients of all weights that learn, or of the part of them that is on this process."""
    return sum(local(weight).nbytes for weight in run.unwrapped_model.parameters() if weight.requires_grad)


def memory_on_cpu(run: Run, sequences: int, beside: int = 0) -> int:
    """
    Bytes that the processes of a machine need on CPUs, each for the activations of so many sequences and their
    gradients, with the gaps between them, and `beside`; by formula. 0 on a GPU, which says by itself that its memory is
    full, and for a model that is not Llama-shaped.
    """
    if run.accelerator.device.type != "cpu":
        return 0
    try:
        cost = ModelCost(run.config)
    except ValueError:
        return 0
    dtype = "bfloat16" if run.is_bfloat16 else "float32"
    needed = memory_of_micro_batch(cost, run.arguments, sequences, dtype)
    hidden_states = sequences * run.config.max_position_embeddings * cost.hidden_size * torch.float32.itemsize
    if hidden_states < LARGE_TENSOR:
        needed = int(GAPS * needed)
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (needed + beside)


def try_first_step(run: Run, forward_and_backward: Callable[[int], object]) -> None:
    """
    Computes both passes on the first batch beside the states of the optimizers, if there is a run that this one would
    replace: a model, a compiler or a GPU that fails in them is to do so before anything is removed.
    """
    is_to_replace = run.parallel.from_main(bool(contents(run.folder)))
    if not is_to_replace or run.parallel.is_deepspeed:  # where a backward pass is a step as well
        return
    with optimizer_states(run.optimizers):
        forward_and_backward(0)
        for optimizer in run.optimizers:
            optimizer.zero_grad()


def seconds_of_step(run: Run, forward_and_backward: Callable[[int], object], seconds: float) -> float:
    """The time of a step, from steps on the first batch for about so many seconds."""
    with without_learning(run.optimizers):
        for number in itertools.count(1 - UNTIMED_STEPS):
            forward_and_backward(0)
            rehearse_step(run.optimizers)
            if run.accelerator.device.type == "cuda":
                torch.cuda.synchronize()  # the GPU may not have finished yet
            if number == 0:
                began = time.monotonic()
            elif number > 0:
                passed = time.monotonic() - began
                # The main process decides when all stop, so that every process does the same number of steps.
                if run.parallel.from_main(passed >= seconds or number == MOST_STEPS):
                    return passed / number


@contextlib.contextmanager
def optimizer_states(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Within the context, the optimizers have the states that their first step makes, if they have none yet."""
    if any(optimizer.state for optimizer in optimizers):  # of a checkpoint
        yield
        return
    with without_learning(optimizers):
        for parameter in parameters_of(optimizers):
            parameter.grad = torch.zeros_like(parameter)
        rehearse_step(optimizers)
        yield


@contextlib.contextmanager
def without_learning(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Within the context, steps by `rehearse_step` change no weight. After it, the optimizers have no state."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for optimizer in optimizers:
        optimizer.state.clear()


def rehearse_step(optimizers: list[torch.optim.Optimizer]) -> None:
    """
    A step with gradients of zero, which takes as long as any other. A gradient that is NaN would make the weights NaN,
    at a learning rate of 0 too.
    """
    gradients = [parameter.grad for parameter in parameters_of(optimizers) if parameter.grad is not None]
    for gradient in gradients:
        gradient.zero_()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]
