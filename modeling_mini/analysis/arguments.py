"""The flags of the commands of `python -m modeling_mini.analysis`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entry_points_mini import WHICH_MODEL, Settings, option, optional_settings
from shape_mini import PRESETS, MiniShape


@dataclass
class CostArguments(optional_settings("ShapeSettings", MiniShape)):
    """
    What to count, and for which batch.

    The fields of `MiniShape` are flags here as they are of the trainer, so that shapes can be compared before training.
    """

    model: str | None = option(None, WHICH_MODEL, common=True)
    preset: str | None = option(
        None,
        f"a size of Mini instead of a model: {', '.join(PRESETS)} (default: tiny, where a flag gives a part of the "
        "shape)",
        aliases=["--size"],
        common=True,
    )
    vocab_size: int | None = option(None, "entries of the vocabulary (default: the preset's)", at_least=1)
    length: int | None = option(
        None, "tokens of each sequence (default: the context of the model)", at_least=1, common=True
    )
    batch_size: int = option(8, "sequences at once", at_least=1, common=True)
    device_memory: str | None = option(None, "also the largest batches that fit, for example in 24GiB", common=True)
    measure: bool = option(False, "also run a step of each kind and show the measured peaks", common=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.preset is not None:
            raise ValueError("Give --model or --preset, not both.")
        if self.model is not None and self.shape:
            raise ValueError(f"The model has a shape already: leave out {' and '.join(self.shape)}, or --model.")

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of MiniConfig that were given."""
        names = ("vocab_size", *(field.name for field in fields(MiniShape)))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def names_a_shape(self) -> bool:
        """Whether a preset or a shape is meant, and no model."""
        return self.preset is not None or bool(self.shape)


@dataclass
class TextSettings(Settings):
    """Which model, and on what text."""

    model: str | None = option(None, WHICH_MODEL)
    prompt: str | None = option(None, "text to read; it, or --text_file, has to be given")
    text_file: str | None = option(None, "text file to read windows of, in place of a prompt")
    length: int | None = option(
        None, "tokens of a window of the text file (default: the context of the model)", at_least=2
    )
    windows: int = option(16, "windows of the text file, spread evenly", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.text_file is None):
            raise ValueError("Give exactly one of --prompt and --text_file.")
        if self.text_file is not None:
            Path(self.text_file).stat()  # FileNotFoundError, before anything is loaded
        check_output(self.output)  # each command has its own default


@dataclass
class AttentionArguments(TextSettings):
    """Where the picture goes."""

    output: str = option("attention.png", "the picture")


@dataclass
class ActivationsArguments(TextSettings):
    """Where the picture goes."""

    output: str = option("activations.png", "the picture")


def check_output(output: str) -> None:
    """Raises ValueError if no file can be written under this name."""
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"output must name a file, and {output!r} is a folder.")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"output must be in a folder, and {str(path.parent)!r} is a file.")
