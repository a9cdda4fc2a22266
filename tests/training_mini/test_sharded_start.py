"""Models that are sharded before they have numbers."""

import json
from pathlib import Path

import pytest
import torch
from helpers.programs import run_program
from helpers.random_models import make_model
from torch import nn
from training_mini.sharded_start import OneAtATime, ShardedStart, WithoutMemory


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "tensor_size", "ranks"), [(4, 1, (0, 3)), (2, 2, (0, 1, 2))], ids=str)
def test_every_part_is_that_of_the_whole_model(
    shards: int, tensor_size: int, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    """New weights and those of a checkpoint, of Minis and of other families, bit by bit."""
    for rank in ranks:
        result = run_program("tests/helpers/start_worker.py", rank, shards, tensor_size, tmp_path, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[:3] == ["MiniConfig", "MiniConfig", "LlamaConfig"]


def test_a_tensor_has_numbers_while_something_computes_with_it() -> None:
    """Also where it is read after another one was in between, or two are needed at once."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        one, two = torch.empty(3, 4), torch.empty(3, 4)
        nn.init.trunc_normal_(one)  # several operations, of which all but the first read it
        two.normal_()
        one.mul_(2.0)
        two[1].zero_()
        one.add_(two)
        return one, two

    torch.manual_seed(0)
    expected = make()
    kept: dict[int, torch.Tensor] = {}
    torch.manual_seed(0)
    mode = OneAtATime(kept.__setitem__, kept.__getitem__)
    with mode:
        made = make()
    mode.release()
    assert all(tensor.is_meta for tensor in made)
    assert [torch.equal(kept[number], tensor) for number, tensor in enumerate(expected)] == [True, True]
    with WithoutMemory() as mode:
        assert torch.empty(10**9, 10**6).is_meta and not torch.zeros(2).is_meta


def test_a_checkpoint_that_must_be_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ShardedStart.of_checkpoint("someone/some-model") is None, "a name of the Hub"
    model = make_model()
    model.save_pretrained(tmp_path / "good")
    assert ShardedStart.of_checkpoint(str(tmp_path / "good")) is not None
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert ShardedStart.of_checkpoint(str(tmp_path / "good")) is None, "loading it whole says what is damaged"
    model.config.num_hidden_layers -= 1
    model.save_pretrained(tmp_path / "other")
    assert ShardedStart.of_checkpoint(str(tmp_path / "other")) is None, "and this too, for a layer too many"
    settings = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    assert ShardedStart.of_checkpoint(str(tmp_path / "other")) is None, "code of its own is refused, and not asked for"
