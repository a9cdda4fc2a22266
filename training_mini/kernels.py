"""Chooses what a training step is computed with: precision, libraries and attention on a CPU, and what is compiled."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable

import torch
from configuration_mini import MiniConfig
from installation_mini import processor_name
from modeling_mini.native_code import check_compiler
from torch import nn

from .build import Run
from .cpu_attention import BLOCKS, FUSED, NATIVE, fastest_attention
from .cpu_kernels import SMALLEST_STEP, bfloat16_is_faster, flops_of_step, has_bfloat16, measure_products, use_products
from .data.corpus import ExampleCorpus
from .muon import Muon
from .native_attention import attention_library

# From so many FLOPs on, which are about 100 seconds of a CPU, compiling saves more time than it takes.
LONG_RUN = {torch.float32: 5e12, torch.bfloat16: 1e13}


def choose_kernels(run: Run) -> None:
    """
    Chooses what a CPU computes with: the library of each matrix product, bfloat16 or float32, the attention, compiled
    or not. A run that is resumed keeps its choice, so that it goes on with the same bits, except for what its present
    settings, device or processes rule out.
    """
    accelerator, state, optimization = run.accelerator, run.state, run.arguments.optimization
    if accelerator.device.type != "cpu" or run.parallel.tensor_size > 1:
        state.is_bfloat16, state.attention, state.is_compiled = False, FUSED, False
        return
    here = processor_name()
    if not state.processor:
        sequences = optimization.train_batch_size // run.parallel.data_processes
        sequences //= optimization.gradient_accumulation_steps
        choice = measured_choice(run, sequences) if accelerator.is_main_process else None
        choice = run.parallel.from_main(choice)
        state.products, state.is_bfloat16, state.attention, state.is_compiled = choice
        state.processor = run.parallel.from_main(here)
    elif state.processor != here:
        run.problems.append(
            f"This run began on another processor ({state.processor}): from here on, its losses are equal up to "
            "rounding, not bit by bit."
        )
    if run.parallel.anyone(state.is_bfloat16 and state.processor != here and not has_bfloat16()):
        run.problems.append(
            "This run computes in float32 from here on: bfloat16 is many times as slow on a processor without "
            "instructions for it."
        )
        state.is_bfloat16 = False
    if state.attention == NATIVE and run.parallel.anyone(not has_native_attention()):
        run.problems.append(
            "Attention in C++ cannot be compiled here. It is computed in blocks from here on, which is slower, and "
            "losses are equal up to rounding."
        )
        state.attention = BLOCKS
    state.is_bfloat16 = state.is_bfloat16 and may_be_bfloat16(run)
    state.is_compiled = state.is_compiled and may_be_compiled(run)
    if accelerator.mixed_precision == "no":
        use_products(run.unwrapped_model, state.products)
    for optimizer in run.optimizers:
        if state.is_bfloat16 and isinstance(optimizer, Muon) and optimizer.dtype is None:
            optimizer.dtype = torch.bfloat16


def measured_choice(run: Run, sequences: int) -> tuple[dict[str, list[str]], bool, str, bool]:
    """
    `products`, `is_bfloat16`, `attention` and `is_compiled` of `TrainerState` for this processor.

    Args:
        sequences: those of a micro-batch of one process.
    """
    model, tokens = run.unwrapped_model, sequences * run.config.max_position_embeddings
    is_told_bfloat16 = run.accelerator.mixed_precision == "bf16"
    products = {} if is_told_bfloat16 else measure_products(model, tokens)
    is_bfloat16 = may_be_bfloat16(run) and bfloat16_is_faster(model, tokens, products)
    dtype = torch.bfloat16 if is_bfloat16 or is_told_bfloat16 else torch.float32
    attention = FUSED
    if flops_of_step(model, tokens) >= SMALLEST_STEP:
        is_for_native = dtype == torch.float32 and compiling_pays(run, tokens, dtype) and has_native_attention()
        attention = fastest_attention(run.config, sequences, dtype, [BLOCKS, *([NATIVE] if is_for_native else [])])
    is_compiled = may_be_compiled(run) and blocks_have_one_shape(run) and compiling_pays(run, tokens, dtype)
    return {} if is_bfloat16 else products, is_bfloat16, attention, is_compiled


def is_plain(run: Run) -> bool:
    """Whether the weights are neither sharded nor quantized: such weights have types of their own."""
    is_quantized = getattr(run.unwrapped_model, "is_quantized", False)
    return not (run.parallel.is_sharded or run.parallel.is_deepspeed or is_quantized)


def may_be_bfloat16(run: Run) -> bool:
    """Whether Mini may choose bfloat16 by itself. Where the user asked for it, accelerate does it."""
    return is_plain(run) and run.arguments.run.bf16 is None and run.accelerator.mixed_precision == "no"


def may_be_compiled(run: Run) -> bool:
    """Whether Mini may compile the blocks by itself."""
    settings = run.arguments.run
    is_left_to_mini = settings.torch_compile is None and not settings.gradient_checkpointing
    return is_plain(run) and run.accelerator.num_processes == 1 and is_left_to_mini and not run.has_own_code


def blocks_have_one_shape(run: Run) -> bool:
    """Whether there are blocks, and one compilation of them serves the whole run."""
    has_one_shape = not isinstance(run.corpus, ExampleCorpus) and run.arguments.optimization.dropout_start is None
    return has_one_shape and bool(run.blocks)


def compiling_pays(run: Run, tokens: int, dtype: torch.dtype) -> bool:
    """Whether there is a compiler, and it saves more time than it takes, with so many tokens in a micro-batch."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return False
    optimization = run.arguments.optimization
    if optimization.max_minutes is not None:
        return optimization.max_minutes >= 2
    micro_batches = optimization.gradient_accumulation_steps
    return optimization.max_steps * micro_batches * flops_of_step(run.unwrapped_model, tokens) >= LONG_RUN[dtype]


def has_native_attention() -> bool:
    """Whether attention in C++ has been compiled on this machine, or can be."""
    try:
        attention_library()
    except (RuntimeError, OSError):
        return False
    return True


def compile_model(run: Run, try_step: Callable[[], object]) -> None:
    """
    Compiles the model in place: whole or one of its equal blocks for all of them if that was asked for, and the blocks
    if that was chosen for a CPU.

    Args:
        try_step: computes both passes on a batch.

    Raises:
        ValueError: if it was asked for and fails on a CPU.
    """
    settings = run.arguments.run
    if not (settings.torch_compile or run.state.is_compiled):
        return
    torch.compiler.reset()  # torch compiles a function for 8 shapes in a process, and says little of the others
    if settings.compile_regions or run.state.is_compiled:
        for block in run.blocks:
            block.compile()
    else:
        run.model.compile()
    if run.accelerator.device.type != "cpu" or not (reason := failure_of(run, lambda: (check_compiler(), try_step()))):
        return
    if settings.torch_compile:
        raise ValueError(f"--torch_compile fails here, so leave it out: {reason}")
    run.problems.append(f"The blocks of the model are not compiled, so training is slower: {reason}")
    run.state.is_compiled = False
    uncompile(run.blocks)


def check_choice(run: Run, try_step: Callable[[], object]) -> None:
    """
    Takes back bfloat16 and the chosen attention where a model of another class fails with them, such as one that adds
    float32 to what autocast has made bfloat16. Every process calls it, before anything is compiled.

    Args:
        try_step: computes both passes on a batch.
    """
    state = run.state
    is_to_try = (state.is_bfloat16 or state.attention != FUSED) and is_plain(run)
    if not is_to_try or state.step > 0 or run.config.model_type == MiniConfig.model_type:
        return
    if reason := failure_of(run, try_step):
        run.problems.append(f"The model trains in float32 and with its own attention, which is slower: {reason}")
        state.is_bfloat16, state.attention = False, FUSED
        for optimizer in run.optimizers:
            if isinstance(optimizer, Muon) and run.arguments.optimization.muon_dtype is None:
                optimizer.dtype = None


def failure_of(run: Run, try_step: Callable[[], object]) -> str:
    """
    Why a step fails, in a line, or an empty string. What Mini chose by itself is tried by it, so that its choice does
    not end a run.
    """
    reason = ""
    try:
        try_step()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    return next(filter(None, run.parallel.gather(reason)), "")


def uncompile(modules: Iterable[nn.Module]) -> None:
    """Takes back `compile`; torch has no other way."""
    for module in modules:
        module._compiled_call_impl = None


def restore_model(run: Run) -> None:
    """
    Undoes what only training needs: the choice of products, autocast and compilation. The model may be an object of the
    caller, who goes on with it, and may train it again with other settings.
    """
    model = run.unwrapped_model
    use_products(model, {})
    if run.arguments.run.torch_compile or run.state.is_compiled:
        uncompile([run.model, *run.blocks])
    # Not `unwrap_model` of accelerate, which takes off the decorators of the class as well.
    forward = vars(model).pop("_original_forward", None)
    if forward is not None and not run.parallel.is_deepspeed:
        del model.forward
        if forward != model.forward:  # there was one before
            model.forward = forward
