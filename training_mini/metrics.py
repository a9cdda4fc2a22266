"""What is measured of a run besides its loss: what goes on inside the model, MFU and memory."""

import contextlib
import re
from collections.abc import Iterator

import psutil
import torch
from modeling_mini.analysis.activations import as_metrics, record_activations, record_update
from modeling_mini.analysis.attention import summarize_attention
from torch import nn
from transformers import PreTrainedModel


def inner_metrics(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
    """
    Attention entropy of each layer, in nats, and statistics of activations at each site, on `windows` (windows,
    length). The model is left as it was.
    """
    # Hooks and another attention would compile a compiled model anew.
    with torch.compiler.set_stance("force_eager"):
        summary = summarize_attention(model, windows)
        training = model.training
        model.eval()
        with record_activations(model) as recorder, torch.no_grad():
            model(input_ids=windows.to(model.device), use_cache=False)
        model.train(training)
    entropy = {f"attention_entropy/layers.{i}": layer.mean().item() for i, layer in enumerate(summary.entropy)}
    return entropy | as_metrics("activations", recorder.statistics())


@contextlib.contextmanager
def update_metrics(model: nn.Module, is_due: bool, metrics: dict[str, float]) -> Iterator[None]:
    """Adds gradient norms and update ratios of the optimizer step within the context to `metrics`, if it is due."""
    if not is_due:
        yield
        return
    with record_update(model) as update:
        yield
    metrics |= as_metrics("updates", update.statistics)


# Dense bfloat16 TFLOP/s of the data sheets, without sparsity. The first whose words a device's name contains counts.
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
    """The FLOP/s that MFU is a share of: what the user says, or the data sheet for bfloat16, or `None`."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    # By whole words: an L40 is no L4.
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """The largest memory that tensors took on a GPU so far; elsewhere what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
