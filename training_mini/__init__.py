"""
Everything that only training needs.

From Python: `from training_mini import TrainingSettings, train`. These are loaded when they are first used, because
torch takes seconds to load, and no help text needs it.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .from_python import train
    from .result import TrainingResult
    from .settings import TrainingSettings

__all__ = ["TrainingResult", "TrainingSettings", "train"]
MODULE_OF = {"TrainingResult": "result", "TrainingSettings": "settings", "train": "from_python"}


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # What tqdm says in a notebook without ipywidgets. Mini's own bar there needs none.
        warnings.filterwarnings("ignore", message="IProgress not found")
        return getattr(importlib.import_module(f".{MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
