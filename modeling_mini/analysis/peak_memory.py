"""Measures the memory that inference and training take at their peak, beside the formulas of cost.py."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .cost import DTYPES, check_sizes


class PeakMemory:
    """
    A context that measures the peak of the memory that tensors need. On a GPU it asks the allocator. On a CPU it
    follows each tensor from the operation that makes it until it is freed, which misses memory that a kernel uses
    internally.

    Args:
        model, optimizers: their tensors exist already, and are counted.
    """

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.device = next(model.parameters()).device
        self.tracker = None
        if self.device.type != "cuda":
            # Not at the top: a build of torch without torch.distributed lacks it, and only measuring needs it.
            from torch.distributed._tools.mem_tracker import MemTracker

            self.tracker = MemTracker()
            self.tracker.track_external(model, *optimizers)

    def __enter__(self) -> "PeakMemory":
        if self.tracker is not None:
            self.tracker.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.tracker is not None:
            self.tracker.__exit__(*exception)

    @property
    def peak(self) -> int:
        """Bytes."""
        if self.tracker is None:
            return torch.cuda.max_memory_allocated(self.device)
        return self.tracker.get_tracker_snapshot("peak")[self.device]["Total"]


def measure_inference_memory(config: PreTrainedConfig, batch_size: int, length: int, dtype: str = "float32") -> int:
    """
    The peak in bytes while a model of this configuration, with random weights, reads `batch_size` prompts of `length`
    tokens into its cache, on the GPU if there is one. The counterpart of `InferenceMemory.total`.

    Raises:
        ValueError: if a size is below 1 or `dtype` is not one of `DTYPES`.
    """
    check_sizes(batch_size, length, dtype)
    model = make_model(config).to(DTYPES[dtype]).eval()
    input_ids = torch.zeros(batch_size, length, dtype=torch.long, device=model.device)
    with torch.no_grad(), PeakMemory(model) as memory:
        model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
    return memory.peak


def measure_training_memory(
    config: PreTrainedConfig,
    batch_size: int,
    length: int,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> int:
    """
    The peak in bytes of a training step of a model of this configuration, with random weights, on the GPU if there is
    one. The counterpart of `TrainingMemory.total`: the gradients of a first batch are there while the second runs.

    Raises:
        ValueError: if a size is below 1 or `dtype` is not one of `DTYPES`.
    """
    check_sizes(batch_size, length, dtype)
    model = make_model(config).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    input_ids = torch.zeros(batch_size, length, dtype=torch.long, device=model.device)

    def backward() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype != "float32"):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()

    backward()
    optimizer.step()  # makes the moments
    with PeakMemory(model, optimizer) as memory:
        backward()
        optimizer.step()
    return memory.peak


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A float32 model with random weights and fused attention, on the GPU if there is one."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
