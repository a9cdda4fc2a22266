"""What has to be right before a run begins: its settings on this machine, its folder, its model and its batches."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from modeling_mini.loading.checkpoints import load_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .arguments import Arguments
from .checkpoints import architecture_of, check_state, methods_of, read_state, states_of
from .data.batches import RowMaker, TrainingBatches
from .data.corpus import Corpus, is_encoded, make_tokenizer, tokenizer_key
from .data.packing import ExampleBatches, ExampleRows, HeldOutExamples
from .data.streaming import StreamBatches, TokenStream
from .evaluation import HeldOut, HeldOutText
from .lora import adapt


def check_settings(arguments: Arguments, accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: for settings that cannot work with so many processes, or with the checkpoint that is to go on;
            before any data is read.
    """
    optimization = arguments.optimization
    shares = accelerator.num_processes * optimization.gradient_accumulation_steps
    if optimization.train_batch_size % shares:
        raise ValueError(
            f"train_batch_size ({optimization.train_batch_size}) must be divisible by the number of processes "
            f"({accelerator.num_processes}) times gradient_accumulation_steps "
            f"({optimization.gradient_accumulation_steps})."
        )
    if arguments.run.resume and (states := states_of(arguments.output_dir)):
        try:
            state = read_state(states[-1])
        except (OSError, ValueError, TypeError):
            return  # damaged: the one before it is used, and checked, when it is loaded
        from_tokenizer = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        known = {}
        if arguments.model.model is None:  # else its shape is known once it is loaded
            architecture = architecture_of(arguments.model.model_config())
            known = {name: value for name, value in architecture.items() if name not in from_tokenizer}
        corpus = {}
        if not is_encoded(arguments.data):  # else it has its own tokenizer
            corpus["tokenizer"] = tokenizer_key(make_tokenizer(arguments.data))
        check_state(arguments.output_dir, state, corpus, known, methods_of(arguments))


def claim_folder(arguments: Arguments, accelerator: Accelerator) -> Path:
    """
    Makes sure that the run can write to its folder, and that nobody's work is in it.

    Raises:
        ValueError: if a run, or anything else, is there already.
    """
    folder, run = arguments.output_dir, arguments.run
    is_run = (folder / "config.yaml").is_file()
    if folder.is_dir() and any(folder.iterdir()) and not run.resume:
        if not is_run:
            raise ValueError(f"{str(folder)!r} holds files that are not a run of Mini; choose another --output_dir.")
        if not run.overwrite:
            raise ValueError(
                f"There is a run in {str(folder)!r} already: go on with it by --resume, replace it by --overwrite, "
                f"or choose another --output_dir."
            )
    accelerator.wait_for_everyone()  # nobody makes the folder before all have looked
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    return folder


def empty(folder: Path) -> None:
    """Removes what a run has written."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_model(arguments: Arguments, corpus: Corpus) -> PreTrainedModel:
    """
    The model that learns: a new one of the right vocabulary, with sampling settings that suit small models, or a
    trained one, with an adapter around it if that was asked for. It knows how what it is taught to say ends.
    """
    model = new_model(arguments, corpus) if arguments.model.model is None else trained_model(arguments)
    corpus.tokenizer.model_max_length = model.config.max_position_embeddings
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known] if known is not None else []
    if new := [token for token in corpus.end_ids if token not in known]:
        model.generation_config.eos_token_id = [*known, *new]
    if arguments.run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return adapt(model, arguments.adapter) if arguments.adapter.lora_r else model


def new_model(arguments: Arguments, corpus: Corpus) -> PreTrainedModel:
    tokenizer = corpus.tokenizer
    bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    token_ids = {
        "bos_token_id": bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    config = arguments.model.model_config(vocab_size=len(tokenizer), **token_ids)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**token_ids, do_sample=True, temperature=0.8, top_p=0.95)
    return model


def trained_model(arguments: Arguments) -> PreTrainedModel:
    """
    The checkpoint of `--model`, with the dropout that was asked for.

    Raises:
        ValueError: if it cannot be loaded, or is no checkpoint that can be trained.
    """
    name, quantization = arguments.model.model, arguments.adapter.quantization
    model, _ = load_checkpoint(name, dtype=torch.float32, quantization=quantization)
    if getattr(model, "is_quantized", False) and not arguments.adapter.lora_r:
        raise ValueError(
            f"The weights of {name!r} are quantized and cannot be trained: give --lora_r 8 for an adapter."
        )
    for field, probability in arguments.model.dropouts.items():
        if not hasattr(model.config, field):
            raise ValueError(f"The model {name!r} has no {field}.")
        setattr(model.config, field, probability)
        for module in model.modules():
            part = getattr(module, field, None)
            if isinstance(part, nn.Dropout):
                part.p = probability
            elif isinstance(part, float):
                setattr(module, field, probability)
    return model


def make_batches(
    arguments: Arguments, corpus: Corpus, config: PreTrainedConfig
) -> tuple[TrainingBatches | StreamBatches | ExampleBatches, HeldOut]:
    """
    The global batches of every step, and what is held out.

    Raises:
        ValueError: if there is too little to learn from.
    """
    batch_size, seed = arguments.optimization.train_batch_size, arguments.run.seed
    max_eval_tokens = arguments.monitoring.max_eval_tokens
    said_only = arguments.data.assistant_only_loss
    if corpus.kind is not None:
        if said_only and not corpus.marks_what_is_said:
            raise ValueError(
                "The chat template of the tokenizer does not mark what the assistant says by {% generation %}, so "
                "nobody knows what to learn; --assistant_only_loss false learns every token."
            )
        settings = config.max_position_embeddings, config.pad_token_id or 0, said_only is not False
        rows, held_out_rows = (ExampleRows(examples, *settings) for examples in (corpus.train, corpus.validation))
        return ExampleBatches(rows, batch_size, seed), HeldOutExamples(
            held_out_rows, corpus.bytes_per_token, max_eval_tokens
        )
    if said_only:
        raise ValueError(
            f"assistant_only_loss needs records with messages, or with prompt and completion, and "
            f"{arguments.data.dataset!r} is text."
        )
    separator = config.eos_token_id if arguments.data.document_attention else None
    rows = RowMaker(config.max_position_embeddings, config.bos_token_id, separator)
    held_out = HeldOutText(corpus.validation[: max_eval_tokens or None], corpus.bytes_per_token, rows)
    if isinstance(corpus.train, TokenStream):
        return StreamBatches(corpus.train, rows, batch_size, seed), held_out
    return TrainingBatches(corpus.train, rows, batch_size, seed), held_out
