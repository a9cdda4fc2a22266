"""Stopping when asked: Ctrl-C, and the signals by which schedulers end a job, on every process at the same step."""

import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """
    Within its context, a signal stops the run after the current step. A second Ctrl-C stops it at once. Python hands
    signals to the main thread only, so in another thread a run cannot be asked to stop.

    Attributes:
        signal: the signal on which all processes have agreed, or `None`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: signal.Signals | None = None
        self._received = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS if is_main}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """
        Whether any process was asked to stop. Every process calls it at the same place, and all get the same answer: a
        scheduler may signal one of them, or all at slightly different times.
        """
        if self.signal is None:
            number = self._received
            if self.accelerator.num_processes > 1:
                numbers = torch.tensor([number], device=self.accelerator.device)
                number = int(self.accelerator.gather(numbers).max())
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None
