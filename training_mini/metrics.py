"""Measures a training run: loss and speed between two log lines, attention and activations, MFU and memory."""

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping

import psutil
import torch
from accelerate import Accelerator
from modeling_mini.analysis.activations import as_metrics, record_activations, record_update
from modeling_mini.analysis.attention import summarize_attention
from modeling_mini.analysis.cost import ModelCost
from torch import nn
from transformers import PreTrainedModel

from .build import Run
from .evaluation import perplexity_of
from .hooks import Metric


class LogWindow:
    """
    The sums over the steps between two log lines.

    Args:
        tokens_per_step: the tokens of a global batch.
        tokens_per_byte: those of the held-out text. They turn nats per token into bits per byte.
        flops_per_token: the FLOPs of forward and backward pass, for MFU.
        peak_flops: the largest FLOP/s of one device, for MFU; with `None` there is no MFU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens_per_step: int,
        tokens_per_byte: float,
        flops_per_token: float | None,
        peak_flops: float | None,
    ) -> None:
        self.accelerator, self.tokens_per_step, self.tokens_per_byte = accelerator, tokens_per_step, tokens_per_byte
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        # It stays on the device: to read it is to wait for the device.
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.steps = self.counted_steps = self.clipped_steps = 0
        self.grad_norm = math.nan  # of the last step
        self.began = time.monotonic()

    def add_step(self, cross_entropy: torch.Tensor, grad_norm: float, max_norm: float) -> None:
        """Adds a step: this process's share of its loss, and the norm of its gradients before clipping."""
        self.steps += 1
        self.grad_norm = grad_norm
        if math.isfinite(grad_norm):  # else the step was skipped
            self.loss_sum += cross_entropy
            self.counted_steps += 1
            self.clipped_steps += grad_norm > max_norm

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time within the context is not counted in tokens per second."""
        start = time.monotonic()
        yield
        self.began += time.monotonic() - start

    def restart(self) -> None:
        """Begins the next window."""
        self.loss_sum.zero_()
        self.steps = self.counted_steps = self.clipped_steps = 0
        self.began = time.monotonic()

    def metrics(self) -> dict[str, float]:
        """The mean loss over all processes, and the speed. Every process calls it. Skipped steps have no loss."""
        metrics: dict[str, float] = {}
        loss_sum = self.accelerator.reduce(self.loss_sum, reduction="mean").item()
        if self.counted_steps:
            loss = loss_sum / self.counted_steps
            metrics["loss"] = loss
            metrics["perplexity"] = perplexity_of(loss)
            metrics["bits_per_byte"] = loss / math.log(2) * self.tokens_per_byte
            metrics["clipped_share"] = self.clipped_steps / self.counted_steps
        if math.isfinite(self.grad_norm):
            metrics["grad_norm"] = self.grad_norm
        metrics["tokens_per_second"] = self.steps * self.tokens_per_step / (time.monotonic() - self.began)
        metrics["memory_bytes"] = memory_bytes(self.accelerator.device)
        if self.flops_per_token is not None and self.peak_flops is not None:
            available = self.peak_flops * self.accelerator.num_processes
            metrics["mfu"] = self.flops_per_token * metrics["tokens_per_second"] / available
        return metrics


def make_log_window(run: Run) -> LogWindow:
    """The window of a run. It has MFU if the peak speed of the device is known or given, and the FLOPs are known."""
    arguments, accelerator, length = run.arguments, run.accelerator, run.config.max_position_embeddings
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    peak = peak_flops(accelerator.device, dtype, arguments.monitoring.peak_tflops)
    flops = flops_per_token(run) if peak is not None else None
    return LogWindow(
        accelerator,
        tokens_per_step=arguments.optimization.train_batch_size * length,
        tokens_per_byte=len(run.held_out.ids) / run.held_out.bytes,
        flops_per_token=flops,
        peak_flops=peak if flops is not None else None,
    )


def size_metrics(run: Run) -> dict[str, float]:
    """The parameters of the model, and the FLOPs of training on one token where they can be counted."""
    metrics: dict[str, float] = {"parameters": run.unwrapped_model.num_parameters()}
    if (flops := flops_per_token(run)) is not None:
        metrics["training_flops_per_token"] = flops
    return metrics


def flops_per_token(run: Run) -> int | None:
    """
    The FLOPs of training on one token; `None` for a model of a shape that cannot be counted, and with an adapter: no
    gradients of the other weights are computed then, which are a third of the formula.
    """
    if run.arguments.adapter.lora_r:
        return None
    try:
        return ModelCost(run.config).training_flops_per_token(run.config.max_position_embeddings)
    except ValueError:
        return None


def inner_metrics(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
    """
    The attention entropy of each layer in nats, and statistics of activations at each site, on `windows` (windows,
    length). The model does not change.
    """
    # Hooks and another kind of attention would make torch compile the model again.
    with torch.compiler.set_stance("force_eager"):
        summary = summarize_attention(model, windows)
        training = model.training
        model.eval()
        with record_activations(model) as recorder, torch.no_grad():
            model(input_ids=windows.to(model.device), use_cache=False)
        model.train(training)
    entropy = {f"attention_entropy/layers.{i}": layer.mean().item() for i, layer in enumerate(summary.entropy)}
    return entropy | as_metrics("activations", recorder.statistics())


def check_internals(run: Run) -> None:
    """Raises `ValueError` if `inner_metrics` cannot look into the model of a run; it reads one window."""
    try:
        with run.uncompiled():
            inner_metrics(run.unwrapped_model, run.held_out.windows(1))
    except ValueError as error:
        raise ValueError(f"--internals_steps: {error} Leave it out.") from None


def own_metrics(run: Run, functions: Mapping[str, Metric]) -> dict[str, float]:
    """
    What functions of the caller measure on the whole model, as it is evaluated; `eval_` stands before each name. Every
    process calls it, and the main process computes. If one of them fails there, every process raises.
    """
    metrics: dict[str, float] = {}
    if not functions:
        return metrics
    error: Exception | None = None
    with run.full_model() as model, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if model is not None:
            was_training = model.training
            try:
                for name, function in functions.items():
                    metrics[f"eval_{name}"] = float(function(model.eval(), run.corpus.tokenizer))
            except Exception as caught:  # the other processes wait for the outcome
                error = caught
            model.train(was_training)
    run.parallel.raise_everywhere(error)
    return metrics


@contextlib.contextmanager
def update_metrics(model: nn.Module, is_due: bool, metrics: dict[str, float]) -> Iterator[None]:
    """If `is_due`, adds gradient norms and update ratios of the optimizer step within the context to `metrics`."""
    if not is_due:
        yield
        return
    with record_update(model) as update:
        yield
    metrics |= as_metrics("updates", update.statistics)


# Dense bfloat16 TFLOP/s from the data sheets, without sparsity. The first name that a device's name contains is used.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """The peak FLOP/s for MFU: from the user, or for bfloat16 from the data sheet; `None` if it is not known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words, because an L40 is not an L4.
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """On a GPU the largest memory of tensors so far; elsewhere the memory of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
