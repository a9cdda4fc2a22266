"""
Checkpoints to resume from: `checkpoints/step_N`. What is in them, what is compared with their checksums before they are
read, and which of them a run can go on from. checkpoint_writer.py writes them.

torch.distributed.checkpoint saves the weights and the optimizer. Each process writes its own part, and any number of
processes can load the whole, sharded or not.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from files_mini import read_json
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from transformers import PreTrainedConfig

from .arguments import Arguments, OptimizationArguments
from .cpu_attention import BLOCKS, FUSED
from .distributed import Parallel
from .lora import has_lora
from .optimization import ExponentialMovingAverage

PARTS_OF_AN_ADAPTER = (
    "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora"
)  # fmt: skip
CHECKSUMS = "checksums.json"
STATE = "trainer_state.json"


class NewerStateError(ValueError):
    """A checkpoint was written by a version of Mini that records more than this one knows. It is not damaged."""


class DivergedError(ValueError):
    """Training cannot go on: gradients, weights or the loss on held-out text are not finite."""


@dataclass
class TrainerState:
    """
    What a run knows beyond the weights and the optimizer. The learning rate, the order of the data and the random
    numbers are functions of the step.

    Attributes:
        corpus: what decides the token ids. On resume it must be the same, and so must the next three.
        architecture: the shape of the model.
        methods: what decides which other tensors there are: the optimizer, the moving average, the adapter.
        order: what decides the order of the data, besides the batch size.
        step: optimizer steps done.
        sequences: sequences that they read; `None` in checkpoints of older versions, which did not count them.
        best_loss: the lowest validation loss so far, in nats per token.
        best_step: where it was reached.
        best_sequences: sequences that had been read by then; `None` in checkpoints of older versions.
        evaluated_step: where the last evaluation was.
        evaluations_since_best: how many evaluations since then were no better.
        skipped_steps: steps whose gradients were not finite.
        skipped_since: the first of the skipped steps that the run is in the middle of, or `None`.
        tracker_id: the name under which trackers know the run.
        stream: the position in the stream of a dataset.
        products: the matrix products that oneDNN computes on a CPU; see cpu_kernels.py.
        is_bfloat16: whether a CPU computes in bfloat16 autocast, because that is faster.
        attention: how a CPU computes attention; see cpu_attention.py.
        is_compiled: whether the blocks of the model are compiled for a CPU.
        processor: the one for which the last four were chosen; empty if the run has not been on a CPU.
    """

    corpus: dict[str, Any]
    architecture: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    sequences: int | None = 0
    best_loss: float = float("inf")
    best_step: int = 0
    best_sequences: int | None = None
    evaluated_step: int = 0
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    skipped_since: int | None = None
    tracker_id: str = ""
    stream: dict[str, Any] = field(default_factory=dict)
    products: dict[str, list[str]] = field(default_factory=dict)
    is_bfloat16: bool = False
    attention: str = FUSED
    is_compiled: bool = False
    processor: str = ""

    def is_over(self, optimization: OptimizationArguments) -> bool:
        """Whether the run has done all of its steps, or has ended early."""
        ended_early = 0 < optimization.early_stopping_patience <= self.evaluations_since_best
        return ended_early or self.step >= optimization.max_steps


@dataclass
class Weights:
    """The tensors of a checkpoint."""

    parallel: Parallel
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: ExponentialMovingAverage | None

    @property
    def has_lora(self) -> bool:
        return has_lora(self.parallel.accelerator.unwrap_model(self.model))

    def save(self, folder: Path) -> None:
        if self.parallel.is_deepspeed:
            self.parallel.accelerator.save_state(str(folder))
        else:
            save_tensors(without_settings(self.tensors()), folder)

    def load(self, folder: Path) -> None:
        """Loads the tensors. The settings of the optimizers are not loaded: the present command decides them."""
        if self.parallel.is_deepspeed:
            self.parallel.accelerator.load_state(str(folder))
            return
        tensors = self.tensors()
        ignore_being_alone()
        dcp.load(without_settings(tensors), checkpoint_id=folder)
        if self.has_lora:  # the tensors are the parameters themselves, and have been loaded in place
            set_optimizer_state_dict(self.model, self.optimizers, tensors["optimizer"])
        else:
            set_state_dict(
                self.model,
                self.optimizers,
                model_state_dict=tensors["model"],
                optim_state_dict=tensors["optimizer"],
            )

    def tensors(self) -> dict[str, Any]:
        """
        The tensors themselves, not copies; of a sharded model, the part of this process. With the settings of the
        optimizers, which torch asks for when it loads them.
        """
        if self.has_lora:
            # Weights that are not trained are in the checkpoint that the run started from.
            unwrapped = self.parallel.accelerator.unwrap_model(self.model)
            model = {name: p.detach() for name, p in unwrapped.named_parameters() if p.requires_grad}
            optimizer = get_optimizer_state_dict(self.model, self.optimizers)
        else:
            model, optimizer = get_state_dict(self.model, self.optimizers)
        tensors = {"model": model, "optimizer": optimizer}
        if self.ema is not None:
            tensors["average"] = self.ema.averages
        return tensors


def without_settings(tensors: dict[str, Any]) -> dict[str, Any]:
    """
    The tensors without the settings of the optimizers: another version of Mini may have had others, and torch takes as
    long to write one of them as a small tensor.
    """
    return {**tensors, "optimizer": {"state": tensors["optimizer"]["state"]}}


def save_tensors(tensors: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """
    Writes tensors into a folder. Every process calls it.

    Args:
        group: the processes, where they are not to meet in the default group.
    """
    ignore_being_alone()
    dcp.save(tensors, checkpoint_id=folder, process_group=group)


def ignore_being_alone() -> None:
    """torch warns, at each save, that there is only one process."""
    # Not within `catch_warnings`: that is for one thread only, and checkpoints are written in another one.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal; a large file is not held in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def states_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. A folder gets its name only when it is complete."""
    folders = [path for path in run_folder.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def advice_of_sound_state(run_folder: Path, state: TrainerState) -> str:
    """The end of a sentence: how to go on after training that went wrong at the step of `state` or before it."""
    wrong_since = state.skipped_since if state.skipped_since is not None else state.step
    sound = [step_of(folder) for folder in states_of(run_folder) if step_of(folder) < wrong_since]
    if sound:
        return f"the checkpoint of step {sound[-1]} is sound: go on from it with --resume and a lower --learning_rate"
    return "there is no checkpoint from before; start anew with --overwrite and a lower --learning_rate"


def check_is_finite(run_folder: Path, state: TrainerState, parallel: Parallel, model: nn.Module) -> None:
    """
    Every process calls it, with its part of the model.

    Raises:
        DivergedError: on every process, if a weight is NaN or infinite.
    """
    local = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    wrong = next((name for name, tensor in local.items() if not tensor.isfinite().all()), None)
    if parallel.anyone(wrong is not None):
        name = f" ({wrong})" if wrong is not None else ""
        raise DivergedError(
            f"After step {state.step} the weights are not finite{name}; {advice_of_sound_state(run_folder, state)}."
        )


def damage_of(folder: Path) -> str:
    """
    What is wrong with a checkpoint, or an empty string.

    Raises:
        NewerStateError: as `read_state`.
    """
    try:
        sums = read_json(folder / CHECKSUMS)
        for name, expected in sums.items():
            if sha256(folder / name) != expected:
                return f"{name} does not match its checksum"
        read_state(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except NewerStateError:
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} or {STATE} cannot be read"
    return ""


def read_state(folder: Path) -> TrainerState:
    """
    The state in a checkpoint.

    Raises:
        NewerStateError: if it has something that this version does not know.
        OSError, ValueError, TypeError: if it is damaged.
    """
    state = {"sequences": None} | read_json(folder / STATE)
    if state.pop("has_blocks", False):  # of a version that had two kinds of attention
        state["attention"] = BLOCKS
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        raise NewerStateError(
            f"{folder} was written by a newer version of Mini, which records {' and '.join(unknown)}: go on with that "
            f"version."
        )
    return TrainerState(**state)


def find_state(run_folder: Path) -> tuple[Path, list[str]]:
    """
    The newest complete checkpoint, and a sentence for each newer one that is damaged. Those are renamed to
    `step_N.damaged`.

    Raises:
        ValueError: if there is none, or a newer version of Mini has written it.
    """
    problems = []
    for folder in reversed(states_of(run_folder)):
        damage = damage_of(folder)
        if not damage:
            return folder, problems
        problems.append(f"{folder} is damaged ({damage}); going back to the checkpoint before it.")
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    if problems:
        raise ValueError(f"Every checkpoint in {str(run_folder)!r} is damaged; start it anew with --overwrite.")
    raise ValueError(f"{str(run_folder)!r} has no checkpoint to resume from; start it anew with --overwrite.")


def check_state(
    run_folder: Path,
    state: TrainerState,
    corpus: dict[str, Any],
    architecture: dict[str, Any],
    methods: dict[str, Any],
    order: dict[str, Any],
) -> None:
    """
    Raises:
        ValueError: if the state belongs to another corpus, another model, other methods or another order of the data.
            The error names what differs. Only the given names are compared.
    """
    different = [name for name, value in corpus.items() if state.corpus.get(name) != value]
    if different:
        raise ValueError(
            f"The run in {str(run_folder)!r} was trained on another corpus: another {' and another '.join(different)}; "
            f"give the new data a run of its own with --output_dir."
        )
    if changed := changes(state.architecture, architecture):
        raise ValueError(f"The run in {str(run_folder)!r} trains a model of another shape: {changed}.")
    # Old states have no methods.
    if state.methods and (changed := changes(state.methods, methods)):
        raise ValueError(
            f"The run in {str(run_folder)!r} cannot go on with other methods than it began with, for its checkpoint "
            f"has no state of them: {changed}."
        )
    if changed := changes(state.order, {name: value for name, value in order.items() if name in state.order}):
        raise ValueError(
            f"The run in {str(run_folder)!r} would go on in another order of its data, so that some is read twice and "
            f"some never: {changed}; leave that as it was."
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, as part of a sentence."""
    return ", ".join(
        f"{name} (was {before.get(name)}, now {value})" for name, value in now.items() if before.get(name) != value
    )


def methods_of(arguments: Arguments) -> dict[str, Any]:
    """The optimizer, whether there is an average of the weights, and what defines an adapter."""
    optimization, adapter = arguments.optimization, arguments.adapter
    methods = {"optimizer": optimization.optimizer, "average of the weights": optimization.ema_decay > 0}
    methods["lora_r"] = None  # a run without an adapter
    if adapter.lora_r:
        methods |= {name: getattr(adapter, name) for name in PARTS_OF_AN_ADAPTER}
        methods |= {"quantization": adapter.quantization, "weights of --model": digest_of(arguments.model.model)}
    return methods


def order_of(arguments: Arguments, has_examples: bool) -> dict[str, Any]:
    """What decides the order of the data, besides the batch size. Examples with nothing to learn are left out."""
    order: dict[str, Any] = {"seed": arguments.run.seed}
    if has_examples:
        order["assistant_only_loss"] = arguments.data.assistant_only_loss is not False
    return order


def digest_of(checkpoint: str) -> str | None:
    """A hash of the weights in a folder; `None` for a name of the Hub."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:20] if files else None


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings that decide which weights fit a model. Dropout is not one: it may change when a run is resumed."""
    names_and_versions = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in names_and_versions and not name.endswith("_dropout")
    }
