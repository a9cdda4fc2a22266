"""What the user sees of a run while it trains, and what is recorded of it."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from files_mini import append_text, json_lines, read_steps, reason_of, write_text
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment, Segments
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0  # without a terminal, a line of progress at most this often
SAMPLE_LINES = 5  # of a sample on the way
# What a terminal obeys and does not show, such as an escape; an untrained model writes it as often as a letter.
CONTROL_CHARACTERS = dict.fromkeys((*range(9), *range(10, 32), *range(127, 160)), "\ufffd")
SHORTEST_BAR, LONGEST_BAR = 10, 20  # columns
LABEL_POINTS = 12.0  # the height of a label beside a curve
BITS_PER_BYTE = (
    "Bits per byte: how many bits the model needs for each byte of text that it has not seen; "
    "8 if it knows nothing, and less is better."
)
# What Mini itself records of an evaluation. All other names with eval_ are metrics of the caller.
EVALUATION_METRICS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_valid_functions")

if TYPE_CHECKING:
    from accelerate import Accelerator
    from matplotlib.axes import Axes
    from modeling_mini.analysis.figures import Picture

console = Console()
warnings_console = Console(stderr=True)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None, unit: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, and a line elsewhere. Yields the function that advances it."""
    if not (show and console.is_interactive):
        if show:
            console.print(f"{description} ...", highlight=False, markup=False, soft_wrap=True)
        yield lambda amount: None
        return
    amount_column = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount_column, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


class StatusLine:
    """
    The live line of a run, which always fits into the terminal. Step, total and the time left stay to the last; of the
    bar and of `details`, the most important first, there is as much as there is room for.
    """

    def __init__(self, step: int, total: int) -> None:
        self.step, self.total, self.seconds_left = step, total, math.nan
        self.details = ["first step"] if step < total else []  # a run that is over already has no more steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A terminal may break the line that fills its last column.
        width = options.max_width - 1
        count = f"{self.step:>{len(str(self.total))}}/{self.total}"
        time_left = f" {format_seconds(self.seconds_left)} left" if math.isfinite(self.seconds_left) else ""
        for left in (time_left, time_left.removesuffix(" left"), ""):
            if (columns := width - len(count) - len(left)) >= 0:
                break
        first = fitting(self.details[:1], columns)
        columns -= len(first)
        bar = SHORTEST_BAR + 1 if columns > SHORTEST_BAR else 0  # with the space before it
        others = fitting(self.details[1:], columns - bar)
        bar = min(LONGEST_BAR + 1, columns - len(others)) if bar else 0
        yield Text(count[: max(1, width)], style="progress.download", end="")
        if bar:
            drawn = [Segment(" "), *console.render(ProgressBar(self.total, self.step, width=bar - 1), options)]
            yield from Segment.adjust_line_length(drawn, bar)  # without colours, what is missing is not drawn
        yield Text(left, style="progress.remaining", end="")
        yield Text(first + others, end="")


def fitting(details: list[str], columns: int) -> str:
    """As many of the details, from the first on, as fit into so many columns; each whole, with a gap before it."""
    text = ""
    for detail in details:
        if len(text) + len(detail) + 2 > columns:
            break
        text += f"  {detail}"
    return text


class LiveLine(Live):
    """
    A live display of one line. The cursor waits at the beginning of the line, and not at its end as in rich: when the
    terminal becomes narrower and breaks the line in two, all of it is still behind the cursor and is erased.
    """

    ERASE = Segments([Segment("\r\x1b[J", None, [(ControlType.CARRIAGE_RETURN,)])])

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        if not self.console.is_interactive:
            return super().process_renderables(renderables)
        return [self.ERASE, *renderables, self.renderable, Control(ControlType.CARRIAGE_RETURN)]

    def stop(self) -> None:
        if self.is_started:
            super().stop()
            self.console.line()


class Monitor:
    """
    Records metrics in `metrics.jsonl` and with trackers, and shows them: a live line on a terminal, plain lines
    elsewhere. Every process has one, and only that of the main process does anything.

    Args:
        folder: the run folder.
        is_quiet: whether nothing is printed, and what would be a line on stderr is a Python warning.
    """

    def __init__(self, folder: Path, accelerator: "Accelerator", is_quiet: bool = False) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.is_quiet = is_quiet
        self.console = Console(quiet=True, force_terminal=False) if is_quiet else console
        self.enabled = accelerator.is_main_process
        self.start_step = self.max_steps = 0
        self._status: StatusLine | None = None
        self._live: LiveLine | None = None
        self._last_line = 0.0
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of earlier legs of the run

    def start(self, start_step: int, max_steps: int) -> None:
        """Opens the live display. Lines of `metrics.jsonl` after `start_step`, from an interrupted run, are dropped."""
        self.start_step, self.max_steps, self._started = start_step, max_steps, time.monotonic()
        if not self.enabled:
            return
        kept = [line for line in read_metrics(self.folder) if line["step"] <= start_step]
        self._seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        write_text(self.metrics_path, json_lines(kept))
        if self.console.is_interactive:
            self._status = StatusLine(start_step, max_steps)
            self._live = LiveLine(self._status, console=self.console)
            self._live.start(refresh=True)

    def finish_trackers(self) -> None:
        """Lets the trackers write what they still hold."""
        # Not `end_training`, which also destroys the process group: over gloo, that hangs or aborts now and then.
        for tracker in self.accelerator.trackers:
            with self.warning_of_errors(f"the end of the run for {tracker.name}"):
                tracker.finish()

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """
        Adds a line to `metrics.jsonl`, with the seconds that the run has taken so far (evaluations and checkpoints
        among them), and the metrics to the trackers.
        """
        if not self.enabled:
            return
        seconds = round(self._seconds_before + time.monotonic() - self._started, 3)
        with self.warning_of_errors(f"the metrics of step {step}"):
            append_text(self.metrics_path, json_lines([{"step": step, "seconds": seconds, **metrics}]))
        with self.warning_of_errors(f"the metrics of step {step} for trackers"):
            self.accelerator.log(metrics, step=step)

    def record_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Adds lines to `samples.jsonl`. Lines of this step or later, from an interrupted run, are replaced."""
        if not self.enabled:
            return
        path = self.folder / "samples.jsonl"
        with self.warning_of_errors(f"the samples of step {step}"):
            lines = [line for line in read_steps(path) if line["step"] < step]
            lines += [{"step": step, **sample} for sample in samples]
            write_text(path, json_lines(lines))

    @contextlib.contextmanager
    def warning_of_errors(self, what: str) -> Iterator[None]:
        """Warns if something could not be written. Only weights that cannot be written may stop a run."""
        try:
            yield
        except Exception as error:  # trackers raise errors of their own
            self.warn(f"{what} could not be written ({reason_of(error)}).")

    def training_step(self, step: int, metrics: dict[str, float]) -> None:
        """Records and shows the metrics of a training step."""
        self.record(step, metrics)
        if not self.enabled:
            return
        details = []
        if "loss" in metrics:
            details += [f"bits/byte {metrics['bits_per_byte']:.3f}", f"loss {metrics['loss']:.3f}"]
        details += [f"{metrics['tokens_per_second']:,.0f} tokens/s", f"lr {metrics['learning_rate']:.1e}"]
        if "mfu" in metrics:
            details.append(f"MFU {metrics['mfu']:.0%}")
        if self._status is not None:
            self._status.details = details
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or step == self.max_steps:
            self._last_line = time.monotonic()
            self.say(
                "  ".join(
                    [f"step {step}/{self.max_steps}", *details, f"{format_seconds(self.seconds_left(step))} left"]
                )
            )

    def advance(self, step: int) -> None:
        """Shows that a step is done."""
        if self._status is not None:
            self._status.step, self._status.seconds_left = step, self.seconds_left(step)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Says in the live line what the run does between two steps: it may take minutes, and the step stands still."""
        if self._status is None:
            yield
            return
        before, self._status.details = self._status.details, [what, *self._status.details]
        try:
            yield
        finally:
            self._status.details = before

    def seconds_left(self, step: int) -> float:
        """The seconds left, if the other steps take as long as those so far, with all that happens between them."""
        return (time.monotonic() - self._started) / max(1, step - self.start_step) * (self.max_steps - step)

    def introduce(self, lines: list[str]) -> None:
        """Says what the run is about to do."""
        for line in lines:
            self.say(line)
        if not self.console.is_interactive:
            self.say("First step ...")  # the live line says it too

    def show_samples(self, step: int, samples: list[str]) -> None:
        """Shows how a few lines of each sample begin, above the live display."""
        if not self.enabled:
            return
        overflow = "ellipsis" if self.console.is_terminal else "ignore"
        for sample in samples:
            lines = [line.translate(CONTROL_CHARACTERS) for line in sample.splitlines() if line.strip()][:SAMPLE_LINES]
            name = f"step {step}: "
            for number, line in enumerate(lines):
                text = Text(name + line if number == 0 else " " * len(name) + line)
                self.console.print(text, no_wrap=True, overflow=overflow, crop=self.console.is_terminal)

    def say(self, line: str) -> None:
        """Prints a line above the live display."""
        if self.enabled:
            # In a terminal, lines break between words. Elsewhere somebody may look for a sentence in a file.
            self.console.print(line, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def warn(self, line: str) -> None:
        """Prints a warning on stderr, for a fault that does not end the run."""
        if self.enabled and self.is_quiet:
            warnings.warn(line, stacklevel=2)
        elif self.enabled:
            warnings_console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live display."""
        if self._live is not None:
            self._live.stop()


def format_seconds(seconds: float) -> str:
    """`4:34` for minutes, `1:02:03` for hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, without one that a crash cut short, and without what is no number."""
    lines = read_steps(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if isinstance(value, int | float)} for line in lines]


def draw_curves(folder: Path, title: str, compressors: dict[str, float]) -> None:
    """Draws `curves.png`; see `curves_of`."""
    from modeling_mini.analysis.figures import write_figure  # loads matplotlib

    if (figure := curves_of(folder, title, compressors)) is not None:
        write_figure(figure, folder / "curves.png")


def curves_of(folder: Path, title: str, compressors: dict[str, float]) -> "Picture | None":
    """
    A figure of bits per byte of training and validation beside the compressors, and of the learning rate; `None` where
    nothing was logged yet.
    """
    from matplotlib.ticker import LogLocator, NullLocator
    from modeling_mini.analysis.figures import new_figure  # loads matplotlib

    metrics = read_metrics(folder)
    train = [(m["step"], m["bits_per_byte"]) for m in metrics if "bits_per_byte" in m]
    validation = [(m["step"], m["eval_bits_per_byte"]) for m in metrics if "eval_bits_per_byte" in m]
    rates = [(m["step"], m["learning_rate"]) for m in metrics if "learning_rate" in m]
    if not train:
        return None
    own = own_metrics_in(metrics)
    # The margins are given, in inches: to find them, matplotlib draws a figure three times, which took a run of the
    # tests longer than its training.
    width, height = 8, 5.5 + 1.5 * len(own)
    with new_figure(figsize=(width, height), layout="none") as figure:
        curve, rate, *others = figure.subplots(
            2 + len(own), 1, sharex=True, height_ratios=(4, 1, *[1.5 for _ in own]),
            gridspec_kw={
                "left": 0.85 / width, "right": 1 - 1.3 / width, "bottom": 0.75 / height, "top": 1 - 0.55 / height,
                "hspace": 0.15,
            },
        )  # fmt: skip
        curve.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1.2, label="training")
        labels = [(bits, f"{name} -9  {bits:.3f}", "#737373") for name, bits in compressors.items()]
        for (bits, *_), style in zip(labels, ("--", ":"), strict=False):
            curve.axhline(bits, color="#737373", linestyle=style, linewidth=1)
        if validation:
            curve.plot(*zip(*validation, strict=True), color="#08519c", marker="o", markersize=4, label="validation")
            labels.append((validation[-1][1], f"validation  {validation[-1][1]:.3f}", "#08519c"))
        shown = [bits for _, bits in [*train, *validation]] + list(compressors.values())
        if max(shown) > 2 * min(shown):  # the fall from 8, and small differences at its end
            curve.set_yscale("log")
            curve.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
            curve.yaxis.set_major_formatter("{x:g}")
            curve.yaxis.set_minor_locator(NullLocator())
        curve.set_ylim(min(shown) * 0.95, max(shown) * 1.05)
        curve.set_ylabel("bits per byte")
        curve.set_title(title, loc="left", parse_math=False)  # a name may hold dollars
        figure.legend(loc="upper right", ncols=2, frameon=False)
        write_beside(curve, labels)
        figure.supxlabel(BITS_PER_BYTE, fontsize=8, color="#525252")
        curve.grid(alpha=0.3)
        rate.plot(*zip(*rates, strict=True), color="#525252", linewidth=1.2)
        rate.set_ylabel("learning rate")
        rate.grid(alpha=0.3)
        for axes, (name, points) in zip(others, own.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color="#08519c", marker="o", markersize=3, linewidth=1.2)
            axes.set_ylabel(name, parse_math=False)
            axes.grid(alpha=0.3)
        figure.axes[-1].set_xlabel("step")
    return figure


def write_beside(axes: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Writes labels (value, text, colour) at the right edge, each at its value, or above the label below it."""
    lowest = -math.inf
    for value, text, color in sorted(labels):
        height = axes.transData.transform((0, value))[1] * 72 / axes.figure.dpi  # points
        lowest = max(height, lowest + LABEL_POINTS)
        axes.annotate(
            text, (1, value), xycoords=("axes fraction", "data"), xytext=(6, lowest - height),
            textcoords="offset points", va="center", color=color, annotation_clip=False,
        )  # fmt: skip


def own_metrics_in(lines: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """The metrics that are not Mini's own in the lines of evaluations, by name: step and value."""
    own: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval_") and name not in EVALUATION_METRICS:
                own.setdefault(name.removeprefix("eval_"), []).append((line["step"], value))
    return own
