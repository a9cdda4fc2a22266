"""The training loop: from settings to a trained, evaluated, saved model."""

import contextlib
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .arguments import Arguments
from .batches import TrainingBatches
from .checkpoints import TrainerState, load_state, model_card, save_checkpoint_folder, save_state
from .corpus import Corpus, load_corpus
from .evaluation import Evaluation, compressor_bits_per_byte, evaluate
from .monitoring import Monitor, draw_curves
from .optimization import make_optimizer, make_scheduler


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to, for the report of the entry point."""

    folder: Path
    state: TrainerState
    interrupted: bool
    seconds: float
    evaluation: Evaluation | None = None
    compressors: dict[str, float] | None = None
    evaluated_bytes: int = 0
    sample: str = ""
    is_main_process: bool = True


def train(arguments: Arguments) -> TrainingResult:
    """
    Trains a model as the arguments say, or goes on with a run.

    Raises:
        ValueError: for input that cannot work, before anything that exists is changed.
    """
    started = time.monotonic()
    run = arguments.run
    # Both would break into the live display at every save: a bar for one file, and a note that the tied head is saved
    # once (it is tied again when the state is loaded).
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator = make_accelerator(arguments)
    folder = claim_folder(arguments, accelerator)
    try:
        check_batch(arguments, accelerator)
        corpus = load_corpus(arguments.data, show_progress=accelerator.is_local_main_process)
        set_seed(run.seed)
        model = make_model(arguments, corpus)
        context_length = model.config.max_position_embeddings
        bos_token_id = model.config.bos_token_id
        batches = TrainingBatches(corpus.train, context_length, run.train_batch_size, bos_token_id, run.seed)
        held_out = corpus.validation[: run.max_eval_tokens]
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty: this run has not begun
        raise

    optimizer = make_optimizer(model, arguments.run)
    scheduler = make_scheduler(optimizer, arguments.run)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not through `prepare`, which would step the schedule once for each process.
    accelerator.register_for_checkpointing(scheduler)
    state = TrainerState(corpus=corpus.folder.name)
    if run.resume:
        state = load_state(accelerator, folder, state.corpus)
    else:
        set_seed(run.seed + accelerator.process_index)  # dropout differs between processes
    if accelerator.is_main_process:
        if run.overwrite:
            empty(folder)
        arguments.save(folder / "config.yaml")
    accelerator.wait_for_everyone()
    if run.torch_compile:
        model.compile()

    held_out_text = corpus.text_of(held_out)
    compressors = compressor_bits_per_byte(held_out_text)
    tokens_per_byte = len(held_out) / max(1, int(corpus.bytes_per_token[held_out].sum()))
    monitor = Monitor(folder, state.step, run.max_steps, enabled=accelerator.is_main_process)
    monitor.say(describe(accelerator.unwrap_model(model), corpus, accelerator, state))
    evaluation: Evaluation | None = None
    tokens_per_step = run.train_batch_size * context_length
    loss_sum = torch.zeros((), device=accelerator.device)
    logged_step, clock = state.step, time.monotonic()

    def evaluate_and_keep_best() -> Evaluation:
        result = evaluate(
            model, held_out, corpus.bytes_per_token, context_length, run.train_batch_size, bos_token_id, accelerator
        )
        monitor.record(
            state.step,
            {
                "eval_loss": result.loss,
                "eval_perplexity": result.perplexity,
                "eval_bits_per_byte": result.bits_per_byte,
            },
        )
        is_best = result.loss < state.best_loss
        monitor.say(
            f"step {state.step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"bits per byte {result.bits_per_byte:.4f} "
            f"({', '.join(f'{name} -9: {bits:.4f}' for name, bits in compressors.items())})"
            f"{' - best so far' if is_best else ''}"
        )
        if is_best:
            state.best_loss, state.best_step = result.loss, state.step
            if accelerator.is_main_process:
                unwrapped = accelerator.unwrap_model(model)
                card = model_card(unwrapped, arguments, state, result, compressors)
                save_checkpoint_folder(unwrapped, corpus.tokenizer, folder / "best", card)
        if accelerator.is_main_process:
            draw_curves(folder, f"{folder.name}: {corpus.name}", tokens_per_byte, compressors)
        return result

    with delayed_interrupt() as interrupt, contextlib.closing(monitor):
        model.train()
        while state.step < run.max_steps and not anyone(interrupt.requested, accelerator):
            parts = list(
                batches.micro_batches(
                    state.step, accelerator.process_index, accelerator.num_processes, run.gradient_accumulation_steps
                )
            )
            for number, (inputs, targets) in enumerate(parts):
                is_last = number == len(parts) - 1
                inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    # The sum over the tokens of the whole batch, in shares that gradient averaging adds up again.
                    loss = model(
                        input_ids=inputs,
                        labels=targets,
                        shift_labels=targets,
                        num_items_in_batch=tokens_per_step // accelerator.num_processes,
                        use_cache=False,
                    ).loss
                    accelerator.backward(loss)
                loss_sum += loss.detach()
            # A limit of infinity clips nothing and still measures the norm.
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), run.max_grad_norm or math.inf)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            state.step += 1

            if state.step % run.logging_steps == 0 or state.step == run.max_steps:
                steps = state.step - logged_step
                mean_loss = accelerator.reduce(loss_sum, reduction="mean").item() / steps
                if not math.isfinite(mean_loss):
                    raise ValueError(
                        f"The loss is {mean_loss} at step {state.step}: go on from the last checkpoint with --resume "
                        f"and a lower --learning_rate."
                    )
                metrics = {
                    "loss": mean_loss,
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_second": steps * tokens_per_step / (time.monotonic() - clock),
                    "tokens": state.step * tokens_per_step,
                    "epoch": batches.epoch_of(state.step),
                }
                monitor.training_step(state.step, metrics, mean_loss / math.log(2) * tokens_per_byte)
                loss_sum.zero_()
                logged_step, clock = state.step, time.monotonic()

            pause = time.monotonic()
            if state.step % run.eval_steps == 0 or state.step == run.max_steps:
                evaluation = evaluate_and_keep_best()
            if state.step % run.save_steps == 0 or state.step == run.max_steps:
                save_state(accelerator, folder, state, run.save_total_limit)
            clock += time.monotonic() - pause  # tokens per second are those of training

        interrupted = state.step < run.max_steps
        if interrupted:
            save_state(accelerator, folder, state, run.save_total_limit)
        elif evaluation is None:  # resumed at its end
            evaluation = evaluate_and_keep_best()

    seconds = time.monotonic() - started
    if interrupted:
        return TrainingResult(folder, state, True, seconds, is_main_process=accelerator.is_main_process)
    sample = ""
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        card = model_card(unwrapped, arguments, state, evaluation, compressors)
        save_checkpoint_folder(unwrapped, corpus.tokenizer, folder / "final", card)
        prompt = run.sample_prompt or ("def " if corpus.name == "python-stdlib" else "\n")
        sample = write_sample(unwrapped, corpus, prompt, run.seed)
    accelerator.end_training()
    return TrainingResult(
        folder, state, False, seconds, evaluation, compressors, len(held_out_text), sample, accelerator.is_main_process
    )


def make_accelerator(arguments: Arguments) -> Accelerator:
    """The accelerator, with bfloat16 where a GPU has it unless the user decided."""
    bf16 = arguments.run.bf16
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what is not autocast
        bf16 = torch.cuda.is_bf16_supported() if bf16 is None else bf16
    return Accelerator(mixed_precision="bf16" if bf16 else "no")


def check_batch(arguments: Arguments, accelerator: Accelerator) -> None:
    run = arguments.run
    shares = accelerator.num_processes * run.gradient_accumulation_steps
    if run.train_batch_size % shares:
        raise ValueError(
            f"train_batch_size ({run.train_batch_size}) must be divisible by the number of processes "
            f"({accelerator.num_processes}) times gradient_accumulation_steps ({run.gradient_accumulation_steps})."
        )


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
        model.gradient_checkpointing_enable()
    return model


def describe(model: PreTrainedModel, corpus: Corpus, accelerator: Accelerator, state: TrainerState) -> str:
    """One line of what is about to happen."""
    where = f"{accelerator.num_processes} x {accelerator.device.type}"
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    beginning = f"Resuming at step {state.step}" if state.step else "Training"
    return (
        f"{beginning}: {model.num_parameters() / 1e6:.2f}M parameters on {len(corpus.train):,} tokens of {corpus.name} "
        f"({len(corpus.validation):,} held out), {where}, {precision}."
    )


def write_sample(model: PreTrainedModel, corpus: Corpus, prompt: str, seed: int) -> str:
    """What the model makes of a prompt, as far as its context goes."""
    set_seed(seed)
    model.eval()
    ids = corpus.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    length = model.config.max_position_embeddings
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=length, min_new_tokens=length // 2)
    return corpus.tokenizer.decode(output[0], skip_special_tokens=True)


@dataclass
class InterruptRequest:
    requested: bool = False


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[InterruptRequest]:
    """Lets the first Ctrl-C wait for the end of a step; the second one is immediate."""
    request = InterruptRequest()

    def handler(signum: int, frame: object) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


def anyone(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any process: all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item() > 0
