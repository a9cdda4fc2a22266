"""What goes on inside the model during a run, as metrics: by `modeling_mini.analysis`, every so many steps."""

import contextlib
from collections.abc import Iterator

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
