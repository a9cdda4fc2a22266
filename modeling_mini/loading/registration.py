"""Makes transformers' Auto classes know Mini, and peft its modules. `import modeling_mini` does it by this module."""

from configuration_mini import MiniConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..modeling_mini import (
    MiniForCausalLM,
    MiniForQuestionAnswering,
    MiniForSequenceClassification,
    MiniForTokenClassification,
)
from ..peft_defaults import register_peft_defaults

# AutoModel is registered in modeling_mini.py, where it is needed even if this package is not installed.
AutoConfig.register(MiniConfig.model_type, MiniConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniConfig, MiniForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MiniConfig, MiniForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MiniConfig, MiniForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MiniConfig, MiniForQuestionAnswering, exist_ok=True)
register_peft_defaults()
