"""
Ways to look into a model: what it costs, where its attention goes, what its activations and gradients are, and what
each of its layers would have said.

The first three are a few functions and a command of `python -m modeling_mini.analysis` each; docs/ANALYSIS.md shows
both. `import modeling_mini` does not import this package.
"""

from .activations import (
    ActivationStatistics,
    UpdateStatistics,
    as_metrics,
    draw_activations,
    gradient_norms,
    record_activations,
    record_update,
)
from .attention import AttentionSummary, attention_weights, draw_attention, eager_attention, summarize_attention
from .cost import InferenceMemory, ModelCost, TrainingMemory, measure_inference_memory, measure_training_memory
from .inputs import prompt_ids, text_windows, token_labels
from .logit_lens import logit_lens

__all__ = [
    "ActivationStatistics",
    "AttentionSummary",
    "InferenceMemory",
    "ModelCost",
    "TrainingMemory",
    "UpdateStatistics",
    "as_metrics",
    "attention_weights",
    "draw_activations",
    "draw_attention",
    "eager_attention",
    "gradient_norms",
    "logit_lens",
    "measure_inference_memory",
    "measure_training_memory",
    "prompt_ids",
    "record_activations",
    "record_update",
    "summarize_attention",
    "text_windows",
    "token_labels",
]
