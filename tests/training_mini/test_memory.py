"""Steps that cannot fit into the memory of the machine are refused, and others are not."""

from pathlib import Path

import pytest
from helpers.runs import QUICK
from training_mini import memory
from training_mini.arguments import parse_arguments
from training_mini.trainer import Trainer


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--train_batch_size 999999", r"A step on 999,999 x 64 tokens at once needs at least [\d,]+ GiB of memory"),
        ("--max_position_embeddings 90000000", "A step on 8 x 90,000,000 tokens at once"),
        ("--hidden_size 640000", "A step on 8 x 64 tokens at once"),
        # Halved as often as that goes, the batch of 3 * 2^20 sequences is one of 3.
        ("--find_batch_size --train_batch_size 3145728 --max_position_embeddings 4096000", "A step on 3 x 4,096,000"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_written(flags: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        Trainer(parse_arguments([*QUICK, *flags.split(), "--output_dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_what_fits_by_gradient_accumulation_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 2_000_000)
    flags = [*QUICK, "--output_dir", str(tmp_path / "run"), "--train_batch_size", "128"]
    with pytest.raises(ValueError, match="A step on 128 x 64 tokens"):
        Trainer(parse_arguments(flags))
    Trainer(parse_arguments([*flags, "--gradient_accumulation_steps", "64"])).run.run_folder.release()


def test_conversations_fill_whole_contexts(tmp_path: Path) -> None:
    """What is packed into a sequence is padded to the length of the context."""
    flags = [*QUICK, "--dataset", "chat-sample", "--train_batch_size", "64", "--max_position_embeddings", "10000000"]
    with pytest.raises(ValueError, match="A step on 64 x 10,000,000 tokens at once needs at least"):
        Trainer(parse_arguments([*flags, "--output_dir", str(tmp_path / "run")]))
