"""Every setting of a training run: a field here is a flag of `train_accelerate.py` and a key of its YAML file."""

import codecs
import contextlib
import dataclasses
import encodings.aliases
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from entry_points_mini import ArgumentParser, Settings, dump_yaml, option, optional_settings, quantization_of
from files_mini import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    RUNS_FOLDER,
    cache_folder,
    display_name,
    find_checkpoint,
    read_text,
    run_of,
    write_text,
)
from shape_mini import PRESETS, MiniShape, nearest_name

from .optimizers import LEARNING_RATES, OPTIMIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPE = tuple(field.name for field in dataclasses.fields(MiniShape))
DROPOUTS = tuple(name for name in SHAPE if name.endswith("_dropout"))
TRACKERS = ("tensorboard", "trackio", "wandb")
MAX_STEPS = 2000  # where neither max_steps nor max_minutes is given
# How new models are made: what learns fastest, and what Qwen3 computes, so that every export takes it (docs/LOG.md).
NEW_MODEL = {"norm_type": "rmsnorm", "qk_norm": True}
# A run of a version before that default; its config.yaml does not name these fields.
OLDER_RUN = {"norm_type": MiniShape.norm_type, "qk_norm": MiniShape.qk_norm}
CORPUS_FACTS = "corpus.json"  # in a folder of encoded text
WARMUP_STEPS, DECAY_RATIO = 100, 0.2  # where they are not given and the run is long enough for them


@dataclass
class ModelArguments(optional_settings("ShapeSettings", MiniShape, NEW_MODEL)):
    """The model to start from; or the shape of a new one: a preset, and any part of it to replace."""

    model: str | None = option(
        None, "start from this run, checkpoint folder, Hub name or box, with its shape and its tokenizer", common=True
    )
    size: str | None = option(None, f"preset: {', '.join(PRESETS)} (default: tiny)", common=True)
    model_class: str | None = option(
        None, "class of the model, as package.module:Class: a causal language model of transformers or of your own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_named(self, "model", "model_class")
        if self.model is None:
            self.size = self.size or "tiny"
            for name, value in NEW_MODEL.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            return
        fixed = [name for name in ("size", *SHAPE) if name not in DROPOUTS]
        given = [name for name in fixed if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"--model starts from a model that has its shape already: leave out {' and '.join(given)}, or leave "
                f"out --model to train a new one."
            )

    def model_config(
        self, config_class: "type[PreTrainedConfig] | None" = None, **from_tokenizer: int
    ) -> "PreTrainedConfig":
        """
        The configuration of the new model; `from_tokenizer` are the vocabulary size and the special ids.

        Args:
            config_class: that of `model_class`; by default `MiniConfig`. Another family than Mini gets the fields of a
                Mini that it has too, and keeps its own defaults for the others.

        Raises:
            ValueError: for a field that was given and that the configuration does not have.
        """
        from configuration_mini import MiniConfig  # loads torch, which no help text needs

        config_class = config_class or MiniConfig
        given = {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}
        if issubclass(config_class, MiniConfig):
            return config_class.preset(self.size, **given, **from_tokenizer)
        known = {*(field.name for field in dataclasses.fields(config_class)), *config_class.attribute_map}
        for name, value in given.items():
            if name not in known and value != NEW_MODEL.get(name):
                raise ValueError(f"{config_class.__name__} has no field {name!r}: leave it out.")
        values = {**PRESETS[self.size], **given, **from_tokenizer}
        return config_class(**{name: value for name, value in values.items() if name in known})

    @property
    def dropouts(self) -> dict[str, float]:
        """What was asked for, by the name that the configuration of Mini has for it."""
        return {name: getattr(self, name) for name in DROPOUTS if getattr(self, name) is not None}


@dataclass
class AdapterArguments(Settings):
    """Training a few weights beside those of `--model`. Names are those of TRL, which takes them from peft."""

    lora_r: int = option(
        0, "rank of a LoRA adapter, which is trained in place of the weights; 0: train the weights", at_least=0
    )
    lora_alpha: float | None = option(
        None, "the output of the adapter is multiplied by lora_alpha / lora_r (default: twice lora_r)", above=0
    )
    lora_dropout: float = option(0.0, "dropout on the input of the adapter", at_least=0, below=1)
    lora_target_modules: list[str] = option(
        [], "layers that get an adapter, by the end of their names (default: all linear layers of the blocks)"
    )
    lora_modules_to_save: list[str] = option([], "modules to train in full beside the adapter, such as embed_tokens")
    use_rslora: bool = option(False, "rsLoRA: multiply by lora_alpha / sqrt(lora_r) instead")
    use_dora: bool = option(False, "DoRA: train the length of each weight vector apart from its direction")
    load_in_4bit: bool = option(False, "keep the weights that are not trained in INT4 (QLoRA)")
    load_in_8bit: bool = option(False, "keep the weights that are not trained in INT8")
    merge: bool = option(False, "at the end, write the best model with the adapter merged into it to merged/")
    merge_quantized: bool = option(False, "merge into the rounded weights of load_in_4bit or load_in_8bit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = []  # the default, by the name that peft has for it
        quantization = self.quantization
        if not self.lora_r:
            if quantization is not None:
                raise ValueError(
                    f"load_in_{quantization} rounds the weights, and rounded weights cannot be trained: give "
                    f"--lora_r 8 too, which trains an adapter beside them, or leave it out."
                )
            defaults = {field.name: default_of(field) for field in dataclasses.fields(self)}
            given = [name for name, default in defaults.items() if getattr(self, name) != default]
            if given:
                raise ValueError(
                    f"{' and '.join(given)}: this belongs to an adapter, so give --lora_r 8, or another rank."
                )
        if self.merge and quantization is not None and not self.merge_quantized:
            raise ValueError(
                f"merge after load_in_{quantization} keeps the rounding of the weights for good: the merged model "
                f"is full in size and no better than its rounded base with the adapter; say --merge_quantized if you "
                f"want that, or train without load_in_{quantization}."
            )
        if self.merge_quantized and not (self.merge and quantization is not None):
            raise ValueError("merge_quantized goes with merge and one of load_in_4bit and load_in_8bit.")

    @property
    def quantization(self) -> str | None:
        """What the weights that are not trained are rounded to; raises ValueError for two kinds at once."""
        return quantization_of(self)


DEFAULT_VOCABULARY = 2048  # of --tokenizer bpe


@dataclass
class DataArguments(Settings):
    """What text to learn from, and how it becomes token ids."""

    dataset: str = option(
        "python-stdlib",
        "python-stdlib (the source of Python's standard library), python-packages (that, and the source of packages "
        "that Mini needs), sample (a small generated text), "
        "python-questions (conversations about the standard library), chat-sample and instruction-sample (small "
        "generated lessons), "
        "a file, a directory, a quoted glob, or the name of a dataset on the Hub; "
        "records with messages, or with prompt and completion, are learned as such",
        common=True,
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset, where it has several")
    dataset_split: str = option("train", "split of a Hub dataset")
    streaming: bool = option(False, "read the dataset as a stream while training, and store none of it")
    stream_parts: int = option(
        1,
        "with --streaming, divide the files into N parts that give equal shares of each batch; a process reads "
        "only the parts that it needs",
        at_least=1,
    )
    text_column: str | None = option(
        None, "column with the text, in files of records or Hub data (default: found by name)"
    )
    tokenizer: str | None = option(
        None,
        "byte, char, bpe (bytes, and merges of them that are learned from the text), or the folder or Hub name of any "
        "tokenizer (default: byte, or that of --model)",
        common=True,
    )
    vocab_size: int | None = option(
        None,
        "with --tokenizer bpe, how many tokens there are, the 264 special tokens and bytes among them; merges are "
        f"learned from the training part, or 16 MB that lie evenly in it (default: {DEFAULT_VOCABULARY})",
        at_least=265,
    )
    encoding: str = option("utf-8", "encoding of the files that are not UTF-8, such as cp1252 or utf-16")
    errors: Literal["strict", "replace"] = option(
        "strict",
        "of bytes that are invalid in their encoding: strict refuses them, replace reads U+FFFD; with byte and bpe, "
        "invalid UTF-8 is learned as it is",
    )
    validation_ratio: float = option(0.1, "share of the text that is held out", above=0, below=1)
    assistant_only_loss: bool | None = option(
        None, "learn only what the assistant says, or only the completion (default: true for such records)"
    )
    document_attention: bool = option(False, "a token attends to its own document only, not to others in its sequence")
    cache_dir: str = option(
        str(cache_folder()),
        "where encoded corpora are kept",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_named(self, "dataset", "dataset_config", "dataset_split", "text_column", "tokenizer", "cache_dir")
        self.encoding = encoding_called(self.encoding)
        if self.stream_parts > 1 and not self.streaming:
            raise ValueError(f"stream_parts divides a stream: add --streaming, or leave out {self.stream_parts}.")
        if self.tokenizer == "bpe":
            self.vocab_size = self.vocab_size or DEFAULT_VOCABULARY
        elif self.vocab_size is not None:
            raise ValueError(
                f"vocab_size is the size that --tokenizer bpe learns: add that, or leave out --vocab_size "
                f"{self.vocab_size}."
            )

    @property
    def is_encoded(self) -> bool:
        """Whether the dataset is a folder of ids that were encoded before, with the tokenizer that did it."""
        return (Path(self.dataset) / CORPUS_FACTS).is_file()


def defaults_of(setting: str) -> str:
    """The default of a setting with each optimizer, for the help."""
    return "default: " + ", ".join(f"{name} {optimizer.defaults[setting]}" for name, optimizer in OPTIMIZERS.items())


def rates_of(kind: str) -> str:
    """The default learning rate of a kind of parameters with each optimizer, for the help."""
    rates = ", ".join(f"{optimizer.rates.get(kind, 1.0):g} with {name}" for name, optimizer in OPTIMIZERS.items())
    return f"default: learning_rate times {rates}"


@dataclass
class OptimizationArguments(Settings):
    """How the weights move. Names are those of transformers' TrainingArguments wherever it has the setting."""

    max_steps: int | None = option(None, f"number of optimizer steps (default: {MAX_STEPS})", at_least=1, common=True)
    max_minutes: float | None = option(
        None,
        "train for X minutes: steps are timed before the first one, and max_steps follows from them",
        above=0,
        common=True,
    )
    train_batch_size: int = option(16, "sequences per optimizer step, over all processes", at_least=1, common=True)
    gradient_accumulation_steps: int = option(
        1, "micro-batches that each process splits its share of a batch into", at_least=1
    )
    find_batch_size: bool = option(False, "double gradient_accumulation_steps until a micro-batch fits into memory")
    optimizer: str = option(
        "muon", "muon (for the matrices of the blocks, with AdamW for the rest), or adamw; with --model, it is adamw",
        choices=OPTIMIZERS,
    )  # fmt: skip
    learning_rate: float | None = option(
        None, f"peak learning rate ({defaults_of('learning_rate')})", above=0, common=True
    )
    embedding_learning_rate: float | None = option(None, f"that of the embedding ({rates_of('embedding')})", above=0)
    head_learning_rate: float | None = option(
        None, f"that of the head, if it is not tied ({rates_of('head')})", above=0
    )
    vector_learning_rate: float | None = option(None, f"that of norms and biases ({rates_of('vectors')})", above=0)
    lr_scheduler_type: Literal["cosine", "wsd", "linear", "constant"] | None = option(
        None,
        "cosine to a floor, wsd (warmup, stable, decay to a floor), linear to 0, or constant; all warm up "
        f"({defaults_of('lr_scheduler_type')})",
    )
    min_lr_rate: float = option(
        0.1, "share of the peak learning rate that is the floor of cosine and wsd", at_least=0, at_most=1
    )
    warmup_steps: int | None = option(
        None,
        f"steps in which the learning rate rises from 0 (default: {WARMUP_STEPS}, of a short run a tenth of it)",
        at_least=0,
    )
    decay_ratio: float | None = option(
        None,
        f"share of max_steps in which wsd decays, at the end (default: {DECAY_RATIO}, or what the warmup leaves)",
        at_least=0,
        at_most=1,
    )
    weight_decay: float | None = option(
        None, f"decoupled decay, on matrices only ({defaults_of('weight_decay')})", at_least=0
    )
    adam_beta1: float = option(0.9, "decay of AdamW's mean of gradients", at_least=0, below=1)
    adam_beta2: float = option(0.99, "decay of AdamW's mean of squared gradients", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    muon_momentum: float = option(0.95, "Muon's momentum", at_least=0, below=1)
    muon_iterations: int = option(
        5, "polynomials with which Muon orthogonalises a step; more make it more exact and slower", at_least=1
    )
    muon_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "precision in which it does that (default: bfloat16 on a GPU, and on a CPU that trains in it)"
    )
    max_grad_norm: float | None = option(
        None, f"gradients are clipped to this norm; 0 turns clipping off ({defaults_of('max_grad_norm')})", at_least=0
    )
    max_skipped_steps: int = option(10, "stop after N steps in a row whose gradients are not finite", at_least=1)
    label_smoothing: float = option(
        0.0, "share of the target's probability that is given to the whole vocabulary", at_least=0, below=1
    )
    z_loss: float = option(
        0.0, "weight of the squared log-partition, which keeps logits small (1e-4 is usual)", at_least=0
    )
    dropout_start: float | None = option(
        None, "dropout everywhere at the first step; with dropout_end", at_least=0, below=1
    )
    dropout_end: float | None = option(
        None, "dropout everywhere at the last step; with dropout_start", at_least=0, below=1
    )
    dropout_annealing: Literal["linear", "cosine"] = option("linear", "the way from dropout_start to dropout_end")
    ema_decay: float = option(
        0.0, "evaluate and keep a moving average of the weights with this decay; 0: none", at_least=0, below=1
    )
    early_stopping_patience: int = option(0, "end after N evaluations without a better one; 0: never", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in OPTIMIZERS[self.optimizer].defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if (self.dropout_start is None) != (self.dropout_end is None):
            raise ValueError("Give both of dropout_start and dropout_end, or neither.")
        if self.max_minutes is not None and self.max_steps is not None:
            raise ValueError("Give one of max_steps and max_minutes: the second sets the first.")
        if self.max_minutes is None:
            self.max_steps = MAX_STEPS if self.max_steps is None else self.max_steps
            self._fit_to_length()

    def _fit_to_length(self) -> None:
        """Finds what depends on the number of steps and was not given; only a value that was given is refused."""
        if self.warmup_steps is None:
            self.warmup_steps = min(WARMUP_STEPS, self.max_steps // 10)
        if self.decay_ratio is None:
            self.decay_ratio = min(DECAY_RATIO, max(0.0, 1 - self.warmup_steps / self.max_steps))
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

    def learning_rate_of(self, kind: str) -> float:
        """The peak learning rate of a kind of parameters, one of `LEARNING_RATES`."""
        given = getattr(self, LEARNING_RATES[kind])
        return given if given is not None else self.learning_rate * OPTIMIZERS[self.optimizer].rates.get(kind, 1.0)

    @property
    def decay_steps(self) -> int:
        return round(self.decay_ratio * self.max_steps)


@dataclass
class MonitoringArguments(Settings):
    """What is measured on the way, and where it goes besides `metrics.jsonl` and `curves.png`."""

    logging_steps: int = option(10, "log every N steps", at_least=1)
    eval_steps: int = option(500, "evaluate every N steps, and at the end", at_least=1)
    max_eval_tokens: int = option(262_144, "evaluate on the first N held-out tokens; 0: on all of them", at_least=0)
    internals_steps: int = option(
        0,
        "log attention entropy, activations, gradient norms and update ratios every N steps; 0: never",
        at_least=0,
    )
    sample_every: int | None = option(
        None,
        "let the model continue sample_prompts every N steps (default: at each evaluation; 0: at the end only)",
        at_least=0,
    )
    sample_prompts: list[str] = option(
        [], "what the model continues (default: 'def' for Python source, else the beginning of a held-out line)"
    )
    report_to: list[str] = option([], f"trackers besides: {', '.join(TRACKERS)}")
    peak_tflops: float | None = option(
        None, "TFLOP/s that MFU is a share of (default: the data sheet of known GPUs)", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.report_to:
            if name not in TRACKERS:
                raise ValueError(f"report_to takes {', '.join(TRACKERS)}, got {name!r}{nearest_name(name, TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report_to {name} needs a package that is not installed: pip install {name}")
        for prompt in self.sample_prompts:  # else the first sample, after hundreds of steps, ends the run
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"sample_prompts has {prompt!r}, which is not valid UTF-8.") from None

    @property
    def steps_between_samples(self) -> int:
        """0 for samples at the end only."""
        return self.eval_steps if self.sample_every is None else self.sample_every


@dataclass
class RunArguments(Settings):
    """The run itself: where it lives, what it survives, and what it runs on."""

    output_dir: str | None = option(None, "folder of the run (default: runs/SIZE-DATASET)", common=True)
    overwrite: bool = option(False, "replace the run that is in output_dir")
    resume: bool = option(False, "go on with the run in output_dir, or with the newest", common=True)
    seed: int = option(42, "decides the initial weights, the order of the data, and dropout", at_least=0, below=2**32)
    save_steps: int = option(500, "write a checkpoint to resume from every N steps, and at the end", at_least=1)
    keep_last: int = option(2, "how many of the newest checkpoints to keep", at_least=1)
    keep_every: int = option(0, "keep for good every checkpoint whose step is a multiple of N; 0: none", at_least=0)
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written (a full disk): stop, or warn and train on"
    )
    async_save: bool | None = option(
        None,
        "write checkpoints in the background, from a copy in memory (default: large ones, where the copy has room)",
    )
    num_processes: int = option(
        1, "start N processes on this machine: one for each of its GPUs, or on CPUs (DDP)", at_least=1
    )
    ddp_timeout: int = option(
        1800, "seconds after which the processes no longer wait for one that hangs, and the run ends", at_least=1
    )
    bf16: bool | None = option(None, "bfloat16 autocast (default: where a GPU has it, or a CPU is faster with it)")
    tf32: bool | None = option(None, "TF32 in float32 products (default: where a GPU has it)")
    torch_compile: bool | None = option(
        None, "compile the model; slow to start, faster after (default: its blocks, in a long run on a CPU)"
    )
    compile_regions: bool = option(False, "with torch_compile: compile one block, for all of them")
    gradient_checkpointing: bool = option(False, "keep less in memory, and compute blocks again in the backward pass")

    def __post_init__(self) -> None:
        check_named(self, "output_dir")
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("Give one of --resume and --overwrite: the one goes on with a run, the other replaces it.")
        if self.compile_regions and not self.torch_compile:
            raise ValueError("compile_regions is a way of torch_compile: give both.")


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_named(arguments: object, *names: str) -> None:
    """Raises `ValueError` for an empty name, which a variable of the shell leaves that is not set."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and not value.strip():
            raise ValueError(f"{name} is empty: give it a name, or leave it out.")


def encoding_called(name: str) -> str:
    """The name that Python has for an encoding of text; raises `ValueError` where it has none."""
    try:
        b"a".decode(name, "ignore")  # refuses what is no encoding of text, such as base64
        codecs.getincrementaldecoder(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        known = sorted(
            {known for known in encodings.aliases.aliases.values() if not known.endswith(("_codec", "rot_13"))}
        )
        hint = nearest_name(name, known) or ", such as cp1252 or utf-16."
        raise ValueError(f"encoding must be one that Python knows, got {name!r}{hint}") from None


GROUPS = (
    ModelArguments, AdapterArguments, DataArguments, OptimizationArguments, MonitoringArguments, RunArguments,
)  # fmt: skip
CONFIG_HELP = "YAML file with any of these settings, or the name of one that comes with Mini, such as small"


@dataclass(frozen=True)
class Arguments:
    """The groups together."""

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    optimization: OptimizationArguments
    monitoring: MonitoringArguments
    run: RunArguments

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output_dir or RUNS_FOLDER / default_run_name(self))

    def with_max_steps(self, steps: int) -> "Arguments":
        """These settings with a number of steps in place of minutes."""
        optimization = dataclasses.replace(self.optimization, max_steps=steps, max_minutes=None)
        return dataclasses.replace(self, optimization=optimization)

    def save(self, path: Path) -> None:
        """Writes the resolved settings as YAML that `--config` and `--resume` read back."""
        write_text(path, dump_yaml(self.as_dict()))

    def are_those_of(self, folder: Path) -> bool:
        """Whether the run in a folder has these settings. One that was given minutes has the steps that fitted."""
        try:
            settings = yaml.safe_load(read_text(folder / "config.yaml"))
        except yaml.YAMLError:  # damaged
            return False
        own = yaml.safe_load(dump_yaml(self.as_dict()))
        if self.data.tokenizer is None and isinstance(settings, dict):
            settings.pop("tokenizer", None)  # of encoded text; older runs have the default there
        if own.pop("max_minutes", None) is not None and isinstance(settings, dict):
            for name in {"max_steps", "warmup_steps", "decay_ratio"} - own.keys():
                settings.pop(name, None)
        return settings == own

    def as_dict(self) -> dict[str, Any]:
        """The settings that were given or have a default, without what this one call was told to do."""
        groups = dataclasses.asdict(self).values()
        left_out = ["resume", "overwrite", "output_dir", "num_processes"]
        if self.model.model is not None:
            left_out.append("tokenizer")  # that of the model, wherever that has moved
        return {
            name: value
            for group in groups
            for name, value in group.items()
            if value is not None and name not in left_out
        }


def default_run_name(arguments: Arguments) -> str:
    """
    `tiny-python-stdlib`: the size and the last part of the dataset's name, in characters that every disk takes. In
    place of the size, the name of the run, folder or model that the run starts from; before it, the name of another
    class of model; `-lora` at the end for an adapter.
    """
    given = arguments.model.model or arguments.model.size
    start = run_of(Path(given)) or Path(display_name(given))
    stem = Path(arguments.data.dataset.rstrip("/")).name.split(".")[0]
    class_name = [arguments.model.model_class.split(":")[-1]] if arguments.model.model_class is not None else []
    names = (
        "".join(character if character.isalnum() or character in "-_" else "-" for character in name).strip("-")
        for name in (*class_name, start.name, stem)
    )
    return "-".join(name or "data" for name in names) + ("-lora" if arguments.adapter.lora_r else "")


def newest_run() -> Path:
    """The run under `runs/` that was written to last."""
    runs = [path.parent for path in RUNS_FOLDER.glob("*/config.yaml")]
    if not runs:
        raise ValueError(f"There is no run under {RUNS_FOLDER}/ to resume; start one without --resume.")
    return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))


def check_is_complete(path: Path) -> None:
    """
    Raises `ValueError` if the settings of a run were cut short: what is missing would be taken for its default. Every
    run has a seed, and its line stands near the end of the file.
    """
    if not re.search(r"^seed: \d+$", read_text(path), re.MULTILINE):
        raise ValueError(
            f"{path} is empty or cut short, so the settings of the run are not known: put a copy of it there, or start "
            f"anew with --overwrite."
        )


def find_config(name: str) -> Path:
    """
    The YAML file that `--config` means: a path, or the name of one that comes with Mini, such as `small`.

    Raises:
        ValueError: for a name of neither.
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    known = {file.stem: file for file in files_of_mini("configs/*.yaml")}
    if name not in known:
        raise ValueError(
            f"There is no configuration file {name!r}{nearest_name(name, list(known)) or '.'} With Mini come "
            f"{', '.join(sorted(known))}."
        )
    return known[name]


def files_of_mini(pattern: str) -> list[Path]:
    """The files of the repository that match: beside the modules, or where an installed Mini has put them."""
    found = list(Path(__file__).parents[1].glob(pattern))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("mini-lm") or []
        found += [Path(file.locate()) for file in files if file.match(f"share/mini/{pattern}")]
    return found


def find_base(name: str) -> str:
    """
    The checkpoint folder or Hub name that `--model` means.

    Raises:
        ValueError: if there is none, or it is an adapter.
    """
    checkpoint = find_checkpoint(name)
    folder = Path(checkpoint)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file():
        from modeling_mini.loading.adapters import base_of_adapter  # loads torch

        raise ValueError(
            f"{checkpoint!r} is an adapter for {base_of_adapter(checkpoint)!r}: train it further by --resume, or "
            f"merge it by --resume --merge in its run and start from the folder merged."
        )
    return checkpoint


def parse_arguments(argv: list[str]) -> Arguments:
    """
    The settings of a run from the command line.

    `--config FILE` reads a YAML file first; `--resume` reads the settings of the run that goes on. Flags win over both.

    Raises:
        ValueError: for anything that cannot be a run, in one sentence.
    """
    parser = ArgumentParser(GROUPS, description="Train a Mini language model, or go on with a trained one.")
    parser.others.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    known, _ = parser.parse_known_args(argv)
    yaml_path = find_config(known.config) if known.config is not None else None
    if known.resume:
        folder = Path(getattr(known, "output_dir", None) or newest_run())
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"There is no run in {str(folder)!r} to resume: it has no config.yaml.")
        if yaml_path is not None:
            raise ValueError(
                "--resume goes on with the settings of the run itself: give changes as flags, not by --config."
            )
        yaml_path = folder / "config.yaml"
        check_is_complete(yaml_path)
        argv = [*argv, f"--output_dir={folder}"]
    # A flag that says how long the run is replaces the other setting for that in the file.
    replaced: tuple[str, ...] = ("max_minutes",) if known.max_steps is not None else ()
    if known.max_minutes is not None:
        if known.resume:
            raise ValueError(
                "max_minutes is for new runs: a run that goes on has its length, or another by --max_steps."
            )
        replaced += ("max_steps", "warmup_steps")
    groups_of_run = parser.parse(argv, yaml_path, replaced=replaced)
    if groups_of_run[0].model is not None:
        # Muon's defaults were found for new models; what is trained already is tuned by AdamW unless told otherwise.
        groups_of_run = parser.parse(argv, yaml_path, {"optimizer": "adamw"}, replaced)
    elif known.resume:
        groups_of_run = parser.parse(argv, yaml_path, OLDER_RUN, replaced)
    model, adapter, data, optimization, monitoring, run, *_ = groups_of_run
    if model.model is None:
        if adapter.lora_r:
            raise ValueError("An adapter belongs to a trained model: name it by --model, or leave out --lora_r.")
        if not data.is_encoded:
            data.tokenizer = data.tokenizer or "byte"
        elif known.resume and known.tokenizer is None:
            data.tokenizer = None  # the default of the time stands in older runs, whatever had encoded their text
    else:
        model.model = find_base(model.model)
        if data.tokenizer not in (None, model.model):
            raise ValueError(f"The model {model.model!r} has a tokenizer of its own: leave out --tokenizer.")
        data.tokenizer = model.model
    if optimization.dropout_start is not None and run.torch_compile:
        raise ValueError("A dropout that changes would compile the model anew at each step: leave out --torch_compile.")
    return Arguments(model, adapter, data, optimization, monitoring, run)


def after_restart(arguments: Arguments, argv: list[str]) -> Arguments:
    """
    The settings of a run that torchrun has started again with the same flags, because one of its processes died
    (`--max_restarts`): the run goes on from its newest checkpoint, or begins again if it has none. Another run in the
    folder, whose settings are others, is left to the checks of every start.

    This holds with `--overwrite` too. Whether an earlier start wrote the run, or it was there before the first one,
    cannot be told on several machines: clocks differ, and a torchrun that joins is new. An old run of equal
    settings that goes on becomes the run that was asked for; a new one that is removed is lost.

    On several machines each torchrun counts its own restarts only, and one that joins has none. So there, a run goes
    on whenever the folder holds it already.
    """
    folder = arguments.output_dir
    count, most, machines = (
        int(os.environ.get(name, 0))
        for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE")
    )
    is_restart = (count > 0 or (most > 0 and machines > 1)) and not arguments.run.resume
    if not is_restart or not (folder / "config.yaml").is_file():
        return arguments
    if not arguments.are_those_of(folder):
        return arguments
    if list(folder.glob("checkpoints/step_*")):
        return parse_arguments(["--resume", f"--output_dir={folder}"])
    return parse_arguments([*argv, "--overwrite"])
