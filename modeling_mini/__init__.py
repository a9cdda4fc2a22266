"""The Mini model. Importing this package makes transformers' Auto classes know it, and peft its modules."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configuration_mini import MiniConfig

    from .modeling_mini import (
        MiniForCausalLM,
        MiniForQuestionAnswering,
        MiniForSequenceClassification,
        MiniForTokenClassification,
        MiniModel,
        MiniPreTrainedModel,
    )

__all__ = [
    "MiniConfig",
    "MiniForCausalLM",
    "MiniForQuestionAnswering",
    "MiniForSequenceClassification",
    "MiniForTokenClassification",
    "MiniModel",
    "MiniPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".modeling_mini", __name__), name)


# `python -m modeling_mini.NAME` imports this package before the program, which can show its help or find a mistake
# without transformers. Only while Python looks for a program is "-m" the first argument. A program of this package that
# goes on to load a model imports `loading`, which does this too.
if not (sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)):
    from .loading import registration as registration
