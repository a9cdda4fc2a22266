"""
Writes a checkpoint in the format of another program.

    python -m modeling_mini.export FORMAT CHECKPOINT OUT

Each format is an entry of `FORMATS` in formats.py, and a module with its name. The module has a function
`export_FORMAT`, which gets the model, the tokenizer, a folder to write into and the options by name, and returns the
`ExportCard` of the result. A module is imported only when it is used, because some need a library of their own, and all
need torch, which takes seconds to load.
"""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from files_mini import destination, find_checkpoint, new_folder, writing
from shape_mini import nearest_name

from .card import ExportCard, write_card
from .formats import FORMATS


def check_format(format: str) -> None:
    """Raises ValueError if there is no such format."""
    if format not in FORMATS:
        hint = nearest_name(str(format), list(FORMATS)) or "."
        raise ValueError(f"There is no format {format!r}; the formats are {', '.join(FORMATS)}{hint}")


def module_of(format: str) -> ModuleType:
    """
    The module of a format.

    Raises:
        ValueError: if a library that it needs is not installed.
    """
    try:
        return importlib.import_module(f".{format}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        raise ValueError(f"The format {format} needs the package {error.name}: pip install {error.name}.") from None


def export(format: str, checkpoint: str | Path, out: str | Path, overwrite: bool = False, **options: Any) -> Path:
    """
    Writes a checkpoint in another format, with a card, as a new folder.

    Args:
        format: one of `FORMATS`.
        checkpoint: a run, a checkpoint folder, a folder of an adapter (it is merged into its base) or a Hub name.
        out: the folder. It appears only when it is complete.
        overwrite: whether to replace `out` if there is something in it.
        options: the fields of `FORMATS[format].options`.

    Returns:
        The folder.

    Raises:
        ValueError: for an unknown format or option, and for a model that the format cannot hold exactly. The error
            gives the reason.
    """
    check_format(format)
    names = [field.name for field in dataclasses.fields(FORMATS[format].options)]
    for name in options:
        if name not in names:
            raise ValueError(f"The format {format} has no option {name!r}{nearest_name(name, names) or '.'}")
    chosen = FORMATS[format].options(**options)
    source = find_checkpoint(str(checkpoint))
    target = destination(out, overwrite, source)
    beside = getattr(chosen, "lora", False)  # an adapter stays beside its base
    # Not above: these load torch, and what is wrong until here shows without it.
    from transformers import PreTrainedModel

    from ..loading.checkpoints import load_model

    module = module_of(format)
    model, tokenizer = load_model(str(checkpoint), device="cpu", merge=not beside)
    destination(out, overwrite, model.name_or_path)  # the base of an adapter
    if beside and isinstance(model, PreTrainedModel):
        raise ValueError(f"lora is for the folder of an adapter, and {str(checkpoint)!r} is a model: leave it out.")
    if not beside and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The adapter {str(checkpoint)!r} cannot be merged into the weights of {model.name_or_path!r}, and other "
            f"runtimes have no place for it beside them: export the model that it lies on."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{str(checkpoint)!r} is quantized: export the checkpoint that it was made of.")

    # Of an adapter, and not that of its base: files and cards have the name of what was given.
    model.name_or_path = source
    write = getattr(module, f"export_{format}")
    with new_folder(target) as partial:
        card = write(model, tokenizer, partial, **{name: getattr(chosen, name) for name in names})
        with writing(target):
            write_card(card, model.get_base_model() if beside else model, partial, format, source, is_merged=not beside)
    return Path(out)


__all__ = ["FORMATS", "ExportCard", "export"]
