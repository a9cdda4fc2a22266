"""The shape of the trainer: a newcomer reads its loop in one sitting, and finds all of its state in one place."""

from pathlib import Path

import pytest
from helpers.programs import ROOT
from helpers.runs import QUICK
from training_mini.arguments import parse_arguments
from training_mini.build import Run
from training_mini.trainer import Trainer


@pytest.mark.slow
def test_all_that_a_trainer_has_is_declared_where_it_is_made(tmp_path: Path) -> None:
    flags = (
        "--max_steps 4 --eval_steps 2 --sample_every 2 --internals_steps 2 --ema_decay 0.5 --find_batch_size".split()
    )
    trainer = Trainer(parse_arguments([*QUICK, *flags, "--output_dir", str(tmp_path / "run")]))
    parts = [trainer, trainer.run, trainer.window, trainer.monitor]
    before = [set(vars(part)) for part in parts]
    trainer.train()
    assert [set(vars(part)) for part in parts] == before
    assert set(vars(trainer.run)) == set(Run.__dataclass_fields__)


def test_the_trainer_is_short() -> None:
    assert len((ROOT / "training_mini" / "trainer.py").read_text().splitlines()) < 350
