"""
A model class of the user's own: Auto classes get to know it, and its code goes into the checkpoint.

A class that computes something else than Mini has a configuration class with a `model_type` of its own. So nobody loads
its weights into a Mini by mistake.
"""

import ast
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from entry_points_mini import imported
from modeling_mini.remote_code import MODEL_MODULE, ROOT_FILES, TRAVELLING, remote_code_files
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .arguments import Arguments
from .hooks import Hooks

# How the modules that a checkpoint of Mini has are called in the repository, and in the checkpoint.
FLAT_NAMES = {
    "modeling_mini": "modeling_mini",
    **{f"modeling_mini.{Path(name).stem}": Path(name).stem for name in TRAVELLING},
    **{Path(name).stem: Path(name).stem for name in ROOT_FILES},
}


class StaysHomeError(ValueError):
    """The code of a class cannot be copied into a checkpoint. The message is the reason, as the end of a sentence."""


def config_class_of(arguments: Arguments, hooks: Hooks) -> type[PreTrainedConfig] | None:
    """
    The configuration class of the model to train; `None` for a Mini, or for that of a checkpoint. From here on, Auto
    classes know the class of the model.

    Raises:
        ValueError: if what was given is no causal language model, or has the name or the configuration of another one.
    """
    found: Any = hooks.model
    if found is None and arguments.model.model_class is not None:
        found = imported(arguments.model.model_class, "model_class")
    if found is None:
        return None
    model_class = found if isinstance(found, type) else type(found)
    if not issubclass(model_class, PreTrainedModel) or not model_class.can_generate():
        raise ValueError(f"The model must be a causal language model of transformers, got {model_class.__name__}.")
    config_class = model_class.config_class
    for mapping, name, own in (
        (CONFIG_MAPPING, config_class.model_type, config_class),
        (MODEL_FOR_CAUSAL_LM_MAPPING, config_class, model_class),
    ):
        if name in mapping and not is_same(mapping[name], own):
            raise ValueError(
                f"{model_class.__name__} would be loaded as another class: {config_class.__name__} with model_type "
                f"{config_class.model_type!r} belongs to {mapping[name].__name__}. Give it a config_class of its own, "
                f"with a model_type of its own."
            )
    if not model_class.__module__.startswith("transformers.") and model_class.__module__ != MODEL_MODULE:
        # Also where it is known: the cell of a notebook that defines it may have been run again.
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class


def is_same(one: type, other: type) -> bool:
    """Whether two classes are the same one, which may have been defined again, as by a cell of a notebook."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of a model, without the subclass that FSDP2 makes of it."""
    return next(known for known in type(model).__mro__ if not known.__module__.startswith("torch.distributed."))


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether the class of a model is the user's own, and Mini has to write its code. transformers may do so itself."""
    module = class_of(model).__module__
    return not (module.startswith(("transformers.", "peft.")) or module == MODEL_MODULE or model._auto_class)


def name_code(model: PreTrainedModel) -> str:
    """
    Lets the configuration of a model of an own class say where its code is in a checkpoint. Gives a sentence for the
    user where it cannot be there; otherwise it is empty.
    """
    if not has_own_code(model):
        return ""
    model_class = class_of(model)
    name = f"{model_class.__module__}.{model_class.__name__}"
    try:
        code_of(model_class)
    except StaysHomeError as reason:
        return f"The code of {name} does not go into the checkpoints, so it must be importable to load them: {reason}."
    module = model_class.__module__.split(".")[-1]
    model.config.auto_map = {
        "AutoConfig": f"{module}.{model_class.config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    return ""


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Writes the code of an own class into a checkpoint folder, if `name_code` has named it."""
    if has_own_code(model) and getattr(model.config, "auto_map", None):
        for name, content in code_of(class_of(model)).items():
            (folder / name).write_text(content, encoding="utf-8")


@functools.cache
def code_of(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """
    The files that a checkpoint needs for a class, name to content: its module, with the imports of Mini made relative,
    and the code of Mini if it uses that.

    Raises:
        StaysHomeError: if the module, or something that it imports, is not there for others.
    """
    path = getattr(sys.modules[model_class.__module__], "__file__", None)
    if path is None or model_class.__module__ == "__main__":
        raise StaysHomeError("it is defined in a program or a notebook; put it into a module of its own")
    if model_class.config_class.__module__ != model_class.__module__:
        raise StaysHomeError(f"{model_class.config_class.__name__} is defined in another module")
    source = Path(path).read_text(encoding="utf-8")
    lines, files = source.splitlines(keepends=True), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module in FLAT_NAMES:
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = re.sub(r"from\s+[\w.]+", f"from .{FLAT_NAMES[node.module]}", line, count=1)
                files = remote_code_files()
                continue
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            if not is_of_a_library(name):
                raise StaysHomeError(f"its module imports {name}, which is no installed library")
    return {**files, Path(path).name: "".join(lines)}


def is_of_a_library(name: str) -> bool:
    """Whether a module is Python's or belongs to something that others can install."""
    top = name.split(".")[0]
    if not top or top in FLAT_NAMES:
        return False
    spec = importlib.util.find_spec(top)
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec is not None else []
    return top in sys.stdlib_module_names or any("-packages" in place for place in places)
