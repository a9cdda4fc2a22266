"""What a run writes while it trains, and what becomes of a write that fails."""

from collections.abc import Callable

from .build import Run
from .callbacks import Callbacks
from .checkpoint_writer import CheckpointWriter, is_in_background
from .checkpoints import check_is_finite
from .monitoring import Monitor
from .signals import StopRequest


class Saving:
    """
    Writes checkpoints and models, one thing at a time.

    Attributes:
        step: the step of the last checkpoint that was written, or begun in the background, or -1.
        in_background: whether training goes on while a checkpoint is written.
    """

    def __init__(self, run: Run, stop: StopRequest, monitor: Monitor, callbacks: Callbacks) -> None:
        self.run, self.stop, self.monitor, self.callbacks = run, stop, monitor, callbacks
        settings = run.arguments.run
        self.step = run.state.step if settings.resume else -1
        self.writer = CheckpointWriter(run.folder, run.parallel, settings.keep_last, settings.keep_every)
        self.in_background = is_in_background(run)

    def save(self, in_background: bool = False) -> None:
        """Writes a checkpoint to resume from, or begins to."""
        run, state = self.run, self.run.state
        check_is_finite(run.folder, state, run.parallel, run.model)
        state.stream = run.batches.joined(run.parallel.gather(run.batches.state_dict(state.step)))
        if self.written(lambda: self.writer.save(state, run.weights, in_background)):
            self.step = state.step
            if not in_background:
                self.callbacks.call("on_save", checkpoint=run.folder / "checkpoints" / f"step_{state.step}")

    def complete(self) -> None:
        """Waits for the checkpoint in the background, if there is one. If it failed, the run stops or warns."""
        if (checkpoint := self.writer.pending) is None:
            return
        try:
            self.writer.wait()
        except OSError as error:
            self.survive(error)
        else:
            self.callbacks.call("on_save", checkpoint=checkpoint)

    def written(self, write: Callable[[], None]) -> bool:
        """Whether a write by all processes succeeded. If not, the run stops or warns, as `on_save_error` says."""
        self.complete()  # first: one thing is written at a time
        try:
            write()
        except OSError as error:
            if self.stop.signal is not None:
                raise
            self.survive(error)
            return False
        return True

    def survive(self, error: OSError) -> None:
        """Warns of a write that failed, and lets training go on, or raises the error, as `on_save_error` says."""
        if self.run.arguments.run.on_save_error == "stop":
            raise error
        self.monitor.warn(f"{error} Training goes on; the next try is at the next checkpoint.")
