"""The training loop: one step after the other, and what happens between steps."""

import contextlib
import functools
import math
import time
from typing import Any

import torch
from entry_points_mini import quiet_libraries
from torch.optim.lr_scheduler import LRScheduler

from .arguments import Arguments
from .build import build_run, description_of
from .callbacks import Callbacks
from .checkpoints import DivergedError, advice_of_sound_state
from .data.batches import Batch, key_of
from .evaluation import Evaluation, evaluate
from .hooks import NO_HOOKS, Hooks
from .kernels import check_choice, choose_kernels, compile_model, restore_model
from .metrics import check_internals, inner_metrics, make_log_window, own_metrics, size_metrics, update_metrics
from .model_folders import save_model
from .monitoring import Monitor, draw_curves
from .optimization import dropout_at, make_schedulers, set_dropout, training_loss
from .rehearsal import find_micro_batches, lack_of_memory, try_first_step
from .result import TrainingResult
from .sampling import functions_of_run, samples_of_run
from .saving import Saving
from .signals import StopRequest
from .time_limit import fix_max_steps
from .trackers import start_trackers

INNER_WINDOWS = 4  # held-out windows on which attention and activations are measured


def train(arguments: Arguments, hooks: Hooks = NO_HOOKS) -> TrainingResult:
    """
    Trains a model as the arguments say, or continues a run. Callers in Python use `training_mini.train`.

    Raises:
        ValueError: for wrong input, before any existing file is changed.
    """
    quiet_libraries()
    return Trainer(arguments, hooks).train()


class Trainer:
    """
    The loop of one run. The order of the methods is the order in which things happen.

    Attributes:
        run: the parts of the run: model, data, optimizers and so on.
        micro_batches: the number of micro-batches into which this process splits its part of a batch.
        window: the steps since the last log line.
        saving: what writes checkpoints and models on the way.
        callbacks: what a caller in Python has asked to be called.
    """

    def __init__(self, arguments: Arguments, hooks: Hooks = NO_HOOKS) -> None:
        self.started = time.monotonic()
        self.arguments, self.hooks = arguments, hooks
        self.run = build_run(arguments, hooks)
        self.accelerator, self.parallel, self.state = self.run.accelerator, self.run.parallel, self.run.state
        self.stop = StopRequest(self.accelerator)
        self.monitor = Monitor(self.run.folder, self.accelerator, hooks.is_quiet)
        try:
            self.callbacks = Callbacks(self.run, hooks.callbacks)
            self.saving = Saving(self.run, self.stop, self.monitor, self.callbacks)
        except BaseException:
            self.run.run_folder.release()
            raise
        self.schedulers: list[LRScheduler] = []
        self.micro_batches = arguments.optimization.gradient_accumulation_steps
        self.window = make_log_window(self.run)
        self.learning_rate = 0.0
        self.dropout: float | None = None
        self.inner_metrics: dict[str, float] = {}

    def train(self) -> TrainingResult:
        """The whole run: to its end, or until it is asked to stop."""
        try:
            with self.stop:
                with contextlib.closing(self.monitor):
                    self.begin()
                    evaluation = self.loop()
                    if evaluation is None and self.is_done():
                        evaluation = self.evaluate()  # a run that was resumed at its end has none yet
                result = self.finish(evaluation) if evaluation is not None else self.leave()
        finally:
            self.saving.writer.close()
            restore_model(self.run)
            self.run.run_folder.release()
        self.callbacks.call("on_train_end")
        self.accelerator.wait_for_everyone()
        self.monitor.finish_trackers()
        return result

    def begin(self) -> None:
        """Takes possession of the folder, and says what is about to happen."""
        run, lines = self.run, []
        # 1. What the run needs to know before anything is written: does it fit into memory, and how long is it?
        choose_kernels(run)
        run.model.train()  # a loaded model is in evaluation mode, in which a step keeps other tensors
        if self.arguments.optimization.find_batch_size:
            self.micro_batches = find_micro_batches(run, self.loss)
        elif lack := lack_of_memory(run, self.micro_batches):
            self.monitor.warn(lack)
        try_step = functools.partial(self.forward_and_backward, self.state.step)
        check_choice(run, try_step)
        if run.state.is_compiled or self.arguments.run.torch_compile:
            self.monitor.say("Compiling the model ...")
        compile_model(run, try_step)
        if self.arguments.monitoring.internals_steps:
            check_internals(run)
        if self.arguments.optimization.max_minutes is not None:
            self.monitor.say("Timing the first steps ...")
            self.arguments, line = fix_max_steps(run, self.forward_and_backward, self.micro_batches, self.started)
            run.arguments, lines = self.arguments, [line]
        arguments = self.arguments
        if arguments.run.overwrite:
            try_first_step(run, self.forward_and_backward)
        self.schedulers = make_schedulers(run.optimizers, arguments.optimization, self.state.step)
        before = start_trackers(run)
        # 2. The folder is this run's from here on.
        if self.accelerator.is_main_process:
            if arguments.run.overwrite:
                run.run_folder.remove(before)
            arguments.save(run.folder / "config.yaml")
        self.accelerator.wait_for_everyone()
        self.monitor.start(self.state.step, arguments.optimization.max_steps)
        for problem in [*run.problems, *self.callbacks.problems()]:
            self.monitor.warn(problem)
        if self.state.step == 0:
            self.monitor.record(0, size_metrics(run))
        self.monitor.introduce([*description_of(run, self.micro_batches, self.window.peak_flops), *lines])
        self.callbacks.call("on_train_begin")
        self.window.restart()

    def loop(self) -> Evaluation | None:
        """Trains until the run is done or asked to stop; gives the evaluation of the last step, if there was one."""
        monitoring, save_steps = self.arguments.monitoring, self.arguments.run.save_steps
        while True:
            evaluation: Evaluation | None = None
            with self.window.paused():  # tokens per second are those of training
                # 1. Evaluate, and keep the model if it is the best so far. Early stopping may end the run here.
                is_due = self.is_done() or self.is_due(monitoring.eval_steps) or self.callbacks.asked("evaluate")
                if is_due and self.state.evaluated_step < self.state.step:
                    evaluation = self.evaluate()
                is_last = self.is_done()
                # 2. Has somebody asked the run to stop? All processes agree on it here.
                must_stop = self.stop.agreed()
                # 3. Let the model write; at the end, `finish` does.
                if self.is_due(monitoring.steps_between_samples) and not (is_last or must_stop):
                    self.monitor.show_samples(self.state.step, self.sample())
                # 4. Write a checkpoint to go on from.
                is_due = is_last or must_stop or self.is_due(save_steps) or self.callbacks.asked("save")
                if is_due and self.saving.step != self.state.step:
                    self.saving.save(in_background=self.saving.in_background and not (is_last or must_stop))
            if is_last or must_stop:
                if self.window.steps:
                    self.log()  # what was learned since the last log line
                return evaluation if is_last else None
            # 5. One step on the next global batch.
            self.training_step()
            # 6. Record what happened.
            is_due = self.is_due(monitoring.logging_steps) or self.callbacks.asked("log")
            if is_due or self.state.step in (1, self.arguments.optimization.max_steps):
                self.log()
                if self.saving.writer.is_written():
                    self.saving.complete()
            if self.is_due(monitoring.internals_steps):
                self.log_internals()

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Whether `every` divides a step, by default the present one. 0 is never, and nothing is due at step 0."""
        step = self.state.step if step is None else step
        return every > 0 and step > 0 and step % every == 0

    def is_done(self) -> bool:
        return self.state.is_over(self.arguments.optimization) or self.callbacks.asked("training_stop")

    def training_step(self) -> None:
        """One optimizer step on this process's share of the global batch."""
        run, optimization, step = self.run, self.arguments.optimization, self.state.step
        self.callbacks.begin_step()
        # 1. Gradients of the whole global batch.
        cross_entropy = self.forward_and_backward(step)
        # 2. Clip. A limit of infinity clips nothing and still measures the norm.
        max_norm = optimization.max_grad_norm or math.inf
        grad_norm = self.parallel.clip_gradients(run.model, max_norm)
        # 3. Move the weights, unless a gradient is not finite.
        self.learning_rate = self.schedulers[0].get_last_lr()[0]
        self.callbacks.call("on_pre_optimizer_step")
        if math.isfinite(grad_norm):
            is_due = self.is_due(self.arguments.monitoring.internals_steps, step + 1)
            with update_metrics(run.unwrapped_model, is_due, self.inner_metrics):
                for optimizer in run.optimizers:
                    optimizer.step()
            self.callbacks.call("on_optimizer_step")
            self.state.skipped_since = None
        else:
            self.skip()
        self.window.add_step(cross_entropy, grad_norm, max_norm)
        # 4. On to the next step.
        for scheduler in self.schedulers:
            scheduler.step()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        self.state.step += 1
        self.state.sequences = run.batches.sequences_read(self.state.step)
        if run.ema is not None:
            run.ema.update(self.state.step)
        self.monitor.advance(self.state.step)
        self.callbacks.call("on_step_end")

    def forward_and_backward(self, step: int) -> torch.Tensor:
        """Computes the gradients of this process's part of a batch; returns its part of the cross-entropy."""
        run, accelerator = self.run, self.accelerator
        # Dropout is a function of the step, so there is no state of a random number generator to save.
        torch.manual_seed(int(key_of(self.arguments.run.seed, step, self.parallel.data_rank)))
        self.dropout = dropout_at(step, self.arguments.optimization)
        if self.dropout is not None:
            set_dropout(run.unwrapped_model, self.dropout)
        cross_entropy = torch.zeros((), device=accelerator.device)
        rank, processes = self.parallel.data_rank, self.parallel.data_processes
        batches = run.batches.micro_batches(step, rank, processes, self.micro_batches)
        learned_tokens = run.batches.learned_tokens(step)
        for number, batch in enumerate(batches, start=1):  # inputs and targets: (sequences, length)
            # Gradients are reduced over the processes with the last micro-batch only.
            is_last = number == self.micro_batches
            with contextlib.nullcontext() if is_last else self.parallel.no_sync(run.model), run.attention():
                with run.autocast():
                    loss, part = self.loss(batch.to(accelerator.device), learned_tokens)
                # DeepSpeed divides by the number of micro-batches, and the loss is divided already.
                accelerator.backward(loss * self.micro_batches if self.parallel.is_deepspeed else loss)
            cross_entropy += part
        return cross_entropy

    def loss(self, batch: Batch, learned_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The loss to minimise and the cross-entropy to report. Both are scaled so that the gradients, summed over
        micro-batches and averaged over processes, are those of the mean over the `learned_tokens` of the global batch.
        """
        optimization, tokens = self.arguments.optimization, learned_tokens / self.parallel.data_processes
        return training_loss(self.run.model, batch, tokens, optimization.label_smoothing, optimization.z_loss)

    def skip(self) -> None:
        """Leaves the weights as they are. One bad batch does not end a run; many in a row do, by `DivergedError`."""
        step, state = self.state.step + 1, self.state
        state.skipped_steps += 1
        if state.skipped_since is None:
            state.skipped_since = step
            self.monitor.warn(f"Step {step} is skipped: its gradients are not finite.")
        in_a_row = step - state.skipped_since + 1
        if in_a_row >= self.arguments.optimization.max_skipped_steps:
            raise DivergedError(
                f"The gradients of {in_a_row} steps in a row, from step {state.skipped_since} on, are not finite; "
                f"{advice_of_sound_state(self.run.folder, state)}."
            )

    def log(self) -> None:
        """Records the steps since the last log line, and begins the next window."""
        step = self.state.step
        metrics = self.window.metrics()
        metrics["learning_rate"] = self.learning_rate
        metrics["tokens"] = self.state.sequences * self.run.config.max_position_embeddings
        metrics["epoch"] = self.run.batches.epoch_of(step)
        if self.dropout is not None:
            metrics["dropout"] = self.dropout
        if self.state.skipped_steps:
            metrics["skipped_steps"] = self.state.skipped_steps
        self.monitor.training_step(step, metrics)
        self.callbacks.call("on_log", logs=metrics)
        self.window.restart()

    def log_internals(self) -> None:
        """Records attention, activations and updates, on held-out text."""
        if self.accelerator.is_main_process:
            with self.run.uncompiled():
                windows = self.run.held_out.windows(INNER_WINDOWS)
                self.inner_metrics |= inner_metrics(self.run.unwrapped_model, windows)
        self.monitor.record(self.state.step, self.inner_metrics)
        self.inner_metrics = {}

    def evaluate(self) -> Evaluation | None:
        """
        Validates, keeps the model if it is the best so far, and draws the curves; `None` if asked to stop. A loss on
        held-out text that is not finite raises `DivergedError`.
        """
        run, state, accelerator = self.run, self.state, self.accelerator
        batch_size = self.arguments.optimization.train_batch_size // self.micro_batches
        with self.monitor.busy("evaluating"), run.ema_weights(), run.uncompiled():
            tensor_size = self.parallel.tensor_size
            evaluation = evaluate(run.model, run.held_out, batch_size, accelerator, self.stop.agreed, tensor_size)
        if evaluation is None or state.evaluated_step == state.step:
            return evaluation  # the run was resumed at its end, and this evaluation is recorded already
        if not math.isfinite(evaluation.loss):
            raise DivergedError(
                f"After step {state.step} the validation loss is {evaluation.loss}; "
                f"{advice_of_sound_state(run.folder, state)}."
            )
        metrics = evaluation.metrics() | own_metrics(run, self.hooks.metrics)
        self.monitor.record(state.step, metrics)
        state.evaluated_step = state.step
        is_best = evaluation.loss < state.best_loss
        best = " - best so far" if is_best else ""
        self.monitor.say(f"step {state.step}: {evaluation.description(run.compressors)}{best}")
        state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        if is_best and self.saving.written(lambda: save_model(run, "best", evaluation)):
            state.best_loss, state.best_step, state.best_sequences = evaluation.loss, state.step, state.sequences
        self.draw_curves()
        self.callbacks.call("on_evaluate", metrics=metrics)
        return evaluation

    def finish(self, evaluation: Evaluation) -> TrainingResult:
        """Saves the last model, and the merged one if that was asked for, and writes the last sample."""
        save_model(self.run, "final", evaluation)
        if self.arguments.adapter.merge:
            save_model(self.run, "merged", evaluation)
        samples, share = self.sample(), functions_of_run(self.run)
        if share is not None and self.state.step > self.monitor.start_step:  # otherwise it is recorded already
            self.monitor.record(self.state.step, {"eval_valid_functions": share})
        return self.result(evaluation, samples, share)

    def leave(self) -> TrainingResult:
        """Ends a run that was asked to stop. If it has no model to write with yet, it gets one."""
        if self.state.evaluated_step == 0:
            save_model(self.run, "final", None)
        self.draw_curves()
        return self.result(None)

    def draw_curves(self) -> None:
        if self.accelerator.is_main_process:
            with self.monitor.warning_of_errors("curves.png"):
                draw_curves(self.run.folder, self.run.title, self.run.compressors)

    def sample(self) -> list[str]:
        """The samples for the prompts. They are also added to `samples.jsonl`."""
        with self.monitor.busy("writing samples"):
            samples = samples_of_run(self.run)
        self.monitor.record_samples(self.state.step, samples)
        texts = [sample["text"] for sample in samples]
        self.callbacks.call("on_sample", samples=texts)
        return texts

    def result(self, evaluation: Evaluation | None, *written: Any) -> TrainingResult:
        stopped_by = self.stop.signal if evaluation is None else None
        seconds, start_step = time.monotonic() - self.started, self.monitor.start_step
        return TrainingResult(self.run, stopped_by, seconds, start_step, evaluation, *written)
