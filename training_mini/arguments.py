"""Every setting of a training run: a field here is a flag of `train_accelerate.py` and a key of its YAML file."""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from configuration_mini import PRESETS, MiniConfig, nearest_name
from entry_points_mini import ArgumentParser, option

RUNS_FOLDER = Path("runs")
TRACKERS = ("tensorboard", "trackio", "wandb")


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
    streaming: bool = option(False, "train from the stream of a dataset, and store none of it")
    text_column: str | None = option(None, "column of .jsonl, .csv, .parquet or Hub data (default: found by name)")
    tokenizer: str = option("byte", "byte, char, or the folder or Hub name of any tokenizer")
    errors: Literal["strict", "replace"] = option("strict", "what to do with invalid UTF-8 that cannot stay as bytes")
    validation_ratio: float = option(0.1, "share of the text that is held out")
    document_attention: bool = option(False, "a token attends to its own document only, not to others in its row")
    cache_dir: str = option(
        os.environ.get("MINI_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "mini")),
        "where encoded corpora are kept",
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_ratio < 1:
            raise ValueError(f"validation_ratio must be between 0 and 1, got {self.validation_ratio}.")


@dataclass
class OptimizationArguments:
    """How the weights move. Names are those of transformers' TrainingArguments wherever it has the setting."""

    max_steps: int = option(1200, "number of optimizer steps")
    train_batch_size: int = option(16, "sequences per optimizer step, over all processes")
    gradient_accumulation_steps: int = option(1, "parts that each process splits its share of a batch into")
    find_batch_size: bool = option(False, "double gradient_accumulation_steps until a part fits into memory")
    optimizer: Literal["adamw", "muon"] = option("adamw", "adamw, or muon for the matrices of the blocks")
    learning_rate: float = option(2e-3, "peak learning rate")
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] = option(
        "cosine", "cosine to a floor, wsd (warmup, stable, decay to a floor), linear to 0, or constant; all warm up"
    )
    min_lr_rate: float = option(0.1, "share of the peak learning rate that is the floor of cosine and wsd")
    warmup_steps: int = option(100, "steps in which the learning rate rises from 0")
    decay_ratio: float = option(0.2, "share of max_steps in which wsd decays, at the end")
    weight_decay: float = option(0.1, "decoupled decay, on matrices only")
    adam_beta1: float = option(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = option(0.99, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    muon_momentum: float = option(0.95, "Muon's momentum")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 turns clipping off")
    max_skipped_steps: int = option(10, "stop after so many steps in a row whose gradients are not finite")
    label_smoothing: float = option(0.0, "share of the target's probability that is spread over the vocabulary")
    z_loss: float = option(0.0, "weight of the squared log-partition, which keeps logits small (1e-4 is usual)")
    dropout_start: float | None = option(None, "dropout everywhere at the first step; with dropout_end")
    dropout_end: float | None = option(None, "dropout everywhere at the last step; with dropout_start")
    dropout_annealing: Literal["linear", "cosine"] = option("linear", "the way from dropout_start to dropout_end")
    ema_decay: float = option(0.0, "evaluate and keep a moving average of the weights with this decay; 0: none")
    early_stopping_patience: int = option(0, "end after so many evaluations without a better one; 0: never")

    def __post_init__(self) -> None:
        check_least(self, 1, "max_steps", "train_batch_size", "gradient_accumulation_steps", "max_skipped_steps")
        check_least(
            self, 0, "weight_decay", "max_grad_norm", "warmup_steps", "z_loss", "early_stopping_patience",
        )  # fmt: skip
        for name in ("learning_rate", "adam_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in (
            "adam_beta1", "adam_beta2", "muon_momentum", "label_smoothing", "ema_decay", "dropout_start", "dropout_end"
        ):  # fmt: skip
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("min_lr_rate", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if (self.dropout_start is None) != (self.dropout_end is None):
            raise ValueError("Give both of dropout_start and dropout_end, or neither.")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps}), "
                f"or the learning rate never reaches its peak."
            )
        if self.lr_scheduler_type == "wsd" and self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and the decay of {self.decay_steps} steps (decay_ratio "
                f"{self.decay_ratio}) do not both fit into max_steps ({self.max_steps})."
            )

    @property
    def decay_steps(self) -> int:
        return round(self.decay_ratio * self.max_steps)


@dataclass
class MonitoringArguments:
    """What is measured on the way, and where it goes besides `metrics.jsonl` and `curves.png`."""

    logging_steps: int = option(10, "log every so many steps")
    eval_steps: int = option(300, "evaluate every so many steps, and at the end")
    max_eval_tokens: int = option(262_144, "evaluate on the first so many held-out tokens; 0: on all of them")
    internals_steps: int = option(
        0, "log attention entropy, activations, gradient norms and update ratios every so many steps; 0: never"
    )
    sample_every: int = option(0, "write what the model says to sample_prompts every so many steps; 0: at the end only")
    sample_prompts: list[str] = option(
        [], "what the model continues (default: 'def ' for python-stdlib, else a new line)"
    )
    report_to: list[str] = option([], f"trackers besides: {', '.join(TRACKERS)}")
    peak_tflops: float | None = option(None, "TFLOP/s that MFU is a share of (default: the data sheet of known GPUs)")

    def __post_init__(self) -> None:
        check_least(self, 1, "logging_steps", "eval_steps")
        check_least(self, 0, "max_eval_tokens", "internals_steps", "sample_every")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops must be positive, got {self.peak_tflops}.")
        for name in self.report_to:
            if name not in TRACKERS:
                raise ValueError(f"report_to takes {', '.join(TRACKERS)}, got {name!r}{nearest_name(name, TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report_to {name} needs a package that is not installed: pip install {name}")


@dataclass
class RunArguments:
    """The run itself: where it lives, what it survives, and what it runs on."""

    output_dir: str | None = option(None, "folder of the run (default: runs/SIZE-DATASET)")
    overwrite: bool = option(False, "replace the run that is in output_dir")
    resume: bool = option(False, "go on with the run in output_dir, or with the newest")
    seed: int = option(42, "decides the initial weights, the order of the data, and dropout")
    save_steps: int = option(300, "write a checkpoint to resume from every so many steps, and at the end")
    keep_last: int = option(2, "keep the newest so many checkpoints")
    keep_every: int = option(0, "keep for good the checkpoints of steps that this divides; 0: none")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written (a full disk): stop, or warn and train on"
    )
    bf16: bool | None = option(None, "bfloat16 autocast (default: where a GPU has it)", nargs="?", const=True)
    tf32: bool | None = option(None, "TF32 in float32 products (default: where a GPU has it)", nargs="?", const=True)
    torch_compile: bool = option(False, "compile the model; slow to start, faster after")
    compile_regions: bool = option(False, "with torch_compile: compile one block, for all of them")
    gradient_checkpointing: bool = option(False, "trade compute for memory")

    def __post_init__(self) -> None:
        check_least(self, 1, "save_steps", "keep_last")
        check_least(self, 0, "keep_every", "seed")
        if self.resume and self.overwrite:
            raise ValueError("Give one of --resume and --overwrite: the one goes on with a run, the other replaces it.")
        if self.compile_regions and not self.torch_compile:
            raise ValueError("compile_regions is a way of torch_compile: give both.")


def check_least(arguments: object, least: int, *names: str) -> None:
    """Raises `ValueError` for a value that is too small."""
    for name in names:
        if getattr(arguments, name) < least:
            wrong = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name} {wrong}, got {getattr(arguments, name)}.")


@dataclass(frozen=True)
class Arguments:
    """The groups together."""

    model: ModelArguments
    data: DataArguments
    optimization: OptimizationArguments
    monitoring: MonitoringArguments
    run: RunArguments

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output_dir or RUNS_FOLDER / default_run_name(self))

    def save(self, path: Path) -> None:
        """Writes the resolved settings as YAML that `--config` and `--resume` read back."""
        path.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """The settings that were given or have a default, without what this one call was told to do."""
        groups = dataclasses.asdict(self).values()
        of_the_call = ("resume", "overwrite", "output_dir")
        return {
            name: value
            for group in groups
            for name, value in group.items()
            if value is not None and name not in of_the_call
        }


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
    groups = [ModelArguments, DataArguments, OptimizationArguments, MonitoringArguments, RunArguments]
    parser = ArgumentParser(groups, description="Train a Mini language model.")
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
    model, data, optimization, monitoring, run, *_ = parser.parse(argv, yaml_path)
    model.model_config()  # refuses a shape that cannot work before any data is read
    if optimization.dropout_start is not None and run.torch_compile:
        raise ValueError("A dropout that changes would compile the model anew at each step: leave out --torch_compile.")
    return Arguments(model, data, optimization, monitoring, run)
