"""The card that stands in the folder of a model."""

from pathlib import Path

import pytest
import torch
from helpers.random_models import make_model
from helpers.runs import train_here
from modeling_mini.loading.checkpoints import load_checkpoint
from training_mini import model_folders
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import TrainerState
from training_mini.evaluation import Evaluation
from training_mini.model_folders import at_best, model_card, save_sharded
from transformers import AutoModelForCausalLM


def test_the_card_names_the_optimizer() -> None:
    arguments = parse_arguments([])
    evaluation = Evaluation(loss=1.0, bits_per_byte=1.44)
    for name, called in (("adamw", "AdamW"), ("muon", "Muon and AdamW")):
        arguments.optimization.optimizer = name
        card = model_card(make_model(), arguments, TrainerState(corpus={}, architecture={}), evaluation, {"gzip": 2.0})
        assert f"tokens, {called}, peak learning rate" in card


def test_the_card_of_a_run_whose_batch_size_changed_says_what_was_read() -> None:
    arguments = parse_arguments(["--train_batch_size", "4", "--max_position_embeddings", "128"])
    model, evaluation = make_model(max_position_embeddings=128), Evaluation(loss=1.0, bits_per_byte=1.44)
    for sequences, words in (
        (40, "| 10 steps of 4 x 128 tokens,"),
        (100, "| 10 steps with 12,800 tokens in all, the last of 4 x 128 tokens,"),
    ):
        state = TrainerState(corpus={}, architecture={}, step=10, sequences=sequences)
        assert words in model_card(model, arguments, state, evaluation, {"gzip": 2.0})


def test_the_card_of_the_best_weights_has_the_figures_of_their_step() -> None:
    last = Evaluation(loss=2.0, bits_per_byte=3.0)
    state = TrainerState(
        corpus={}, architecture={}, step=10, sequences=80, best_loss=1.0, best_step=4, best_sequences=32
    )
    at_step, evaluation = at_best(state, last)
    assert (at_step.step, at_step.sequences) == (4, 32) and evaluation == Evaluation(loss=1.0, bits_per_byte=1.5)
    assert (state.step, state.sequences) == (10, 80), "the run goes on from its last step"


def test_the_examples_of_the_card_begin_as_the_text_of_the_run_does() -> None:
    evaluation, state = Evaluation(loss=1.0, bits_per_byte=1.44), TrainerState(corpus={}, architecture={})
    card = model_card(make_model(), parse_arguments([]), state, evaluation, {}, ['Es war "ein', "Haus"])
    assert 'generator("Es war \\"ein", max_new_tokens=40)' in card and "--prompt 'Es war \"ein' " in card
    assert '\n  prompts:\n  - Es war "ein\n  - Haus\n' in card


@pytest.mark.slow
def test_a_sharded_model_is_written_as_a_whole_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File by file: all that the folder of a whole model has, in one file with weights and in several."""
    trainer, result = train_here(tmp_path / "run", "--max_steps", 3)
    folders = [tmp_path / "run" / "final"]
    for name, size in (("one", 10**9), ("several", 60_000)):
        monkeypatch.setattr(model_folders, "LARGEST_FILE", size)
        save_sharded(trainer.run, tmp_path / name, result.evaluation)
        folders.append(tmp_path / name)
    whole, one, several = ({path.name for path in folder.rglob("*")} for folder in folders)
    assert one == whole and len(list(folders[2].glob("model-0000?-of-*.safetensors"))) > 1
    assert several - whole == {path.name for path in folders[2].glob("model[.-]*")}
    for name in whole - {"model.safetensors"}:
        assert all((folder / name).read_bytes() == (folders[0] / name).read_bytes() for folder in folders), name
    expected = AutoModelForCausalLM.from_pretrained(folders[0])
    for folder in folders[1:]:
        loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values())
        for (name, weight), (_, other) in zip(expected.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(weight, other), name
        assert load_checkpoint(str(folder))[0].generation_config.to_dict() == expected.generation_config.to_dict()
