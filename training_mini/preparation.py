"""What has to be right before a run begins: its settings on this machine, its folder, its model and its batches."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .arguments import Arguments
from .batches import RowMaker, TrainingBatches
from .checkpoints import architecture_of, check_state, methods_of, read_state, states_of
from .corpus import Corpus, is_encoded, make_tokenizer, tokenizer_key
from .streaming import StreamBatches, TokenStream


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
        architecture = architecture_of(arguments.model.model_config())
        known = {name: value for name, value in architecture.items() if name not in from_tokenizer}
        corpus = {}
        if not is_encoded(arguments.data):  # else it has its own tokenizer
            corpus["tokenizer"] = tokenizer_key(make_tokenizer(arguments.data))
        check_state(arguments.output_dir, state, corpus, known, methods_of(arguments.optimization))


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
    """A new model of the right vocabulary, with sampling settings that suit small models."""
    tokenizer = corpus.tokenizer
    bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    token_ids = {
        "bos_token_id": bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    config = arguments.model.model_config(vocab_size=len(tokenizer), **token_ids)
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**token_ids, do_sample=True, temperature=0.8, top_p=0.95)
    if arguments.run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def make_batches(arguments: Arguments, corpus: Corpus, config: PreTrainedConfig) -> TrainingBatches | StreamBatches:
    """The global batches of every step."""
    separator = config.eos_token_id if arguments.data.document_attention else None
    rows = RowMaker(config.max_position_embeddings, config.bos_token_id, separator)
    batch_size, seed = arguments.optimization.train_batch_size, arguments.run.seed
    if isinstance(corpus.train, TokenStream):
        return StreamBatches(corpus.train, rows, batch_size, seed)
    return TrainingBatches(corpus.train, rows, batch_size, seed)
