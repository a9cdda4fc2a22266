"""
Compares runs: `python -m training_mini.compare runs/a runs/b ...` prints one table, and draws one picture of the curves
by step, by tokens and by time. Runs whose settings differ in the seed alone are one row, with mean and spread.
"""

import io
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from entry_points_mini import ArgumentParser, Settings, one_sentence_errors, option
from files_mini import read_text, write_bytes, writing
from rich import box
from rich.console import Console
from rich.table import Table

from .monitoring import format_seconds, read_metrics

console = Console(highlight=False, markup=False)  # names of runs may hold brackets

# Settings that decide on which text, and on how much of it, a run is evaluated.
CORPUS = ("dataset", "dataset_config", "dataset_split", "validation_ratio", "max_eval_tokens", "text_column")
# Settings that change nothing in what is learned.
WITHOUT_INFLUENCE = (
    "cache_dir", "eval_steps", "internals_steps", "keep_every", "keep_last", "logging_steps", "on_save_error",
    "report_to", "sample_every", "sample_prompts", "save_steps",
)  # fmt: skip
LARGEST_RATIO = 1.02  # of parameters; beyond it the models are said to be of different sizes


@dataclass
class ComparisonSettings(Settings):
    """Where the picture goes."""

    out: str = option("comparison.png", "the picture of the curves; its name ends in .png or .svg")

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix not in (".png", ".svg"):
            raise ValueError(f"out must end in .png or .svg, got {self.out!r}.")


class RunRecord:
    """
    What a run folder says of a run; a run of an older version says less, and then a figure is `None`.

    Raises:
        ValueError: if the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "config.yaml"
        if not path.is_file():
            raise ValueError(f"There is no run in {str(folder)!r}: it has no config.yaml.")
        self.folder, self.name = folder, folder.resolve().name
        try:
            self.settings: dict[str, Any] = yaml.safe_load(read_text(path))
        except yaml.YAMLError:
            self.settings = {}
        has_names = isinstance(self.settings, dict) and all(isinstance(name, str) for name in self.settings)
        if not has_names or not self.settings:
            raise ValueError(f"{path} does not hold the settings of a run.")
        self.metrics = read_metrics(folder)

    @cached_property
    def evaluations(self) -> list[tuple[int, float]]:
        """Steps and bits per byte of the held-out text."""
        return self.points("eval_bits_per_byte")

    def points(self, figure: str) -> list[tuple[int, float]]:
        """Steps and a figure of `metrics.jsonl`."""
        return [(line["step"], line[figure]) for line in self.metrics if math.isfinite(line.get(figure, math.nan))]

    @property
    def final(self) -> float | None:
        """Bits per byte of the last evaluation."""
        return self.evaluations[-1][1] if self.evaluations else None

    @property
    def best(self) -> float | None:
        """The lowest bits per byte of all evaluations."""
        return min((bits for _, bits in self.evaluations), default=None)

    @property
    def steps(self) -> int:
        """The last step that left a line."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the log lines, so that a slow minute does not count."""
        rates = [line["tokens_per_second"] for line in self.metrics if "tokens_per_second" in line]
        return statistics.median(rates) if rates else None

    @property
    def seconds(self) -> float | None:
        """How long the run took, with evaluations and checkpoints, over all of its legs."""
        return max((line["seconds"] for line in self.metrics if "seconds" in line), default=None)

    @property
    def parameters(self) -> int | None:
        """As recorded, or else counted in the weights that the run left."""
        recorded = [line["parameters"] for line in self.metrics if "parameters" in line]
        return recorded[0] if recorded else self._parameters_of_weights()

    def _parameters_of_weights(self) -> int | None:
        from safetensors import SafetensorError, safe_open

        for path in (self.folder / name / "model.safetensors" for name in ("final", "best")):
            try:
                with safe_open(path, framework="np") as weights:
                    shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (no dict)
            except (OSError, SafetensorError):
                continue
            return sum(map(math.prod, shapes))
        return None

    def curve(self, figure: str, axis: str) -> list[tuple[float, float]]:
        """A figure over "step", "tokens" or "seconds"; empty if an older run did not record them."""
        known = {line["step"]: line[axis] for line in self.metrics if axis in line}
        return [(known[step], value) for step, value in self.points(figure) if step in known]


class Group:
    """Runs whose settings differ in the seed alone, each with a seed of its own."""

    def __init__(self, runs: list[RunRecord]) -> None:
        self.runs = runs
        self.settings = {name: value for name, value in runs[0].settings.items() if name != "seed"}

    @property
    def name(self) -> str:
        first = self.runs[0]
        if len(self.runs) == 1:
            return first.name
        seeds = ", ".join(str(run.settings.get("seed", "?")) for run in self.runs)
        name = first.name.removesuffix(f"-seed-{first.settings.get('seed')}")  # a sweep names each run after its seed
        return f"{name} (seeds {seeds})"

    def values(self, figure: str) -> list[float]:
        """A figure of each run that has it."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]

    def mean(self, figure: str) -> float | None:
        """The mean of a figure over seeds; `None` where no run has it."""
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def mean_and_spread(self, figure: str) -> str:
        """The mean over seeds, and the standard deviation where there are several."""
        values = self.values(figure)
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4f}{spread}"


def grouped(runs: list[RunRecord]) -> list[Group]:
    """
    The runs by their settings, in the order in which they were given. Of several with one seed, each is in another
    group: they are copies, or what versions of Mini or machines have made of the same settings.
    """
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    copies: Counter[str] = Counter()
    for run in runs:
        settings = sorted((name, value) for name, value in run.settings.items() if name not in WITHOUT_INFLUENCE)
        but_seed = repr([(name, value) for name, value in settings if name != "seed"])
        groups.setdefault((but_seed, copies[repr(settings)]), []).append(run)
        copies[repr(settings)] += 1
    return [Group(members) for members in groups.values()]


def differing_settings(groups: list[Group]) -> list[str]:
    """The settings that are not the same in all groups, without those that change nothing in what is learned."""
    names = dict.fromkeys(name for group in groups for name in group.settings if name not in WITHOUT_INFLUENCE)
    return [name for name in names if len({repr(group.settings.get(name)) for group in groups}) > 1]


def usual_settings(groups: list[Group]) -> dict[str, str]:
    """Of the settings that differ, what most of the groups have; empty for two groups, where that says nothing."""
    if len(groups) < 3:
        return {}
    texts = {name: [as_text(group.settings.get(name)) for group in groups] for name in differing_settings(groups)}
    return {name: statistics.mode(values) for name, values in texts.items()}


def notes_on(groups: list[Group]) -> list[str]:
    """What a reader has to know before the figures are compared, a sentence each."""
    notes = []
    runs = [run for group in groups for run in group.runs]
    if differing := [name for name in CORPUS if len({repr(run.settings.get(name)) for run in runs}) > 1]:
        notes.append(
            f"These runs were evaluated on different text ({', '.join(differing)} differ): their bits per byte cannot "
            f"be compared."
        )
    sizes = {group.name: size for group in groups if (size := group.mean("parameters")) is not None}
    if sizes and max(sizes.values()) > LARGEST_RATIO * min(sizes.values()):
        large, small = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        notes.append(
            f"The models are of different sizes: {large} has {sizes[large] / sizes[small]:.2f} times the parameters of "
            f"{small}."
        )
    for run in runs:
        if not run.evaluations:
            notes.append(f"{run.name} has no evaluation yet.")
        elif isinstance(planned := run.settings.get("max_steps"), int) and run.steps < planned:
            notes.append(f"{run.name} stands at step {run.steps} of {planned}.")
    return notes


def as_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_of(groups: list[Group]) -> Table:
    """A row for each group. Terminals are narrow: settings stand below the name, and only those that are unusual."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, collapse_padding=True, caption_justify="left")
    usual, differing = usual_settings(groups), differing_settings(groups)
    names = []
    for group in groups:
        settings = {name: as_text(group.settings.get(name)) for name in differing}
        own = [f"  {name} {value}" for name, value in settings.items() if value != usual.get(name)]
        names.append("\n".join([group.name, *own]))
    columns = {"run": names}
    sizes = [group.mean("parameters") for group in groups]
    columns["parameters"] = [f"{size / 1e6:.2f}M" if size is not None else "-" for size in sizes]
    rates = [group.mean("tokens_per_second") for group in groups]
    columns["tokens/s"] = [f"{rate:,.0f}" if rate is not None else "-" for rate in rates]
    times = [group.mean("seconds") for group in groups]
    columns["time"] = [format_seconds(seconds) if seconds is not None else "-" for seconds in times]
    columns["bits/byte"] = [group.mean_and_spread("final") for group in groups]
    columns["best"] = [group.mean_and_spread("best") for group in groups]
    if columns["best"] == columns["bits/byte"]:
        del columns["best"]  # each was best at its end
    if usual:
        listed = ", ".join(f"{name} {value}" for name, value in usual.items())
        table.caption = f"Where a setting is not named: {listed}."
    for name in columns:
        if name == "run":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def draw(groups: list[Group], path: Path) -> None:
    """Draws bits per byte over steps, tokens and seconds: a colour for each group, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for plot, axis in zip(figure.subplots(1, 3, sharey=True), ("step", "tokens", "seconds"), strict=True):
        for number, group in enumerate(groups):
            for i, run in enumerate(group.runs):
                color = f"C{number % 10}"
                if points := run.curve("bits_per_byte", axis):
                    plot.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.4)
                if points := run.curve("eval_bits_per_byte", axis):
                    name = group.name if i == 0 else None
                    plot.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=name)
        plot.set_xlabel(axis)
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            for text in plot.legend(frameon=False, fontsize=8).get_texts():
                text.set_parse_math(False)  # names of runs may hold dollars
        else:
            plot.text(0.5, 0.5, "not recorded", ha="center", transform=plot.transAxes)
    held_out = [bits for group in groups for run in group.runs for _, bits in run.evaluations]
    if held_out:  # training begins at 8 bits; let it leave the picture, so that the rest can be read
        figure.axes[0].set_ylim(min(held_out) - 0.1, max(held_out) + 0.3)
    figure.axes[0].set_ylabel("bits per byte (thin: training)")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format=path.suffix.removeprefix("."))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())


def compare(folders: list[Path], out: Path) -> None:
    """
    Prints the table and the notes, and draws the picture.

    Raises:
        ValueError: if a folder holds no run.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        places.setdefault(folder.resolve(), folder)
    runs = [RunRecord(folder) for folder in places.values()]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(run.folder)
    groups = grouped(runs)
    console.print(table_of(groups))
    for note in notes_on(groups):
        console.print(f"Note: {note}", soft_wrap=True)
    draw(groups, out)
    console.print(f"Curves: {out}", soft_wrap=True)


def main(argv: list[str]) -> None:
    parser = ArgumentParser([ComparisonSettings], description="Compare runs: one table, and one picture of the curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN ...", help="run folders, such as runs/tiny-python-stdlib")
    settings, others = parser.parse(argv)
    compare([Path(run) for run in others.runs], Path(settings.out))


if __name__ == "__main__":
    with one_sentence_errors():
        main(sys.argv[1:])
