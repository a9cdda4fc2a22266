"""The tables of docs/CONFORMANCE.md, made from the outcomes of a run."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"

# The name of the mixin, what the test ran on, "passed", "failed" or "skipped", and why a skip is expected.
Outcome = Sequence[str]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(outcomes: Sequence[Outcome]) -> str:
    """Passed, failed and skipped for each suite and shape or tokenizer."""
    counter = Counter((suite, subject, outcome) for suite, subject, outcome, _ in outcomes)
    pairs = sorted({(suite, subject) for suite, subject, _ in counter})
    rows = [
        (f"{suite}, {subject}", *(counter[suite, subject, outcome] for outcome in ("passed", "failed", "skipped")))
        for suite, subject in pairs
    ]
    totals = [sum(row[column] for row in rows) for column in (1, 2, 3)]
    return _markdown(["suite, on", "passed", "failed", "skipped"], [*rows, ("all", *totals)])


def skip_table(outcomes: Sequence[Outcome]) -> str:
    """How many tests each reason keeps from running."""
    counter = Counter(why for *_, outcome, why in outcomes if outcome == "skipped")
    return _markdown(["reason", "skipped"], sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def write(path: Path, *tables: str) -> None:
    """
    Puts the tables between the two marks in a page.

    Raises:
        ValueError: if the page has no such marks.
    """
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to write the counts between.")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    content = f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}"
    beside = path.with_suffix(".new")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)
