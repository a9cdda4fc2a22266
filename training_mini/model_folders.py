"""Checkpoint folders to use and share: self-contained, with a card of facts."""

import dataclasses
import shutil
from pathlib import Path

from cards_mini import CARD, Facts, public_settings, render
from files_mini import display_name, replace_folder, writing
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import AdapterArguments, Arguments
from .build import Run
from .checkpoints import TrainerState, check_is_finite
from .evaluation import Evaluation
from .lora import has_lora, lora_alpha, merged_model
from .optimizers import OPTIMIZERS
from .own_model import class_of, has_own_code, write_code


def save_model(run: Run, name: str, evaluation: Evaluation | None) -> None:
    """
    Writes a checkpoint folder of a run to use and share: `best`, `final`, or `merged`, which is the model that the run
    started from with the best adapter in it. Every process calls it; if it fails on the main one, every one raises.

    Args:
        evaluation: the last one; `None` if there was none yet.

    Raises:
        ValueError: if the weights are not finite.
        OSError: if the folder cannot be written.
    """
    state, error = run.state, None
    if name == "merged":
        state, evaluation = at_best(state, evaluation)
    with run.ema_weights():
        check_is_finite(run.folder, run.state, run.parallel, run.model)
        try:
            if name != "merged":
                model = run.parallel.gather_full_model(run.model)
            else:
                model = merged_model(run.arguments, run.folder / "best") if run.accelerator.is_main_process else None
            if model is not None:
                prompts = run.corpus.beginnings(run.held_out)
                card = model_card(model, run.arguments, state, evaluation, run.compressors, prompts)
                save_checkpoint_folder(model, run.corpus.tokenizer, run.folder / name, card)
        except Exception as caught:  # the other processes wait for the outcome
            error = caught
    run.parallel.raise_everywhere(error)


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
            write_code(model, partial)
        tokenizer.save_pretrained(partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        replace_folder(partial, folder)


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
) -> str:
    """The card of a checkpoint or an adapter, from facts of the run alone; `prompts` are beginnings of its corpus."""
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
