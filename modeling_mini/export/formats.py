"""
The formats with their flags. To add one, write a module beside this file and an entry in `FORMATS`.

The modules of the formats are not imported here, because a help text needs none of their libraries.
"""

from dataclasses import dataclass
from pathlib import Path

from entry_points_mini import Settings, option
from shape_mini import nearest_name

GGUF_TYPES = ("F32", "F16", "Q8_0")
VENDORED = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
)


@dataclass
class NoOptions(Settings):
    """This format has no options."""


@dataclass
class GgufOptions(Settings):
    """What to write."""

    types: list[str] = option(list(GGUF_TYPES), "of the weights: F32, F16 or Q8_0, a file for each")
    lora: bool = option(False, "write a LoRA adapter beside its base, for llama.cpp's --lora, in place of merging it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.types:
            raise ValueError(f"types must name at least one of {', '.join(GGUF_TYPES)}.")
        for name in self.types:
            if name not in GGUF_TYPES:
                hint = nearest_name(str(name), list(GGUF_TYPES)) or "."
                raise ValueError(f"types must be among {', '.join(GGUF_TYPES)}, got {name!r}{hint}")


@dataclass
class OnnxOptions(Settings):
    """What to write beside the model as it is."""

    q8: bool = option(
        False,
        "also a copy with matrices of 8 bits, onnx/model_quantized.onnx: a quarter of the size of a larger model, and "
        "more where the vocabulary is large, because the embedding stays as it is",
    )
    node_modules: str | None = option(
        None,
        "folder where npm installed @huggingface/transformers: what the page needs of it is copied beside the page",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [] if self.node_modules is None else [
            name for name in VENDORED if not Path(self.node_modules, name).is_file()
        ]  # fmt: skip
        if missing:
            raise ValueError(
                f"node_modules must be a folder into which npm installed @huggingface/transformers: "
                f"{str(Path(self.node_modules, missing[0]))!r} is missing."
            )


@dataclass
class LmEvalOptions(Settings):
    """What to measure on."""

    text_file: str | None = option(None, "UTF-8 text to measure on")
    task_name: str = option("mini_bits_per_byte", "name of the task")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_file is None:
            raise ValueError("Name the text to measure on by --text_file.")
        if not Path(self.text_file).is_file():
            raise ValueError(f"There is no text file {self.text_file!r}.")
        if not self.task_name.isidentifier():
            raise ValueError(f"task_name must be letters, digits and underscores, got {self.task_name!r}.")


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        description: what becomes of a checkpoint, after the words "A checkpoint".
        options: the flags. They are the arguments of `export_NAME` in the module of the format.
    """

    description: str
    options: type[Settings] = NoOptions


# By the name of the module.
FORMATS = {
    "native": Format("as Llama, Qwen3 or StableLM, which load without custom code"),
    "mini": Format("back from native to Mini"),
    "gguf": Format("for llama.cpp and what is built on it", GgufOptions),
    "onnx": Format("for onnxruntime and transformers.js", OnnxOptions),
    "lm_eval": Format("as a task of lm-evaluation-harness: bits per byte of a text file", LmEvalOptions),
}
