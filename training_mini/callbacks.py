"""Calls the callbacks of a run, by the events of transformers' `TrainerCallback`."""

import functools
from types import SimpleNamespace
from typing import Any

from .build import Run

# transformers has these too. Mini counts in steps, has no loops within a step to look into, and predicts nothing.
NEVER_CALLED = (
    "on_epoch_begin", "on_epoch_end", "on_substep_end", "on_prediction_step", "on_predict", "on_push_begin"
)  # fmt: skip


class Callbacks:
    """
    The callbacks of a run, which are called on every process. Beside the events of transformers there is `on_sample`,
    with the `samples` that the model has just written; beside the arguments there is `run`, with all parts of the run.

    Args:
        callbacks: the objects, or their classes. Each has the methods that it wants to have called.

    Attributes:
        state: transformers' `TrainerState`; `None` without callbacks, because its module takes a second to load.
        control: transformers' `TrainerControl`, by which a callback asks for something.
    """

    def __init__(self, run: Run, callbacks: tuple[object, ...]) -> None:
        self.run = run
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.state = self.control = None
        if callbacks:
            from transformers.trainer_callback import TrainerControl, TrainerState

            is_main = run.accelerator.is_main_process
            self.state = TrainerState(is_world_process_zero=is_main, is_local_process_zero=is_main)
            self.control = TrainerControl()

    def call(self, event: str, **about: Any) -> None:
        """Calls the method of that name of every callback that has one. The model is not compiled for them."""
        if not self.callbacks:
            return
        run, state = self.run, self.run.state
        self.state.global_step, self.state.max_steps = state.step, run.arguments.optimization.max_steps
        self.state.epoch = run.batches.epoch_of(state.step)
        self.state.num_input_tokens_seen = state.sequences * run.config.max_position_embeddings
        self.state.best_metric, self.state.best_global_step = state.best_loss, state.best_step
        for metrics in (about.get("logs"), about.get("metrics")):
            if metrics is not None:
                self.state.log_history.append({**metrics, "step": state.step})
        for callback in self.callbacks:
            if (method := getattr(callback, event, None)) is not None:
                with run.uncompiled():
                    answer = method(
                        self.settings, self.state, self.control, model=run.unwrapped_model,
                        processing_class=run.corpus.tokenizer, optimizer=run.optimizers[0], run=run, **about,
                    )  # fmt: skip
                self.control = answer or self.control

    def asked(self, what: str) -> bool:
        """Whether a callback of any process asks to `save`, `evaluate` or `log` before the next step, or to stop."""
        return bool(self.callbacks) and self.run.parallel.anyone(getattr(self.control, f"should_{what}"))

    def begin_step(self) -> None:
        """Begins a step: what callbacks asked for after the last one has been done."""
        if self.callbacks:
            self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        self.call("on_step_begin")

    @functools.cached_property
    def settings(self) -> SimpleNamespace:
        """The settings of the run, each by its name."""
        arguments = self.run.arguments
        settings = {name: value for group in vars(arguments).values() for name, value in vars(group).items()}
        return SimpleNamespace(**{**settings, "output_dir": str(arguments.output_dir)})

    def problems(self) -> list[str]:
        """A sentence for each method that a callback has and that is never called."""
        if not self.callbacks:
            return []
        from transformers import TrainerCallback

        return [
            f"{type(callback).__name__}.{event} is never called here; docs/EXTENDING.md names the events that are."
            for callback in self.callbacks
            for event in NEVER_CALLED
            if getattr(type(callback), event, None) not in (None, getattr(TrainerCallback, event))
        ]
