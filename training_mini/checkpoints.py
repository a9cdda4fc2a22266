"""What a run leaves behind: states to resume from, and self-contained checkpoint folders to use and share."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import Arguments
from .evaluation import Evaluation
from .files import replace_folder, writing


@dataclass
class TrainerState:
    """
    What a run knows beyond the model, the optimizer, the schedule and the random number generators.

    Attributes:
        step: optimizer steps done.
        best_loss: the lowest validation loss so far, in nats per token.
        best_step: where it was reached.
        corpus: the cache key of the corpus, so that a run is never resumed on other data.
        architecture: the shape of the model, for the same reason.
    """

    corpus: str
    architecture: dict[str, Any]
    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0


def save_state(accelerator: Accelerator, run_folder: Path, state: TrainerState, keep: int) -> Path:
    """
    Writes `checkpoints/step_N`, all that resuming needs, and removes all but the newest `keep`. Every process calls it.
    """
    checkpoints = run_folder / "checkpoints"
    target = checkpoints / f"step_{state.step}"
    partial = checkpoints / f".{target.name}.partial"
    with writing(target):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            replace_folder(partial, target)
            for old in complete_states(run_folder)[:-keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
    return target


def complete_states(run_folder: Path) -> list[Path]:
    """The states of a run, oldest first. A folder gets its name only when it is complete."""
    folders = [path.parent for path in run_folder.glob("checkpoints/step_*/trainer_state.json")]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What decides which weights fit a model; dropout may change from one leg of a run to the next."""
    names_and_versions = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in names_and_versions and not name.endswith("_dropout")
    }


def load_state(accelerator: Accelerator, run_folder: Path, expected: TrainerState) -> TrainerState:
    """
    Loads the newest state of a run into the prepared objects. Every process calls it.

    Raises:
        ValueError: if there is no state, or it belongs to another corpus or another model.
    """
    states = complete_states(run_folder)
    if not states:
        raise ValueError(f"{str(run_folder)!r} has no checkpoint to resume from; start it anew with --overwrite.")
    state = TrainerState(**json.loads((states[-1] / "trainer_state.json").read_text(encoding="utf-8")))
    if state.corpus != expected.corpus:
        raise ValueError(
            f"The run in {str(run_folder)!r} was trained on another corpus: its --dataset, its --tokenizer or the "
            f"files themselves have changed since; give the new data a run of its own with --output_dir."
        )
    changed = [
        f"{name} (was {state.architecture.get(name)}, now {value})"
        for name, value in expected.architecture.items()
        if state.architecture.get(name) != value
    ]
    if changed:
        raise ValueError(f"The run in {str(run_folder)!r} trains a model of another shape: {', '.join(changed)}.")
    accelerator.load_state(str(states[-1]))
    return state


def save_checkpoint_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Writes a folder that `from_pretrained` and the Hub take: weights, configurations, code, tokenizer and card."""
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        replace_folder(partial, folder)


def model_card(
    model: PreTrainedModel,
    arguments: Arguments,
    state: TrainerState,
    evaluation: Evaluation,
    compressors: dict[str, float],
) -> str:
    """The card of a checkpoint, from facts of the run alone."""
    config = model.config
    dataset = arguments.data.dataset
    run = arguments.run
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["mini"])
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    layers = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
    baselines = ", ".join(f"{name} -9 needs {bits:.3f}" for name, bits in compressors.items())
    content = f"""---
{data.to_yaml()}
---

# Mini, {model.num_parameters() / 1e6:.1f}M parameters

A small decoder-only language model, trained from scratch on `{Path(dataset).name or dataset}`.

```python
from transformers import pipeline

generator = pipeline("text-generation", model="PATH_OR_REPOSITORY", trust_remote_code=True)
print(generator("The", max_new_tokens=100)[0]["generated_text"])
```

| | |
|---|---|
| architecture | {layers}, {heads}, SwiGLU {config.intermediate_size} |
| context | {config.max_position_embeddings} tokens |
| vocabulary | {config.vocab_size} ({arguments.data.tokenizer} tokenizer) |
| training | {state.step} steps of {run.train_batch_size} x {config.max_position_embeddings} tokens, AdamW, \
peak learning rate {run.learning_rate:g}, seed {run.seed} |
| validation loss | {evaluation.loss:.4f} nats per token |
| bits per byte | {evaluation.bits_per_byte:.4f} ({baselines}, on the same held-out bytes) |
"""
    return str(ModelCard(content))
