"""The Mini model. Importing this package makes transformers' Auto classes know it."""

from configuration_mini import MiniConfig
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling_mini import MiniForCausalLM, MiniModel, MiniPreTrainedModel

AutoConfig.register(MiniConfig.model_type, MiniConfig, exist_ok=True)
AutoModel.register(MiniConfig, MiniModel, exist_ok=True)
AutoModelForCausalLM.register(MiniConfig, MiniForCausalLM, exist_ok=True)

__all__ = ["MiniConfig", "MiniForCausalLM", "MiniModel", "MiniPreTrainedModel"]
