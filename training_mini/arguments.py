"""Every setting of a training run: a field here is a flag of `train_accelerate.py` and a key of its YAML file."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from configuration_mini import PRESETS, MiniConfig
from entry_points_mini import ArgumentParser, option

RUNS_FOLDER = Path("runs")


@dataclass
class ModelArguments:
    """The shape of a new model: a preset, and any field of MiniConfig to replace in it."""

    size: str = option("tiny", f"preset: {', '.join(PRESETS)}")
    max_position_embeddings: int | None = option(None, "context length in tokens (default: the preset's)")
    hidden_size: int | None = option(None, "width of the residual stream (default: the preset's)")
    intermediate_size: int | None = option(None, "width of the SwiGLU layer (default: the preset's)")
    num_hidden_layers: int | None = option(None, "number of blocks (default: the preset's)")
    num_attention_heads: int | None = option(None, "number of query heads (default: the preset's)")
    num_key_value_heads: int | None = option(None, "number of key/value heads (default: the preset's)")
    head_dim: int | None = option(None, "width of one head (default: hidden_size / num_attention_heads)")
    norm_type: str | None = option(None, "layernorm or rmsnorm (default: layernorm)")
    qk_norm: bool | None = option(None, "normalise queries and keys per head", nargs="?", const=True)
    embedding_dropout: float | None = option(None, "dropout after the embedding (default: 0)")
    attention_dropout: float | None = option(None, "dropout on attention weights (default: 0)")
    residual_dropout: float | None = option(None, "dropout on what a block adds (default: 0)")

    def model_config(self, **from_tokenizer: int) -> MiniConfig:
        """The configuration of the new model; `from_tokenizer` are the vocabulary size and the special ids."""
        given = {name: value for name, value in vars(self).items() if name != "size" and value is not None}
        return MiniConfig.preset(self.size, **given, **from_tokenizer)


@dataclass
class DataArguments:
    """What text to learn from, and how it becomes token ids."""

    dataset: str = option(
        "python-stdlib",
        "python-stdlib (the source of Python's standard library), sample (a small generated text), "
        "a file, a directory, a quoted glob, or the name of a dataset on the Hub",
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset, where it has several")
    dataset_split: str = option("train", "split of a Hub dataset")
    streaming: bool = option(False, "read a Hub dataset without downloading it first")
    text_column: str | None = option(None, "column of .jsonl, .csv, .parquet or Hub data (default: found by name)")
    tokenizer: str = option("byte", "byte, char, or the folder or Hub name of any tokenizer")
    errors: Literal["strict", "replace"] = option("strict", "what to do with invalid UTF-8 that cannot stay as bytes")
    validation_ratio: float = option(0.1, "share of the text that is held out")
    cache_dir: str = option(
        os.environ.get("MINI_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "mini")),
        "where encoded corpora are kept",
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_ratio < 1:
            raise ValueError(f"validation_ratio must be between 0 and 1, got {self.validation_ratio}.")


@dataclass
class RunArguments:
    """The run itself. Names are those of transformers' TrainingArguments wherever it has the setting."""

    output_dir: str | None = option(None, "folder of the run (default: runs/SIZE-DATASET)")
    overwrite: bool = option(False, "replace the run that is in output_dir")
    resume: bool = option(False, "go on with the run in output_dir, or with the newest")
    seed: int = option(42, "decides the initial weights, the order of the data, and dropout")
    max_steps: int = option(1200, "number of optimizer steps")
    train_batch_size: int = option(16, "sequences per optimizer step, over all processes")
    gradient_accumulation_steps: int = option(1, "parts that each process splits its share of a batch into")
    learning_rate: float = option(2e-3, "peak learning rate")
    min_lr_rate: float = option(0.1, "share of the peak learning rate at which the cosine ends")
    warmup_steps: int = option(100, "steps in which the learning rate rises from 0")
    weight_decay: float = option(0.1, "decoupled decay, on matrices only")
    adam_beta1: float = option(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = option(0.99, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 turns clipping off")
    logging_steps: int = option(10, "log every so many steps")
    eval_steps: int = option(300, "evaluate every so many steps, and at the end")
    max_eval_tokens: int = option(262_144, "evaluate on the first so many held-out tokens")
    save_steps: int = option(300, "write a checkpoint to resume from every so many steps, and at the end")
    save_total_limit: int = option(2, "keep the newest so many checkpoints")
    bf16: bool | None = option(None, "bfloat16 autocast (default: where a GPU has it)", nargs="?", const=True)
    torch_compile: bool = option(False, "compile the model; slow to start, faster after")
    gradient_checkpointing: bool = option(False, "trade compute for memory")
    sample_prompt: str | None = option(
        None, "what the model continues at the end of the run (default: 'def ' for python-stdlib, else a new line)"
    )

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_steps",
            "max_eval_tokens", "save_steps", "save_total_limit",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("learning_rate", "adam_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.min_lr_rate <= 1:
            raise ValueError(f"min_lr_rate must be in [0, 1], got {self.min_lr_rate}.")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps}), "
                f"or the learning rate never reaches its peak."
            )
        if self.resume and self.overwrite:
            raise ValueError("Give one of --resume and --overwrite: the one goes on with a run, the other replaces it.")


@dataclass(frozen=True)
class Arguments:
    """The three groups together."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output_dir or RUNS_FOLDER / default_run_name(self))

    def save(self, path: Path) -> None:
        """Writes the resolved settings as YAML that `--config` and `--resume` read back."""
        groups = {
            name: {key: value for key, value in dataclasses.asdict(getattr(self, name)).items() if value is not None}
            for name in ("model", "data", "run")
        }
        # What this one call was told to do is no setting of the run.
        for name in ("resume", "overwrite", "output_dir"):
            groups["run"].pop(name, None)
        text = "".join(yaml.safe_dump(values, sort_keys=False, allow_unicode=True) for values in groups.values())
        path.write_text(text, encoding="utf-8")


def default_run_name(arguments: Arguments) -> str:
    """`tiny-python-stdlib`: the size and the last part of the dataset's name, in characters that every disk takes."""
    stem = Path(arguments.data.dataset.rstrip("/")).name.split(".")[0]
    stem = "".join(character if character.isalnum() or character in "-_" else "-" for character in stem).strip("-")
    return f"{arguments.model.size}-{stem or 'data'}"


def newest_run() -> Path:
    """The run under `runs/` that was written to last."""
    runs = [path.parent for path in RUNS_FOLDER.glob("*/config.yaml")]
    if not runs:
        raise ValueError(f"There is no run under {RUNS_FOLDER}/ to resume; start one without --resume.")
    return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))


def parse_arguments(argv: list[str]) -> Arguments:
    """
    The settings of a run from the command line.

    `--config FILE` reads a YAML file first; `--resume` reads the settings of the run that goes on. Flags win over both.

    Raises:
        ValueError: for anything that cannot be a run, in one sentence.
    """
    parser = ArgumentParser([ModelArguments, DataArguments, RunArguments], description="Train a Mini language model.")
    parser.add_argument("--config", default=None, help="YAML file with any of these settings")
    known, _ = parser.parse_known_args(argv)
    yaml_path = known.config
    if known.resume:
        folder = Path(getattr(known, "output_dir", None) or newest_run())
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"There is no run in {str(folder)!r} to resume: it has no config.yaml.")
        if yaml_path is not None:
            raise ValueError(
                "--resume goes on with the settings of the run itself: give changes as flags, not by --config."
            )
        yaml_path = folder / "config.yaml"
        argv = [*argv, f"--output_dir={folder}"]
    model, data, run, *_ = parser.parse(argv, yaml_path)
    model.model_config()  # refuses a shape that cannot work before any data is read
    return Arguments(model=model, data=data, run=run)
