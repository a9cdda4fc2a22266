"""
The tests that only a GPU can show to be right; each outcome is written when it is known.

    python benchmarks/correctness.py [--tests tests/test_gpu.py ...] [--output FILE]

They run one after the other in one process. A test that ends that process, that hangs, or that leaves CUDA in error
costs the others nothing: they go on in a new process. The last line is JSON.
"""

import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from files_mini import write_text
from rich.console import Console

from measuring import PlaceSettings, in_child, machine, run_benchmark, settings_of  # isort: skip

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_gpu.py",
    "tests/modeling_mini/test_graph_decoding.py::test_on_a_gpu",
    "tests/modeling_mini/test_plans.py::test_flash_attention_equals_sdpa",
    "tests/modeling_mini/test_plans.py::test_flex_attention_trains_on_a_gpu",
)
RUNNING = "running"
LONGEST_REASON = 2000  # characters; what matters is at the end


@dataclass
class Settings(PlaceSettings):
    """What is tested."""

    tests: list[str] = option(list(TESTS), "files of tests, or single tests, by their names in pytest")
    seconds: int = option(60, "how long one test may take", at_least=1)

    def __post_init__(self) -> None:
        for name in self.tests:
            if not (ROOT / name.split("::")[0]).is_file():
                raise ValueError(f"There is no file of tests {name.split('::')[0]!r} in {ROOT}.")
        if importlib.util.find_spec("pytest") is None:
            raise ValueError("The tests need pytest, which is not installed: pip install pytest")
        super().__post_init__()


class Recorder:
    """
    A plugin of pytest that runs the tests without an outcome, and writes each outcome when it is known.

    Args:
        path: of the results, with `outcomes`: for each test, `outcome` and `reason`.
        seconds: how long one test may take.
    """

    def __init__(self, path: Path, seconds: int) -> None:
        self.path, self.seconds = path, seconds
        self.results = json.loads(path.read_text(encoding="utf-8"))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.results["outcomes"]]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record(nodeid, RUNNING, "")
        signal.alarm(self.seconds)  # ends the process

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[-1] if report.skipped else report.longreprtext
            self.record(report.nodeid, report.outcome, reason[-LONGEST_REASON:])
            if report.failed and "CUDA error" in reason:
                os._exit(1)

    def pytest_runtest_logfinish(self) -> None:
        signal.alarm(0)

    def record(self, test: str, outcome: str, reason: str) -> None:
        self.results["outcomes"][test] = {"outcome": outcome, "reason": reason}
        write_text(self.path, json.dumps(self.results))


def run_tests(tests: list[str], seconds: int, path: str) -> int:
    """The exit code of pytest."""
    import pytest

    # Not with the options of pyproject.toml, which need another package and several processes.
    options = ["--override-ini=addopts=", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    os.chdir(ROOT)
    return pytest.main([*options, *tests], [Recorder(Path(path), seconds)])


def measure(settings: Settings) -> dict[str, Any]:
    """
    The outcomes: `passed`, `skipped` or `failed`.

    Raises:
        ValueError: if pytest finds no test of such a name.
    """
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    results = {"benchmark": "correctness", "machine": machine(settings.device), "settings": asdict(settings)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(settings.output or Path(folder) / "results.json").absolute()
        write_text(path, json.dumps({**results, "outcomes": {}}))
        while True:
            try:
                code = in_child(run_tests, settings.tests, settings.seconds, str(path))
            except BrokenProcessPool:
                code = None
            outcomes = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
            if code in (0, 1):  # all passed, or some failed
                return {**results, "outcomes": outcomes}
            if code is not None or not outcomes:
                raise ValueError(f"pytest could not run the tests {' '.join(settings.tests)}; it says why above.")
            for outcome in outcomes.values():
                if outcome["outcome"] == RUNNING:
                    reason = f"it ended the process, or took more than {settings.seconds} seconds"
                    outcome |= {"outcome": "failed", "reason": reason}
            write_text(path, json.dumps({**results, "outcomes": outcomes}))


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console(highlight=False, markup=False)
    for test, outcome in results["outcomes"].items():
        reason = "" if outcome["outcome"] == "passed" else f": {last_line(outcome['reason'])}"
        console.print(f"{test} {outcome['outcome']}{reason}", soft_wrap=True)
    counts = Counter(outcome["outcome"] for outcome in results["outcomes"].values())
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


def last_line(reason: str) -> str:
    """What was raised, of a report of pytest."""
    lines = reason.strip().splitlines() or [""]
    return next((line.removeprefix("E").strip() for line in reversed(lines) if line.startswith("E  ")), lines[-1])


if __name__ == "__main__":
    run_benchmark(settings_of(Settings, __doc__), measure, show)
