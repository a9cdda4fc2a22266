"""
Trains several runs in one process and compares them: `python -m training_mini.sweep FILE --seeds 1 2 3`.

The file is YAML: under `runs` the settings of each run by its name, under `common` those of all.

    common: {dataset: sample, max_steps: 300}
    runs:
      with-qk-norm: {}
      without: {qk_norm: false}

Seeds take turns, so that an hour in which the machine is slow does not fall on one run alone. A run that diverges is
compared as far as it came. The same command again goes on where the last one stopped, and finished runs are not trained
again.
"""

import collections
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from entry_points_mini import EXIT_INTERRUPTED, ArgumentParser, Settings, load_yaml, one_sentence_errors, option
from files_mini import RUNS_FOLDER, read_text
from shape_mini import nearest_name

from .arguments import Arguments
from .compare import compare
from .monitoring import console, warnings_console
from .settings import TrainingSettings

KEYS = ("common", "runs", "seeds")
SETTINGS = "config.yaml"  # of a run
EACH_RUN = ("output_dir", "resume", "overwrite", "seed")  # settings that the sweep gives to each run itself


@dataclass
class SweepSettings(Settings):
    """Which seeds, and where the runs go."""

    seeds: list[int] = option([], "train each run with each of these seeds (default: those of the file, or 42)")
    folder: str | None = option(None, "folder of the runs (default: runs/ and the name of the file)")


@dataclass(frozen=True)
class PlannedRun:
    """
    One of the runs.

    Attributes:
        label: its name and its seed, for people.
        given: its settings.
        arguments: the same, checked and complete.
    """

    label: str
    given: dict[str, Any]
    arguments: Arguments = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.arguments.output_dir

    def is_finished(self) -> bool:
        """
        Whether it was trained to its end before. A folder `final` alone does not say so: a run that is stopped before
        its first evaluation leaves one too.

        Raises:
            ValueError: if there is another run in its folder.
        """
        from .checkpoints import read_state, states_of  # loads torch, which no help text needs

        if not (self.folder / SETTINGS).is_file():
            return False
        if not self.arguments.are_those_of(self.folder):
            raise ValueError(
                f"There is a run in {str(self.folder)!r} whose settings are others than those of {self.label}: move it "
                f"away, or name another --folder."
            )
        if not (self.folder / "final").is_dir():
            return False
        if not (states := states_of(self.folder)):
            return True  # a run that stops leaves a checkpoint; somebody has made room
        steps = yaml.safe_load(read_text(self.folder / SETTINGS))["max_steps"]  # of max_minutes, those that fitted
        try:
            return read_state(states[-1]).is_over(self.arguments.with_max_steps(steps).optimization)
        except (OSError, ValueError, TypeError):
            return False  # damaged: the run goes back to the checkpoint before it


def plan(path: Path, seeds: list[int], folder: Path) -> list[PlannedRun]:
    """
    The runs of a sweep file, seed by seed.

    Raises:
        ValueError: for a file that is no sweep, and for settings that cannot be a run, naming the run.
    """
    content = read_sweep(path)
    common = content.get("common") or {}
    planned: list[PlannedRun] = []
    for seed in seeds or content.get("seeds") or [42]:
        for name, own in content["runs"].items():
            given = {**common, **(own or {}), "seed": seed}
            if ".." in Path(str(name)).parts or Path(str(name)).is_absolute():
                raise ValueError(f"The run {name!r} in {path} would lie outside of {str(folder)!r}: rename it.")
            try:
                settings = TrainingSettings(**given, output_dir=str(folder / f"{name}-seed-{seed}"))
                planned.append(PlannedRun(f"{name}, seed {seed}", given, arguments := settings.arguments()))
                if arguments.run.num_processes > 1:
                    raise ValueError("a sweep trains in one process: leave out num_processes.")
            except (ValueError, TypeError) as error:
                raise ValueError(f"The run {name!r} in {path}: {error}") from None
    for label, count in collections.Counter(run.label for run in planned).items():
        if count > 1:
            raise ValueError(f"{path} has {count} times the run {label}: name each run and each seed once.")
    return planned


def read_sweep(path: Path) -> dict[str, Any]:
    """The content of a sweep file, of which the form is right; raises ValueError where it is not."""
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        content = load_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        raise ValueError(f"{path} must say under 'runs' what to train: names, and the settings of each.")
    for key in content:
        if key not in KEYS:
            hint = nearest_name(str(key), KEYS) or "."
            raise ValueError(f"{path} has the key {key!r}, and a sweep has {', '.join(KEYS)}{hint}")
    if not isinstance(seeds := content.get("seeds") or [], list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds in {path} must be a list of whole numbers, got {content['seeds']!r}.")
    for name, settings in {"common": content.get("common"), **content["runs"]}.items():
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{name!r} in {path} must hold settings and their values, got {settings!r}.")
        if given := [setting for setting in EACH_RUN if setting in (settings or {})]:
            raise ValueError(f"{given[0]} in {name!r} of {path}: a sweep chooses that for each run.")
    return content


def sweep(planned: list[PlannedRun], out: Path) -> bool:
    """Trains what is not finished, and compares all; whether nobody stopped it."""
    from .checkpoints import DivergedError, states_of  # these load torch, which no help text needs
    from .from_python import train

    finished = [run.is_finished() for run in planned]  # before any work: a run that is in the way is an error
    for number, (run, is_finished) in enumerate(zip(planned, finished, strict=True), start=1):
        before = " (finished before)" if is_finished else ""
        console.print(f"Run {number} of {len(planned)}: {run.label}{before}", markup=False)
        if is_finished:
            continue
        given = {**run.given, "output_dir": str(run.folder)}
        if states_of(run.folder):
            given["resume"] = True
            given.pop("max_minutes", None)  # the run knows how many steps that are
        elif (run.folder / SETTINGS).is_file():
            given["overwrite"] = True  # it was killed before its first checkpoint
        try:
            result = train(TrainingSettings(**given))
        except DivergedError as error:
            line = f"warning: {run.label} has diverged: {error}"
            warnings_console.print(line, highlight=False, markup=False, soft_wrap=True)
            continue
        if result.stopped_by is not None:
            console.print("Stopped. The same command goes on from here.")
            return False
    compare([run.folder for run in planned], out)
    return True


def main(argv: list[str]) -> None:
    parser = ArgumentParser([SweepSettings], description="Train several runs in one process, and compare them.")
    parser.add_argument("file", metavar="FILE", help="YAML file with the settings of the runs")
    settings, others = parser.parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("A sweep trains in one process: start it by python -m training_mini.sweep.")
    folder = Path(settings.folder) if settings.folder is not None else RUNS_FOLDER / Path(others.file).stem
    planned = plan(Path(others.file), settings.seeds, folder)
    if not sweep(planned, folder / "comparison.png"):
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    with one_sentence_errors():
        main(sys.argv[1:])
