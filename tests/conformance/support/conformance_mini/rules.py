"""
Three rules that pytest does not know, for test classes that say what they construct (`OfOneShape`, `SavedTokenizer`):

- a skip that is not in `expected_skips.py` is a failure;
- a pass of a test that, says `expected_skips.py`, cannot run on Mini is a failure: the list is out of date;
- a pass that has made no model (or whatever the class says) is a failure, unless `expected_skips.py` says why.

Each outcome goes into the report as the property "conformance": see `counts.Outcome`.
"""

from collections.abc import Generator

import pytest

from . import constructions, expected_skips

PROPERTY = "conformance"
skipped_subtests = pytest.StashKey[list[str]]()
passed_subtests = pytest.StashKey[int]()
failed_subtests = pytest.StashKey[int]()


def _suite(item: pytest.Item) -> str | None:
    """
    The name of the mixin that a test comes from: the last class in its line that has it, so not one that overrides or
    wraps it. None for a test to which the rules do not apply.
    """
    cls = getattr(item, "cls", None)
    if not hasattr(cls, "constructs"):
        return None
    suite = next(base for base in reversed(cls.__mro__) if item.name in vars(base))
    return getattr(suite, "suite_name", suite.__name__)


def _fail(report: pytest.TestReport, why: str) -> None:
    report.outcome = "failed"
    report.longrepr = why


def _skip(report: pytest.TestReport, item: pytest.Item, why: str) -> None:
    report.outcome = "skipped"
    report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {why}")


@pytest.fixture(autouse=True)
def counted_constructions() -> None:
    constructions.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    suite = _suite(item)
    if suite is None or report.when == "teardown":
        return report

    why = None
    if report.skipped:
        message = report.longrepr[2].removeprefix("Skipped: ")
        why = expected_skips.why_skipped(item.name, message)
        if why is None:
            _fail(report, f"{item.name} is skipped, which expected_skips.py does not know of: {message}")

    # pytest makes the reports of subtests itself, and gives them no time.
    if report.when == "call" and call.start == 0:
        if report.skipped:
            item.stash.setdefault(skipped_subtests, []).append(why)
        else:
            key = passed_subtests if report.passed else failed_subtests
            item.stash[key] = item.stash.get(key, 0) + 1
        return report

    if report.when == "call" and report.passed:
        skipped = item.stash.get(skipped_subtests, [])
        made = constructions.counts().get(item.cls.constructs, 0)
        if failures := item.stash.get(failed_subtests, 0):
            _fail(report, f"{failures} of the subtests of {item.name} failed.")
        elif skipped and not item.stash.get(passed_subtests, 0):
            # pytest calls a test passed when each of its subtests was skipped.
            why = skipped[0]
            _skip(report, item, why)
        elif expected_skips.cannot_pass(item.name):
            _fail(report, f"{item.name} passes: take it off the list in expected_skips.py.")
        elif not made and (why := expected_skips.why_hollow(item.name)):
            _skip(report, item, why)
        elif not made and item.name not in expected_skips.MAKES_NOTHING:
            _fail(report, f"{item.name} passes without having made any of Mini's {item.cls.constructs}.")
    if report.when == "call" or not report.passed:
        report.user_properties.append((PROPERTY, [suite, item.cls.subject, report.outcome, why or ""]))
    return report
