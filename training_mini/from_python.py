"""Training from Python and from notebooks: `from training_mini import TrainingSettings, train`."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from modeling_mini.remote_code import MODEL_MODULE
from transformers import PreTrainedModel

from . import trainer
from .arguments import SHAPE
from .checkpoints import DivergedError
from .data.own import OWN_DATA
from .hooks import Hooks, Metric
from .monitoring import console
from .notebook import NotebookDisplay, is_notebook
from .result import TrainingResult
from .settings import TrainingSettings

SETTINGS = {field.name: field.type for field in dataclasses.fields(TrainingSettings)}


@contextlib.contextmanager
def words_of_python() -> Iterator[None]:
    """
    In sentences about wrong input, a flag such as `--resume` becomes `resume=True`, as the caller writes it, and
    `--lora_r 8` becomes `lora_r 8`. The hint at `--help` is left out.
    """
    try:
        yield
    except ValueError as error:
        if type(error) in (ValueError, DivergedError) and len(error.args) == 1:  # not its subclasses in libraries
            sentence = str(error).replace("; --help all lists the flags", "")
            error.args = (re.sub(r"(?<![\w-])--(\w+)( true| false)?\b", as_keyword, sentence),)
        raise


def as_keyword(flag: re.Match[str]) -> str:
    """What `--NAME`, perhaps with the word true or false after it, is in Python; what is no setting stays as it is."""
    name, value = flag[1], flag[2] or ""
    if name not in SETTINGS:
        return flag[0]
    return f"{name}={value.strip().capitalize() or True}" if SETTINGS[name] == bool | None else f"{name}{value}"


@words_of_python()
def train(
    settings: TrainingSettings | None = None,
    *,
    model: PreTrainedModel | type[PreTrainedModel] | None = None,
    data: Iterable[Any] | None = None,
    callbacks: Iterable[object] = (),
    metrics: Mapping[str, Metric] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """
    Trains a model as the settings say, or goes on with a run, as `train_accelerate.py` does with the flags of the same
    names: `result = train(TrainingSettings(dataset="sample", max_minutes=2))`. Everything that is written goes into the
    folder of the run. Call it as often as you like in one process. Ctrl-C, or interrupting the kernel of a notebook,
    stops after the step: the run is saved, and `resume=True` goes on with it.

    docs/EXTENDING.md shows the other arguments:

    Args:
        model: the model to train, or the class of a new one, in the place of Mini.
        data: what to learn from in the place of `dataset`: a `datasets.Dataset`, or an iterable of token ids.
        callbacks: objects with methods of the names and arguments of transformers' `TrainerCallback`.
        metrics: numbers to compute at each evaluation, by name. Each function gets the model and the tokenizer. They
            are in the metrics as `eval_NAME`, and in the curves.
        progress: whether progress is shown: in a notebook a bar, the curves and samples under the cell, on a terminal
            what the command shows. By default it is shown in these two places. Nothing is printed elsewhere, or with
            `False`; a fault that does not end the run is then a Python warning.

    Returns:
        The result: `.model`, `.tokenizer`, `.metrics`, `.curves`, `.samples`, `.folder`.

    Raises:
        ValueError: for wrong input, before any existing file is changed.
    """
    settings = settings if settings is not None else TrainingSettings()
    if not isinstance(settings, TrainingSettings):
        raise ValueError(f"train takes TrainingSettings, got {type(settings).__name__}.")
    arguments = with_hooks(settings, model, data).arguments()
    if arguments.run.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError("num_processes is for the command: start your program by accelerate launch or torchrun.")
    callbacks = tuple(callbacks)
    is_shown = progress is not False
    if is_shown and is_notebook():
        callbacks += (NotebookDisplay(),)
    is_quiet = not (is_shown and console.is_terminal) or is_notebook()
    hooks = Hooks(model=model, data=data, callbacks=callbacks, metrics=metrics or {}, is_quiet=is_quiet)
    return trainer.train(arguments, hooks)


def with_hooks(
    settings: TrainingSettings, model: PreTrainedModel | type[PreTrainedModel] | None, data: Iterable[Any] | None
) -> TrainingSettings:
    """
    The settings with what describes a model and data that are given as objects, so that the run records it.

    Raises:
        ValueError: if the settings name a model or data too.
    """
    given, known = settings.given(), {}
    if data is not None:
        refuse(given, ["dataset", "dataset_config", "dataset_split", "streaming", "stream_parts"], "data")
        known["dataset"] = OWN_DATA
    if model is not None:
        refuse(given, ["model_class"], "model")
        model_class = model if isinstance(model, type) else type(model)
        if model_class.__module__ != MODEL_MODULE:
            known["model_class"] = f"{model_class.__module__}:{model_class.__qualname__}"
    if isinstance(model, PreTrainedModel):
        refuse(given, ["model", "size", *SHAPE], "model")
        known |= {name: getattr(model.config, name) for name in SHAPE if hasattr(model.config, name)}
    return dataclasses.replace(settings, **known)


def refuse(given: dict[str, Any], names: list[str], argument: str) -> None:
    """Raises `ValueError` if one of these settings is given beside an argument that stands in its place."""
    if both := [name for name in names if name in given]:
        raise ValueError(f"train({argument}=...) stands in the place of {' and '.join(both)}: give one of them.")
