"""What a notebook shows under a cell while a model trains: a bar, figures, the curves, and what the model writes."""

import base64
import html
import sys
import time
from typing import Any

from .build import Run
from .monitoring import curves_of, format_seconds

# Drawing the curves takes at most this share of the time of training.
DRAWING_SHARE = 0.02
# What is shown of a log line, by its name there.
FIGURES = {"loss": "loss {:.3f}", "bits_per_byte": "bits per byte {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class NotebookDisplay:
    """A callback that keeps one output of a cell up to date."""

    def __init__(self) -> None:
        self.figures = self.bar = self.samples = self.curves = ""
        self.handle: Any = None
        self.started = self.draw_next = time.monotonic()
        self.first_step = 0
        self.show("Reading the data ...")

    def on_train_begin(self, settings: Any, state: Any, control: Any, **about: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        self.update(state, about["run"])

    def on_log(self, settings: Any, state: Any, control: Any, logs: dict[str, float], **about: Any) -> None:
        self.figures = ", ".join(words.format(logs[name]) for name, words in FIGURES.items() if name in logs)
        self.update(state, about["run"])

    def on_evaluate(self, settings: Any, state: Any, control: Any, **about: Any) -> None:
        self.update(state, about["run"], draw=True)

    def on_sample(self, settings: Any, state: Any, control: Any, samples: list[str], **about: Any) -> None:
        texts = "".join(f"<pre>{html.escape(text)}</pre>" for text in samples)
        self.samples = f"<p>What the model writes after {state.global_step:,} steps:</p>{texts}"
        self.update(state, about["run"])

    def on_train_end(self, settings: Any, state: Any, control: Any, **about: Any) -> None:
        self.update(state, about["run"], draw=True)

    def update(self, state: Any, run: Run, draw: bool = False) -> None:
        """Shows how far the run is; draws the curves anew if it is time to."""
        step, steps, passed = state.global_step, state.max_steps, time.monotonic() - self.started
        left = ""
        if self.first_step < step < steps:
            seconds = passed / (step - self.first_step) * (steps - step)
            left = f", {format_seconds(seconds)} left"
        self.bar = (
            f'<progress value="{step}" max="{steps}" style="width: 20em"></progress> '
            f"step {step:,} of {steps:,}{left}<br>{self.figures}"
        )
        began = time.monotonic()
        if (draw or began >= self.draw_next) and (figure := curves_of(run.folder, run.title, run.compressors)):
            picture = base64.b64encode(figure._repr_png_()).decode()
            self.curves = f'<img src="data:image/png;base64,{picture}" alt="curves" style="max-width: 40em">'
            ended = time.monotonic()
            self.draw_next = ended + (ended - began) / DRAWING_SHARE
        self.show(f"{self.bar}<br>{self.curves}{self.samples}")

    def show(self, content: str) -> None:
        """Puts HTML in the place of what the cell shows."""
        from IPython.display import HTML, display

        if self.handle is None:
            self.handle = display(HTML(content), display_id=True)
        else:
            self.handle.update(HTML(content))
