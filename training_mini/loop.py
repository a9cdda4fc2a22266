"""The training loop: from settings to a trained, evaluated, saved model."""

import contextlib
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .arguments import Arguments
from .batches import TrainingBatches
from .checkpoints import TrainerState, architecture_of, load_state, model_card, save_checkpoint_folder, save_state
from .corpus import Corpus, load_corpus
from .evaluation import Evaluation, compressor_bits_per_byte, evaluate
from .monitoring import Monitor, draw_curves
from .optimization import make_optimizer, make_scheduler


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to, for the report of the entry point; without evaluation and sample if interrupted."""

    folder: Path
    state: TrainerState
    interrupted: bool
    seconds: float
    evaluation: Evaluation | None
    compressors: dict[str, float]
    evaluated_bytes: int
    sample: str
    is_main_process: bool


def train(arguments: Arguments) -> TrainingResult:
    """
    Trains a model as the arguments say, or goes on with a run.

    Raises:
        ValueError: for input that cannot work, before anything that exists is changed.
    """
    # Both would break into the live display at every save: a bar for one file, and a note that the tied head is saved
    # once (it is tied again when the state is loaded).
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    return Trainer(arguments).train()


class Trainer:
    """One run: what it is made of, and its loop. The order of the methods is the order in which things happen."""

    def __init__(self, arguments: Arguments) -> None:
        self.started = time.monotonic()
        self.arguments, self.run = arguments, arguments.run
        self.accelerator = make_accelerator(arguments)
        self.folder = claim_folder(arguments, self.accelerator)
        try:
            check_batch(arguments, self.accelerator)
            self.corpus = load_corpus(arguments.data, show_progress=self.accelerator.is_local_main_process)
            set_seed(self.run.seed)
            model = make_model(arguments, self.corpus)
            self.config = model.config
            self.batches = TrainingBatches(
                self.corpus.train,
                self.config.max_position_embeddings,
                self.run.train_batch_size,
                self.config.bos_token_id,
                self.run.seed,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it is empty: this run has not begun
            raise
        optimizer = make_optimizer(model, self.run)
        self.scheduler = make_scheduler(optimizer, self.run)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Not through `prepare`, which would step the schedule once for each process.
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.state = TrainerState(corpus=self.corpus.folder.name, architecture=architecture_of(self.config))
        self.tokens_per_step = self.run.train_batch_size * self.config.max_position_embeddings

        self.held_out = self.corpus.validation[: self.run.max_eval_tokens]
        held_out_text = self.corpus.text_of(self.held_out)
        self.held_out_bytes = len(held_out_text)
        self.compressors = compressor_bits_per_byte(held_out_text)
        self.tokens_per_byte = len(self.held_out) / max(1, int(self.corpus.bytes_per_token[self.held_out].sum()))

    def train(self) -> TrainingResult:
        """The loop: steps, and what is due between them."""
        self.begin()
        evaluation: Evaluation | None = None
        with delayed_interrupt() as interrupt, contextlib.closing(self.monitor):
            while self.state.step < self.run.max_steps and not anyone(interrupt.requested, self.accelerator):
                self.training_step()
                is_last = self.state.step == self.run.max_steps
                if self.state.step % self.run.logging_steps == 0 or is_last:
                    self.log()
                pause = time.monotonic()
                if self.state.step % self.run.eval_steps == 0 or is_last:
                    evaluation = self.evaluate()
                if self.state.step % self.run.save_steps == 0 or is_last:
                    self.save()
                self.logged_at += time.monotonic() - pause  # tokens per second are those of training
            if self.state.step < self.run.max_steps:
                self.save()
                return self.result(interrupted=True)
            evaluation = evaluation or self.evaluate()  # a run that was resumed at its end has none yet
        return self.finish(evaluation)

    def begin(self) -> None:
        """Loads the state to go on from, or takes possession of the folder."""
        if self.run.resume:
            self.state = load_state(self.accelerator, self.folder, self.state)
        else:
            set_seed(self.run.seed + self.accelerator.process_index)  # dropout differs between processes
        if self.accelerator.is_main_process:
            if self.run.overwrite:
                empty(self.folder)
            self.arguments.save(self.folder / "config.yaml")
        self.accelerator.wait_for_everyone()
        if self.run.torch_compile:
            self.model.compile()
        self.model.train()
        enabled = self.accelerator.is_main_process
        self.monitor = Monitor(self.folder, self.state.step, self.run.max_steps, enabled)
        self.monitor.say(self.description())
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.logged_step, self.logged_at = self.state.step, time.monotonic()

    def description(self) -> str:
        """One line of what is about to happen."""
        accelerator, corpus = self.accelerator, self.corpus
        beginning = f"Resuming at step {self.state.step}" if self.state.step else "Training"
        precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
        threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
        parameters = f"{self.unwrapped_model.num_parameters() / 1e6:.2f}M parameters"
        return (
            f"{beginning}: {parameters} on {len(corpus.train):,} tokens of {corpus.name} "
            f"({len(corpus.validation):,} held out), "
            f"{accelerator.num_processes} x {accelerator.device.type}{threads}, {precision}."
        )

    @property
    def unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def training_step(self) -> None:
        """One optimizer step on this process's share of the global batch."""
        accelerator = self.accelerator
        parts = self.run.gradient_accumulation_steps
        micro_batches = self.batches.micro_batches(
            self.state.step, accelerator.process_index, accelerator.num_processes, parts
        )
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
            with contextlib.nullcontext() if number == parts else accelerator.no_sync(self.model):
                # The sum over the tokens of the whole batch, in shares that gradient averaging adds up again.
                loss = self.model(
                    input_ids=inputs,
                    labels=targets,
                    shift_labels=targets,
                    num_items_in_batch=self.tokens_per_step // accelerator.num_processes,
                    use_cache=False,
                ).loss
                accelerator.backward(loss)
            self.loss_sum += loss.detach()
        # A limit of infinity clips nothing and still measures the norm.
        self.grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm or math.inf)
        self.learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.step += 1

    def log(self) -> None:
        """Records what happened since the last time; the only place where training waits for the device."""
        step, steps = self.state.step, self.state.step - self.logged_step
        loss = self.accelerator.reduce(self.loss_sum, reduction="mean").item() / steps
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} at step {step}: go on from the last checkpoint with --resume and a lower "
                f"--learning_rate."
            )
        metrics = {
            "loss": loss,
            "learning_rate": self.learning_rate,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": steps * self.tokens_per_step / (time.monotonic() - self.logged_at),
            "tokens": step * self.tokens_per_step,
            "epoch": self.batches.epoch_of(step),
        }
        self.monitor.training_step(step, metrics, bits_per_byte=loss / math.log(2) * self.tokens_per_byte)
        self.loss_sum.zero_()
        self.logged_step, self.logged_at = step, time.monotonic()

    def evaluate(self) -> Evaluation:
        """Validates, keeps the model if it is the best so far, and draws the curves."""
        evaluation = evaluate(
            self.model,
            self.held_out,
            self.corpus.bytes_per_token,
            self.config.max_position_embeddings,
            self.run.train_batch_size,
            self.config.bos_token_id,
            self.accelerator,
        )
        metrics = {
            "eval_loss": evaluation.loss,
            "eval_perplexity": evaluation.perplexity,
            "eval_bits_per_byte": evaluation.bits_per_byte,
        }
        self.monitor.record(self.state.step, metrics)
        is_best = evaluation.loss < self.state.best_loss
        self.monitor.say(
            f"step {self.state.step}: validation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}, "
            f"bits per byte {evaluation.bits_per_byte:.4f} "
            f"({', '.join(f'{name} -9: {bits:.4f}' for name, bits in self.compressors.items())})"
            f"{' - best so far' if is_best else ''}"
        )
        if is_best:
            self.state.best_loss, self.state.best_step = evaluation.loss, self.state.step
            self.save_model("best", evaluation)
        if self.accelerator.is_main_process:
            title = f"{self.folder.name}: {self.corpus.name}"
            draw_curves(self.folder, title, self.tokens_per_byte, self.compressors)
        return evaluation

    def save(self) -> None:
        """Writes a state to resume from."""
        save_state(self.accelerator, self.folder, self.state, self.run.save_total_limit)

    def save_model(self, name: str, evaluation: Evaluation) -> None:
        """Writes a checkpoint folder to use and share."""
        if self.accelerator.is_main_process:
            card = model_card(self.unwrapped_model, self.arguments, self.state, evaluation, self.compressors)
            save_checkpoint_folder(self.unwrapped_model, self.corpus.tokenizer, self.folder / name, card)

    def finish(self, evaluation: Evaluation) -> TrainingResult:
        """Writes the last model, and lets it write."""
        self.save_model("final", evaluation)
        sample = self.write_sample() if self.accelerator.is_main_process else ""
        self.accelerator.end_training()
        return self.result(interrupted=False, evaluation=evaluation, sample=sample)

    def write_sample(self) -> str:
        """What the model makes of a prompt, as far as its context goes."""
        prompt = self.run.sample_prompt or ("def " if self.corpus.name == "python-stdlib" else "\n")
        set_seed(self.run.seed)
        model, tokenizer = self.unwrapped_model.eval(), self.corpus.tokenizer
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = self.config.max_position_embeddings
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=length, min_new_tokens=length // 2)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    def result(self, interrupted: bool, evaluation: Evaluation | None = None, sample: str = "") -> TrainingResult:
        return TrainingResult(
            folder=self.folder,
            state=self.state,
            interrupted=interrupted,
            seconds=time.monotonic() - self.started,
            evaluation=evaluation,
            compressors=self.compressors,
            evaluated_bytes=self.held_out_bytes,
            sample=sample,
            is_main_process=self.accelerator.is_main_process,
        )


def make_accelerator(arguments: Arguments) -> Accelerator:
    """The accelerator, with bfloat16 where a GPU has it unless the user decided."""
    bf16 = arguments.run.bf16
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what is not autocast
        bf16 = torch.cuda.is_bf16_supported() if bf16 is None else bf16
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and torch.get_num_threads() == 1:
        # `accelerate launch` sets OMP_NUM_THREADS to 1 unless told otherwise: half the speed on two cores.
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
    return accelerator


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
        model.activation_checkpointing_enable()
    return model


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
