"""
Ways to look into a model: what it costs, where its attention goes, what its activations and gradients are, and what
each of its layers would have said.

The first three are a few functions and a command of `python -m modeling_mini.analysis` each; docs/ANALYSIS.md shows
both. A name of this package is loaded when it is first used, because torch takes seconds to load, and no help text
needs it.
"""

import importlib
from typing import Any

NAMES = {
    "activations": (
        *("ActivationStatistics", "UpdateStatistics", "as_metrics", "gradient_norms", "record_activations"),
        "record_update",
    ),
    "attention": ("AttentionSummary", "attention_weights", "eager_attention", "summarize_attention"),
    "cost": ("InferenceMemory", "ModelCost", "TrainingMemory"),
    "drawing": ("draw_activations", "draw_attention"),
    "inputs": ("prompt_ids", "text_windows", "token_labels"),
    "lens": ("logit_lens",),
    "peak_memory": ("measure_inference_memory", "measure_training_memory"),
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}

__all__ = list(MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
