"""benchmarks/starting.py: each start has its seconds, those of a program that goes on end when it has started."""

import json
from pathlib import Path

import pytest
from helpers.programs import ROOT, one_sentence_of, run_program

PROGRAM = "benchmarks/starting.py"


@pytest.mark.slow
def test_every_start_has_its_seconds(tmp_path: Path) -> None:
    result = run_program(PROGRAM, *"--only help --rounds 1 --output out.json".split(), cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    assert {row["kind"] for row in figures["starts"]} == {"help"} and len(figures["starts"]) > 5
    for row in figures["starts"]:
        assert row["processor_seconds"] > 0 and row["seconds"] > 0 and row["name"] in result.stdout


@pytest.mark.slow
def test_a_program_counts_until_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import starting

    work = "while time.process_time() < 0.5: pass"
    program = f"import time\n{work}\nprint('started')\ntime.sleep(600)"
    processor, clock = starting.start(["-c", program], lambda text: "started" in text)
    assert 0.4 < processor < 600 and 0.4 < clock < 600
    processor, clock = starting.start(["-c", f"import time\n{work}\nprint('started')"], lambda text: False)
    assert processor > 0.4 and clock > 0.4


def test_wrong_input(tmp_path: Path) -> None:
    result = run_program(PROGRAM, "--only", "ending", cwd=tmp_path)
    assert "ending" in one_sentence_of(result.returncode, result.stderr)
