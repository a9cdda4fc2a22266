"""Checkpoint folders to use and share: self-contained, with a card of facts."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from cards_mini import CARD, Facts, public_settings, render
from files_mini import display_name, replace_folder, writing
from huggingface_hub import EvalResult, ModelCardData, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .arguments import AdapterArguments, Arguments
from .build import Run
from .checkpoints import TrainerState, check_is_finite
from .evaluation import Evaluation
from .lora import has_lora, lora_alpha, merged_model
from .optimizers import OPTIMIZERS
from .own_model import class_of, has_own_code, write_code

LARGEST_FILE = 2 * 10**9  # bytes of a file with weights of a sharded model, which one process holds at a time


def save_model(run: Run, name: str, evaluation: Evaluation | None) -> None:
    """
    Writes a checkpoint folder of a run to use and share: `best`, `final`, or `merged`, which is the model that the run
    started from with the best adapter in it. Every process calls it; if it fails on one, every one raises.

    Args:
        evaluation: the last one; `None` if there was none yet.

    Raises:
        DivergedError: if the weights are not finite.
        OSError: if the folder cannot be written.
    """
    state, error = run.state, None
    if name == "merged":
        state, evaluation = at_best(state, evaluation)
    with run.ema_weights():
        check_is_finite(run.folder, run.state, run.parallel, run.model)
        if run.parallel.is_sharded and not has_lora(run.unwrapped_model):
            save_sharded(run, run.folder / name, evaluation)
            return
        try:
            if name != "merged":
                model = run.parallel.gather_full_model(run.model)
            else:
                model = merged_model(run.arguments, run.folder / "best") if run.accelerator.is_main_process else None
            if model is not None:
                card = card_of(run, model, state, evaluation)
                save_checkpoint_folder(model, run.corpus.tokenizer, run.folder / name, card)
        except Exception as caught:  # the other processes wait for the outcome
            error = caught
    run.parallel.raise_everywhere(error)


def card_of(run: Run, model: PreTrainedModel, state: TrainerState, evaluation: Evaluation | None) -> str:
    prompts = run.corpus.beginnings(run.held_out)
    return model_card(model, run.arguments, state, evaluation, run.compressors, prompts, run.corpus.is_chat)


def save_sharded(run: Run, folder: Path, evaluation: Evaluation | None) -> None:
    """
    Writes the folder of a model that is sharded, and that nobody has whole: each process writes files with weights. It
    is the folder that `save_checkpoint_folder` writes of a whole model.

    Raises:
        OSError: on every process, if one of them could not write.
    """
    parallel, partial = run.parallel, folder.with_name(f".{folder.name}.partial")

    def write_all_but_weights() -> None:
        if not run.accelerator.is_main_process:
            return
        shutil.rmtree(partial, ignore_errors=True)
        with torch.device("meta"):  # all but its numbers
            model = AutoModelForCausalLM.from_config(run.config)
        model.generation_config = run.unwrapped_model.generation_config
        model.save_pretrained(partial, state_dict={})
        for path in partial.glob("*.safetensors*"):
            path.unlink()
        complete_folder(model, run.corpus.tokenizer, partial, card_of(run, model, run.state, evaluation))

    try:
        parallel.together(folder, write_all_but_weights)
        write_weights(run, partial, folder)
        parallel.together(folder, lambda: run.accelerator.is_main_process and replace_folder(partial, folder))
    except OSError:
        if run.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise


def write_weights(run: Run, partial: Path, folder: Path) -> None:
    """
    Writes the weights of a sharded model as transformers does, in files that the processes take in turns. A process
    holds one parameter, and those of its own file.
    """
    parallel, rank, processes = run.parallel, run.accelerator.process_index, run.accelerator.num_processes
    weights = saved_weights(run.unwrapped_model)
    shapes = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=LARGEST_FILE)
    for number, (file, names) in enumerate(split.filename_to_tensors.items()):
        mine = {}
        for name in names:
            weight = weights[name]
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if number % processes == rank:
                mine[name] = whole.cpu().contiguous()

        def write(file: str = file, mine: dict[str, torch.Tensor] = mine) -> None:
            if mine:
                save_file(mine, partial / file, metadata={"format": "pt"})

        parallel.together(folder, write)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"

        def write_index() -> None:
            if run.accelerator.is_main_process:
                (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

        parallel.together(folder, write_index)


def saved_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint has of a model: a weight that has two names by the one that is not tied to the other."""
    tied = model.all_tied_weights_keys
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}


def save_checkpoint_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """
    Writes a folder that `from_pretrained` and the Hub take: weights, configurations, code, tokenizer and card. Of an
    adapted model the weights are those of the adapter, and there is no code.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        if has_lora(model):
            # An adapter does not change the embedding, and peft would write it all the same.
            model.save_pretrained(partial, save_embedding_layers=False)
            model.generation_config.save_pretrained(partial)
        else:
            model.save_pretrained(partial)
        complete_folder(model, tokenizer, partial, card)
        replace_folder(partial, folder)


def complete_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, partial: Path, card: str) -> None:
    """Adds what stands beside the weights and the configuration."""
    if not has_lora(model):
        write_code(model, partial)
    tokenizer.save_pretrained(partial)
    (partial / CARD).write_text(card, encoding="utf-8")


def at_best(state: TrainerState, evaluation: Evaluation) -> tuple[TrainerState, Evaluation]:
    """
    The state and the evaluation of the best step, for the card of its weights.

    Args:
        evaluation: of any step. Bits per byte are the loss times the same number at each of them.
    """
    bits_per_byte = evaluation.bits_per_byte * state.best_loss / evaluation.loss
    best = dataclasses.replace(state, step=state.best_step, sequences=state.best_sequences)
    return best, Evaluation(state.best_loss, bits_per_byte)


def model_card(
    model: PreTrainedModel,
    arguments: Arguments,
    state: TrainerState,
    evaluation: Evaluation | None,
    compressors: dict[str, float],
    prompts: list[str] | None = None,
    is_chat: bool = False,
) -> str:
    """
    The card of a checkpoint or an adapter, from facts of the run alone.

    Args:
        prompts: beginnings of its corpus.
        is_chat: whether that corpus teaches conversations.
    """
    adapter, base, dataset = arguments.adapter, arguments.model.model, arguments.data.dataset
    optimizer = arguments.optimization.optimizer
    name = Path(dataset).name or dataset
    has_adapter = has_lora(model)
    results = []
    if evaluation is not None:
        results = [
            EvalResult("text-generation", name, f"{name}, held out", metric, value, metric_name=description)
            for metric, value, description in (
                ("bits_per_byte", evaluation.bits_per_byte, "Bits per byte"),
                ("perplexity", evaluation.perplexity, "Perplexity per token"),
                ("loss", evaluation.loss, "Cross-entropy in nats per token"),
            )
        ]
    data = ModelCardData(
        library_name="peft" if has_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["mini", "lora"] if has_adapter else ["mini"],
        # The Hub takes names of its own there, and no folder of somebody's disk.
        base_model=base if base is not None and not Path(base).exists() else None,
        model_name="Mini",
        eval_results=results or None,
    )
    has_code = model.config.model_type == "mini" or bool(getattr(model.config, "auto_map", None))
    rows = {"class": f"`{class_of(model).__module__}.{class_of(model).__name__}`"} if has_own_code(model) else {}
    if rows and not has_code:
        rows["code"] = "not in this folder: the class must be imported, and known to the Auto classes, before it loads"
    facts = Facts(
        kind="adapter" if has_adapter else "model",
        parameters=None if has_adapter else model.num_parameters(),
        context=model.config.max_position_embeddings,
        dataset=name,
        base=display_name(base) if base is not None else "",
        adapter=adapter_facts(adapter) if adapter.lora_r else "",
        is_merged=bool(adapter.lora_r) and not has_adapter,
        is_chat=is_chat,
        step=state.step,
        sequences=state.sequences,
        optimizer=OPTIMIZERS[optimizer].display_name,
        prompts=prompts or [],
        compressors=compressors,
        settings=public_settings(arguments.as_dict()),
        rows=rows,
    )
    config = {} if has_adapter else model.config.to_dict()
    return render(facts, data.to_dict(), config, trust_remote_code=has_adapter or has_code)


def adapter_facts(adapter: AdapterArguments) -> str:
    """The settings of an adapter, for people."""
    kind = "DoRA" if adapter.use_dora else "LoRA"
    layers = ", ".join(adapter.lora_target_modules) or "all linear layers of the blocks"
    in_full = f", {', '.join(adapter.lora_modules_to_save)} in full" if adapter.lora_modules_to_save else ""
    scale = f", alpha {lora_alpha(adapter):g}{' by the root of the rank' if adapter.use_rslora else ''}"
    rounded = f", the base in {adapter.quantization}" if adapter.quantization is not None else ""
    return f"{kind} of rank {adapter.lora_r}{scale}, on {layers}{in_full}{rounded}"
