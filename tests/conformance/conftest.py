"""
Runs transformers' own test mixins on Mini, and holds the outcomes to the rules of `conformance_mini/rules.py`.

`python -m pytest tests/conformance --write-conformance-counts` writes the counts into docs/CONFORMANCE.md.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read by transformers.testing_utils when it is imported. The tests that it leaves out as slow are slow with models of
# another size, and the same tests run on every machine unless its user asks for the accelerator.
os.environ["RUN_SLOW"] = "1"
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
import torch
from conformance_mini import counts
from conformance_mini.rules import (
    PROPERTY,
    counted_constructions,  # noqa: F401  (a fixture, which counts from here on)
    pytest_runtest_makereport,  # noqa: F401  (a hook, likewise)
)
from conformance_mini.source_distribution import SuiteUnavailableError, fetched_suite

collect_ignore = ["support"]
try:
    sys.path.insert(0, str(fetched_suite()))
except SuiteUnavailableError:
    # Without the suites their users cannot be imported. test_source_distribution.py says why and fails.
    collect_ignore += [path.name for path in Path(__file__).parent.glob("test_*_suites.py")]

MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
)
outcomes: list[counts.Outcome] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-conformance-counts", action="store_true", help="write the counts of this run into docs/CONFORMANCE.md"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: a mark of transformers' tests")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 32 x 32 gain nothing from a second thread, and lose seconds where other workers hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_messages() -> Iterator[None]:
    """The suites write tensors into a message for each comparison, also where they are equal: seven seconds of some."""
    torch.set_printoptions(edgeitems=1, threshold=1)
    yield
    torch.set_printoptions(profile="default")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes.extend(value for name, value in report.user_properties if name == PROPERTY)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not outcomes:
        return
    terminalreporter.section("transformers' suites on Mini")
    terminalreporter.write_line(counts.table(outcomes))
    if config.getoption("--write-conformance-counts", default=False):
        page = config.rootpath / "docs" / "CONFORMANCE.md"
        counts.write(page, counts.table(outcomes), counts.skip_table(outcomes))
