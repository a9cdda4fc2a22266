"""
Whether a step fits into the memory of a machine. A GPU says by itself that its memory is full; on a CPU, the kernel
kills a process that needs more than there is, and nothing is said.
"""

import os

import torch
from memory_mini import GIB, total_memory
from modeling_mini.analysis.cost import ModelCost
from transformers import PreTrainedConfig

from .arguments import Arguments
from .distributed import Parallel

# Compiled blocks in bfloat16 keep less for the backward pass than `ModelCost` counts for what is not compiled.
CERTAIN_SHARE = 1 / 3


def check_memory(arguments: Arguments, parallel: Parallel, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if a step on a CPU needs more memory than the machine has, whatever is chosen to compute it with, on
            sequences of the full context. With `find_batch_size`, for the smallest micro-batch.
    """
    if parallel.accelerator.device.type != "cpu":
        return
    optimization = arguments.optimization
    sequences = optimization.train_batch_size // parallel.data_processes // optimization.gradient_accumulation_steps
    if optimization.find_batch_size:
        sequences //= sequences & -sequences  # halved as often as that goes
    needed, there = least_memory(arguments, parallel, config, sequences), total_memory()
    if needed > there:
        tokens = f"{sequences:,} x {config.max_position_embeddings:,} tokens"
        raise ValueError(
            f"A step on {tokens} at once needs at least {needed / GIB:,.0f} GiB of memory, and this machine has "
            f"{there / GIB:,.0f}: give a smaller train_batch_size, max_position_embeddings or size, or more "
            f"gradient_accumulation_steps."
        )


def least_memory(arguments: Arguments, parallel: Parallel, config: PreTrainedConfig, sequences: int) -> float:
    """
    Bytes that the processes of a machine need at least for a micro-batch of so many sequences each: the weights, a
    moment for each, and the larger of their gradients and `CERTAIN_SHARE` of what is kept for them. 0 for a model that
    is not Llama-shaped.
    """
    try:
        cost = ModelCost(config)
    except ValueError:
        return 0
    memory = memory_of_micro_batch(cost, arguments, sequences, "bfloat16")
    kept, weights = CERTAIN_SHARE * memory, cost.num_parameters * torch.float32.itemsize
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if arguments.adapter.lora_r:  # the weights may be quantized, and have no gradients
        return processes * kept
    if parallel.is_sharded or parallel.is_deepspeed:
        weights /= parallel.accelerator.num_processes
    return processes * (2 * weights + max(weights, kept))


def memory_of_micro_batch(cost: ModelCost, arguments: Arguments, sequences: int, dtype: str) -> int:
    """Bytes of activations and their gradients for sequences of the full context."""
    length, checkpointing = cost.config.max_position_embeddings, arguments.run.gradient_checkpointing
    memory = cost.training_memory(sequences, length, dtype, checkpointing)
    return memory.activations + memory.working
