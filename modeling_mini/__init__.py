"""The Mini model. Importing this package makes transformers' Auto classes know it."""

from configuration_mini import MiniConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .modeling_mini import (
    MiniForCausalLM,
    MiniForQuestionAnswering,
    MiniForSequenceClassification,
    MiniForTokenClassification,
    MiniModel,
    MiniPreTrainedModel,
)

# AutoModel is registered in modeling_mini.py, which needs it also where this package is not installed.
AutoConfig.register(MiniConfig.model_type, MiniConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniConfig, MiniForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MiniConfig, MiniForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MiniConfig, MiniForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MiniConfig, MiniForQuestionAnswering, exist_ok=True)

__all__ = [
    "MiniConfig",
    "MiniForCausalLM",
    "MiniForQuestionAnswering",
    "MiniForSequenceClassification",
    "MiniForTokenClassification",
    "MiniModel",
    "MiniPreTrainedModel",
]
