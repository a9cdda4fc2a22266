"""Processes that --num_processes starts: what their end means, and that none is left behind."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_mini import processes
from training_mini.from_python import train
from training_mini.settings import TrainingSettings


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(program: str, count: int = 2) -> int:
    return processes.start_processes(count, [sys.executable, "-I", "-S", "-c", f"import os, sys, time; {program}"])


RANK = "rank = int(os.environ['RANK'])"


def test_each_process_knows_the_others(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
    program = f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run(program, 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)
    ]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_NOTICE", 0.3)
    start = time.monotonic()
    assert run(f"{RANK}; rank == 1 and sys.exit('what was wrong'); time.sleep(60)") == 1
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == "what was wrong\n", "the main process hangs and says nothing"
    assert run(f"{RANK}; rank == 0 and os.kill(os.getpid(), 9); time.sleep(60)") == 128 + 9


def test_wrong_input_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('error: wrong', file=sys.stderr); sys.exit(2)", 3) == 2
    assert capfd.readouterr().err == "error: wrong\n"


def test_a_run_that_is_asked_to_stop_has_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_NOTICE", 0.1)
    assert run(f"{RANK}; rank == 0 and time.sleep(0.5); sys.exit(75)") == 75


def test_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_processes is for the command"):
        train(TrainingSettings(num_processes=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.check_count(1)
    processes.check_count(2)
    with pytest.raises(ValueError, match="--num_processes 4 starts processes, and 2 were started: leave it out"):
        processes.check_count(4)
