"""How processes agree, on stand-ins for several of them; on real ones: tests/test_parallel.py."""

from pathlib import Path

import pytest
from helpers.runs import train_here
from training_mini import model_folders
from training_mini.distributed import Parallel


def parallel_of(sent: list[object], received: object = None) -> Parallel:
    """Stands for one process: what it sends goes into `sent`; it receives `received`, or what it sent if it is main."""
    parallel = object.__new__(Parallel)

    def from_main(value: object) -> object:
        sent.append(value)
        return value if received is None else received

    parallel.from_main = from_main
    return parallel


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(OSError("full"), OSError), (FileNotFoundError(2, "gone", "x"), OSError), (ValueError("nan"), ValueError)]
    + [(KeyError("lion"), RuntimeError)],
    ids=repr,
)
def test_an_error_of_the_main_process_ends_every_process(error: Exception, elsewhere: type[Exception]) -> None:
    sent: list[object] = []
    with pytest.raises(type(error)) as raised:
        parallel_of(sent).raise_everywhere(error)
    assert raised.value is error
    with pytest.raises(elsewhere) as raised:
        parallel_of([], sent[0]).raise_everywhere(None)
    assert str(raised.value) == str(error)
    parallel_of([]).raise_everywhere(None)  # and nothing happens where nothing did


def test_a_card_that_cannot_be_made_is_told_to_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the outcome, and would wait for ever."""

    def no_card(*arguments: object) -> str:
        raise KeyError("lion")

    told: list[Exception | None] = []
    raise_everywhere = Parallel.raise_everywhere

    def listen(parallel: Parallel, error: Exception | None) -> None:
        told.append(error)
        raise_everywhere(parallel, error)

    monkeypatch.setattr(model_folders, "model_card", no_card)
    monkeypatch.setattr(Parallel, "raise_everywhere", listen)
    with pytest.raises(KeyError, match="lion"):
        train_here(tmp_path / "run", "--max_steps", 3)
    assert isinstance(told[-1], KeyError)
