"""The training loop: from settings to a trained, evaluated, saved model."""

import contextlib
import logging
import math
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from modeling_mini.analysis.cost import ModelCost
from tokenization import encode_messages
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .arguments import Arguments
from .build import check_settings, claim_folder, empty, make_batches, make_model
from .checkpoints import (
    TrainerState,
    Weights,
    architecture_of,
    check_state,
    find_state,
    methods_of,
    read_state,
    save_state,
    states_of,
    step_of,
)
from .cpu_kernels import onednn_is_faster, use_onednn
from .data.batches import Batch, key_of
from .data.corpus import load_corpus
from .distributed import Parallel, blocks_of
from .evaluation import Evaluation, compressor_bits_per_byte, evaluate, perplexity_of
from .lora import describe, merged_model
from .metrics import inner_metrics, memory_bytes, peak_flops, update_metrics
from .model_folders import model_card, save_checkpoint_folder
from .monitoring import Monitor, draw_curves
from .optimization import WeightAverage, dropout_at, make_optimizers, make_schedulers, regularized_loss, set_dropout
from .signals import StopRequest

SAMPLES = 2  # of examples that are held out
INNER_WINDOWS = 4  # held-out windows on which the model is looked into


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to, for the report of the entry point; without evaluation and samples if it was stopped."""

    folder: Path
    state: TrainerState
    stopped_by: int | None
    seconds: float
    evaluation: Evaluation | None
    compressors: dict[str, float]
    evaluated_bytes: int
    samples: list[str]
    is_chat: bool
    is_main_process: bool


def train(arguments: Arguments) -> TrainingResult:
    """
    Trains a model as the arguments say, or goes on with a run.

    Raises:
        ValueError: for input that cannot work, before anything that exists is changed.
    """
    # It would break into the live display at every save: a bar for one file.
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    # The first step of a run may be skipped, and the schedule goes on all the same.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return Trainer(arguments).train()


class Trainer:
    """One run: what it is made of, and its loop. The order of the methods is the order in which things happen."""

    def __init__(self, arguments: Arguments) -> None:
        self.started = time.monotonic()
        self.arguments, self.run = arguments, arguments.run
        self.optimization, self.monitoring = arguments.optimization, arguments.monitoring
        self.parallel = Parallel(arguments)
        self.accelerator = self.parallel.accelerator
        check_settings(arguments, self.accelerator)
        self.folder = claim_folder(arguments, self.accelerator)
        try:
            show_progress = self.accelerator.is_local_main_process
            self.corpus = load_corpus(arguments.data, self.monitoring.max_eval_tokens, show_progress)
            set_seed(self.run.seed)
            model = make_model(arguments, self.corpus)
            self.config = model.config
            self.batches, self.held_out = make_batches(arguments, self.corpus, self.config)
        except BaseException:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it is empty: this run has not begun
            raise
        self.state = TrainerState(
            corpus=self.corpus.settings,
            architecture=architecture_of(self.config),
            methods=methods_of(arguments),
            tracker_id=uuid.uuid4().hex[:8],
        )
        on_cpu_in_float32 = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision == "no"
        if on_cpu_in_float32 and onednn_is_faster():
            use_onednn(model)
        self.blocks = blocks_of(model)
        self.model: nn.Module = self.parallel.spread(model)
        self.optimizers = make_optimizers(model, self.optimization)
        if self.parallel.is_deepspeed:
            self.model, *self.optimizers = self.accelerator.prepare(model, *self.optimizers)
        self.unwrapped_model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        decay = self.optimization.ema_decay
        self.average = WeightAverage(self.unwrapped_model, decay) if decay else None
        self.weights = Weights(self.parallel, self.model, self.optimizers, self.average)
        self.parts = self.optimization.gradient_accumulation_steps
        self.tokens_per_step = self.optimization.train_batch_size * self.config.max_position_embeddings

        held_out_text = self.corpus.text_of(self.held_out.ids)
        self.held_out_bytes = len(held_out_text)
        self.compressors = compressor_bits_per_byte(held_out_text)
        self.tokens_per_byte = len(self.held_out.ids) / self.held_out.bytes

    def train(self) -> TrainingResult:
        """The loop: steps, and what is due between them."""
        with StopRequest(self.accelerator) as self.stop:
            self.begin()
            with contextlib.closing(self.monitor):
                evaluation = self.loop()
                if evaluation is None and self.is_done():
                    evaluation = self.evaluate()  # a run that was resumed at its end has none yet
            result = self.finish(evaluation) if evaluation is not None else self.result()
        self.accelerator.wait_for_everyone()
        # Not `end_training`, which also destroys the process group: over gloo, that hangs or aborts now and then.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return result

    def begin(self) -> None:
        """Loads the state to go on from, or takes possession of the folder."""
        problems = self.resume() if self.run.resume else []
        self.saved_step = self.state.step if self.run.resume else -1
        if self.accelerator.is_main_process:
            if self.run.overwrite:
                empty(self.folder)
            self.arguments.save(self.folder / "config.yaml")
        self.accelerator.wait_for_everyone()
        self.schedulers = make_schedulers(self.optimizers, self.optimization, self.state.step)
        if self.optimization.find_batch_size:
            self.find_batch_size()
        self.compile()
        self.model.train()
        trackers = self.monitoring.report_to
        self.monitor = Monitor(self.folder, self.state.step, self.optimization.max_steps, self.accelerator)
        self.monitor.start_trackers(trackers, self.folder.name, self.state.tracker_id, self.arguments.as_dict())
        for problem in problems:
            self.monitor.warn(problem)
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        self.peak_flops = peak_flops(self.accelerator.device, dtype, self.monitoring.peak_tflops)
        self.flops_per_token = None
        if self.peak_flops is not None:
            cost = ModelCost(self.config)
            self.flops_per_token = cost.training_flops_per_token(self.config.max_position_embeddings)
        for line in self.description():
            self.monitor.say(line)
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.counted_steps = self.clipped_steps = 0
        self.grad_norm = math.nan
        self.inner_metrics: dict[str, float] = {}
        self.logged_step, self.logged_at = self.state.step, time.monotonic()

    def resume(self) -> list[str]:
        """Loads the newest state that is whole; gives a warning for each that is not."""
        found, error, problems = None, "", []
        if self.accelerator.is_main_process:
            try:
                found, problems = find_state(self.folder)
            except ValueError as nothing_found:
                error = str(nothing_found)
        found, error = self.parallel.from_main((found, error))
        if error:
            raise ValueError(error)
        state = read_state(found)
        check_state(self.folder, state, self.state.corpus, self.state.architecture, self.state.methods)
        self.weights.load(found)
        self.batches.load_state_dict(state.stream)
        self.state = state
        return problems

    def find_batch_size(self) -> None:
        """Doubles the parts of a batch until the forward and backward pass of one fits into memory."""
        share = self.optimization.train_batch_size // self.accelerator.num_processes
        while True:
            rows = share // self.parts
            ids = torch.zeros(rows, self.config.max_position_embeddings, dtype=torch.long).to(self.accelerator.device)
            fits = True
            try:
                with self.parallel.without_reduction(self.model):
                    self.accelerator.backward(self.loss(Batch({"input_ids": ids}, ids), ids.numel())[0])
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                fits = False
            self.model.zero_grad()
            clear_device_cache(garbage_collection=True)
            if not self.parallel.anyone(not fits):
                return
            if rows == 1 or share % (2 * self.parts):
                raise ValueError(
                    f"A part of {rows} sequences does not fit into memory, and cannot be halved; use a smaller --size, "
                    f"a shorter --max_position_embeddings or --gradient_checkpointing."
                )
            self.parts *= 2

    def compile(self) -> None:
        """Compiles the model in place, whole or by one of its equal blocks."""
        if self.run.compile_regions:
            for block in self.blocks:
                block.compile()
        elif self.run.torch_compile:
            self.model.compile()

    def description(self) -> list[str]:
        """Lines of what is about to happen."""
        accelerator, corpus = self.accelerator, self.corpus
        beginning = f"Resuming at step {self.state.step}" if self.state.step else "Training"
        precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
        threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
        spread = f" ({self.parallel.name})" if self.parallel.name else ""
        parts = f", batches in {self.parts} parts" if self.parts > 1 else ""
        peak = f", MFU of {self.peak_flops / 1e12:g} TFLOP/s each" if self.peak_flops else ""
        parameters = f"{self.unwrapped_model.num_parameters() / 1e6:.2f}M parameters"
        lines = [
            f"{beginning}: {parameters} on {corpus.train_size} of {corpus.name} "
            f"({len(corpus.validation):,} held out), "
            f"{accelerator.num_processes} x {accelerator.device.type}{threads}{spread}, {precision}{parts}{peak}."
        ]
        if self.arguments.model.model is not None:
            rows = self.optimization.train_batch_size // accelerator.num_processes // self.parts
            is_bf16, checkpointing = accelerator.mixed_precision == "bf16", self.run.gradient_checkpointing
            about = describe(self.unwrapped_model, rows, self.config.max_position_embeddings, is_bf16, checkpointing)
            lines.append(f"From {self.arguments.model.model}: {about}.")
        if corpus.kind is not None and (notes := self.batches.rows.notes()):
            lines.append(notes)
        return lines

    def loop(self) -> Evaluation | None:
        """Trains until the run is done, or asked to stop; gives the evaluation of the last step, if there was one."""
        evaluation: Evaluation | None = None
        while True:
            pause = time.monotonic()
            done = self.is_done()
            if (done or self.is_due(self.monitoring.eval_steps)) and self.state.evaluated_step < self.state.step:
                evaluation = self.evaluate()
                done = self.is_done()
            stop = self.stop.agreed()
            if self.is_due(self.monitoring.sample_every) and not (done or stop):
                self.sample()
            if (done or stop or self.is_due(self.run.save_steps)) and self.saved_step != self.state.step:
                self.save()
            self.logged_at += time.monotonic() - pause  # tokens per second are those of training
            if done or stop:
                return evaluation if done else None
            evaluation = None
            self.training_step()
            if self.is_due(self.monitoring.logging_steps) or self.state.step == self.optimization.max_steps:
                self.log()
            if self.is_due(self.monitoring.internals_steps):
                self.log_internals()

    def is_due(self, every: int, step: int | None = None) -> bool:
        step = self.state.step if step is None else step
        return every > 0 and step > 0 and step % every == 0

    def is_done(self) -> bool:
        patience = self.optimization.early_stopping_patience
        ended_early = 0 < patience <= self.state.evaluations_since_best
        return ended_early or self.state.step >= self.optimization.max_steps

    def loss(self, batch: Batch, learned_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The loss to minimise and the cross-entropy to report: this process's share of the mean over the `learned_tokens`
        of the whole global batch, in parts that the averaging of gradients over processes adds up again.
        """
        tokens = learned_tokens / self.accelerator.num_processes
        if not (self.optimization.label_smoothing or self.optimization.z_loss):
            targets = batch.targets
            loss = self.model(
                **batch.inputs, labels=targets, shift_labels=targets, num_items_in_batch=tokens, use_cache=False
            ).loss
            return loss, loss.detach()
        logits = self.model(**batch.inputs, use_cache=False).logits
        loss, cross_entropy = regularized_loss(
            logits, batch.targets, self.optimization.label_smoothing, self.optimization.z_loss
        )
        return loss / tokens, cross_entropy / tokens

    def training_step(self) -> None:
        """One optimizer step on this process's share of the global batch."""
        accelerator, step = self.accelerator, self.state.step
        # Dropout is a function of the step too, so there is no state of a random number generator to save.
        torch.manual_seed(int(key_of(self.run.seed, step, accelerator.process_index)))
        self.dropout = dropout_at(step, self.optimization)
        if self.dropout is not None:
            set_dropout(self.unwrapped_model, self.dropout)
        cross_entropy = torch.zeros((), device=accelerator.device)
        micro_batches = self.batches.micro_batches(
            step, accelerator.process_index, accelerator.num_processes, self.parts
        )
        learned_tokens = self.batches.learned_tokens(step)
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == self.parts
            with contextlib.nullcontext() if is_last else self.parallel.without_reduction(self.model):
                loss, part = self.loss(batch.to(accelerator.device), learned_tokens)
                # DeepSpeed divides by the number of parts, which the loss already is.
                accelerator.backward(loss * self.parts if self.parallel.is_deepspeed else loss)
            cross_entropy += part
        # A limit of infinity clips nothing and still measures the norm.
        max_norm = self.optimization.max_grad_norm or math.inf
        self.grad_norm = self.parallel.clip_gradients(self.model, max_norm)
        self.learning_rate = self.schedulers[0].get_last_lr()[0]
        if math.isfinite(self.grad_norm):
            is_due = self.is_due(self.monitoring.internals_steps, step + 1)
            with update_metrics(self.unwrapped_model, is_due, self.inner_metrics):
                for optimizer in self.optimizers:
                    optimizer.step()
            self.loss_sum += cross_entropy
            self.counted_steps += 1
            self.clipped_steps += self.grad_norm > max_norm
            self.state.skipped_since = None
        else:
            self.skip()
        for scheduler in self.schedulers:
            scheduler.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.state.step)

    def skip(self) -> None:
        """Leaves the weights as they are; one bad batch is no reason to end a run, a row of them is."""
        step, state = self.state.step + 1, self.state
        state.skipped_steps += 1
        if state.skipped_since is None:
            state.skipped_since = step
            self.monitor.warn(f"Step {step} is skipped: its gradients are not finite.")
        in_a_row = step - state.skipped_since + 1
        if in_a_row >= self.optimization.max_skipped_steps:
            sound = [step_of(folder) for folder in states_of(self.folder) if step_of(folder) < state.skipped_since]
            advice = (
                f"the checkpoint of step {sound[-1]} is sound: go on from it with --resume and a lower --learning_rate"
                if sound
                else "there is no checkpoint from before; start anew with --overwrite and a lower --learning_rate"
            )
            raise ValueError(
                f"The gradients of {in_a_row} steps in a row, from step {state.skipped_since} on, are not finite; "
                f"{advice}."
            )

    def log(self) -> None:
        """Records what happened since the last time."""
        step, steps = self.state.step, self.state.step - self.logged_step
        loss = self.accelerator.reduce(self.loss_sum, reduction="mean").item() / max(1, self.counted_steps)
        tokens_per_second = steps * self.tokens_per_step / (time.monotonic() - self.logged_at)
        metrics: dict[str, float] = {}
        if self.counted_steps:  # else there is no loss to speak of
            metrics["loss"] = loss
            metrics["perplexity"] = perplexity_of(loss)
            metrics["bits_per_byte"] = loss / math.log(2) * self.tokens_per_byte
            metrics["clipped_share"] = self.clipped_steps / self.counted_steps
        if math.isfinite(self.grad_norm):
            metrics["grad_norm"] = self.grad_norm
        metrics |= {
            "learning_rate": self.learning_rate,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": memory_bytes(self.accelerator.device),
            "tokens": step * self.tokens_per_step,
            "epoch": self.batches.epoch_of(step),
        }
        if self.flops_per_token is not None:
            available = self.peak_flops * self.accelerator.num_processes
            metrics["mfu"] = self.flops_per_token * tokens_per_second / available
        if self.dropout is not None:
            metrics["dropout"] = self.dropout
        if self.state.skipped_steps:
            metrics["skipped_steps"] = self.state.skipped_steps
        self.monitor.training_step(step, metrics)
        self.loss_sum.zero_()
        self.counted_steps = self.clipped_steps = 0
        self.logged_step, self.logged_at = step, time.monotonic()

    def log_internals(self) -> None:
        """Records the model from within, on held-out text."""
        if self.accelerator.is_main_process:
            self.inner_metrics |= inner_metrics(self.unwrapped_model, self.held_out.windows(INNER_WINDOWS))
        self.monitor.record(self.state.step, self.inner_metrics)
        self.inner_metrics = {}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The weights that count: their moving average, where there is one."""
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()

    def evaluate(self) -> Evaluation | None:
        """Validates, keeps the model if it is the best so far, and draws the curves; `None` if asked to stop."""
        with self.averaged():
            evaluation = evaluate(
                self.model,
                self.held_out,
                self.optimization.train_batch_size // self.parts,
                self.accelerator,
                self.stop.agreed,
            )
        if evaluation is None or self.state.evaluated_step == self.state.step:
            return evaluation  # of a run that was resumed at its end, and has recorded it
        metrics = {
            "eval_loss": evaluation.loss,
            "eval_perplexity": evaluation.perplexity,
            "eval_bits_per_byte": evaluation.bits_per_byte,
        }
        self.monitor.record(self.state.step, metrics)
        self.state.evaluated_step = self.state.step
        is_best = evaluation.loss < self.state.best_loss
        self.monitor.say(
            f"step {self.state.step}: validation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}, "
            f"bits per byte {evaluation.bits_per_byte:.4f} "
            f"({', '.join(f'{name} -9: {bits:.4f}' for name, bits in self.compressors.items())})"
            f"{' - best so far' if is_best else ''}"
        )
        self.state.evaluations_since_best = 0 if is_best else self.state.evaluations_since_best + 1
        if is_best and self.written(lambda: self.save_model("best", evaluation)):
            self.state.best_loss, self.state.best_step = evaluation.loss, self.state.step
        if self.accelerator.is_main_process:
            title = f"{self.folder.name}: {self.corpus.name}"
            with self.monitor.warning_of_errors("curves.png"):
                draw_curves(self.folder, title, self.compressors)
        return evaluation

    def save(self) -> None:
        """Writes a state to resume from."""
        self.state.stream = self.batches.state_dict(self.state.step)
        keep = self.run.keep_last, self.run.keep_every
        if self.written(lambda: save_state(self.folder, self.state, self.weights, *keep)):
            self.saved_step = self.state.step

    def written(self, write: Callable[[], None]) -> bool:
        """Whether a write that every process takes part in succeeded; if not, the run stops or only warns."""
        try:
            write()
        except OSError as error:
            if self.run.on_save_error == "stop" or self.stop.signal is not None:
                raise
            self.monitor.warn(f"{error} Training goes on; the next try is at the next checkpoint.")
            return False
        return True

    def save_model(self, name: str, evaluation: Evaluation) -> None:
        """Writes a checkpoint folder to use and share; if it cannot be written, every process raises `OSError`."""
        failure = ""
        with self.averaged():
            model = self.parallel.whole_model(self.model)
            if model is not None:
                card = model_card(model, self.arguments, self.state, evaluation, self.compressors)
                try:
                    save_checkpoint_folder(model, self.corpus.tokenizer, self.folder / name, card)
                except OSError as error:
                    failure = str(error)
        failure = self.parallel.from_main(failure)
        if failure:
            raise OSError(failure)

    def finish(self, evaluation: Evaluation) -> TrainingResult:
        """Writes the last model, and the best one merged if it was asked for, and lets the model write."""
        self.save_model("final", evaluation)
        if self.arguments.adapter.merge:
            self.save_merged(evaluation)
        return self.result(evaluation, self.sample())

    def save_merged(self, evaluation: Evaluation) -> None:
        """Writes the model that the run started from with the best adapter in it, as a checkpoint folder."""
        failure = ""
        if self.accelerator.is_main_process:
            merged = merged_model(self.arguments, self.folder / "best")
            card = model_card(merged, self.arguments, self.state, evaluation, self.compressors)
            try:
                save_checkpoint_folder(merged, self.corpus.tokenizer, self.folder / "merged", card)
            except OSError as error:
                failure = str(error)
        failure = self.parallel.from_main(failure)
        if failure:
            raise OSError(failure)

    def sample(self) -> list[str]:
        """What the model makes of the prompts, as far as its context goes; also in `samples.jsonl`."""
        corpus, length = self.corpus, self.config.max_position_embeddings
        # The form of a conversation is in its special tokens.
        is_chat = corpus.kind == "messages"
        samples = []
        # Prompts have other shapes than batches, and would be compiled one by one.
        with self.averaged(), torch.compiler.set_stance("force_eager"):
            model = self.parallel.whole_model(self.model)
            if model is None:
                return []
            was_training = model.training
            model.eval()
            for prompt, prompt_ids in self.prompts():
                set_seed(self.run.seed)
                ids = torch.tensor([prompt_ids[: length - 1]], device=model.device)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_length=length,
                    min_new_tokens=(length - ids.shape[1]) // 2 if corpus.kind is None else None,
                )
                text = corpus.tokenizer.decode(output[0], skip_special_tokens=not is_chat)
                samples.append({"prompt": prompt, "text": text})
            model.train(was_training)
        self.monitor.record_samples(self.state.step, samples)
        return [sample["text"] for sample in samples]

    def prompts(self) -> list[tuple[str, list[int]]]:
        """What the model is asked to go on from: text and ids. Of examples, the first that are held out."""
        corpus, given = self.corpus, self.monitoring.sample_prompts
        tokenizer = corpus.tokenizer
        if corpus.kind is not None and not given:
            prompts = [self.held_out.rows.prompt(number) for number in range(min(SAMPLES, len(corpus.validation)))]
            return [(tokenizer.decode(ids, skip_special_tokens=True), ids.tolist()) for ids in prompts]
        if corpus.kind == "messages":
            turns = [[{"role": "user", "content": prompt}] for prompt in given]
            ids = [encode_messages(tokenizer, turn, add_generation_prompt=True)[0] for turn in turns]
            return list(zip(given, ids, strict=True))
        default = "def " if corpus.name == "python-stdlib" else "\n"
        return [(prompt, tokenizer(prompt).input_ids) for prompt in given or [default]]

    def result(self, evaluation: Evaluation | None = None, samples: list[str] | None = None) -> TrainingResult:
        return TrainingResult(
            folder=self.folder,
            state=self.state,
            stopped_by=self.stop.signal if evaluation is None else None,
            seconds=time.monotonic() - self.started,
            evaluation=evaluation,
            compressors=self.compressors,
            evaluated_bytes=self.held_out_bytes,
            samples=samples or [],
            is_chat=self.corpus.kind == "messages",
            is_main_process=self.accelerator.is_main_process,
        )
