"""What a state to resume from is compared with; that it survives what it should is tests/test_reliability.py."""

from pathlib import Path

import pytest
from training_mini.checkpoints import TrainerState, check_state


def test_a_state_of_before_methods_were_written_down_is_not_refused(tmp_path: Path) -> None:
    state = TrainerState(corpus={}, architecture={})
    check_state(tmp_path, state, {}, {}, {"optimizer": "adamw"})
    state.methods = {"optimizer": "muon"}
    with pytest.raises(ValueError, match=r"optimizer \(was muon, now adamw\)"):
        check_state(tmp_path, state, {}, {}, {"optimizer": "adamw"})
