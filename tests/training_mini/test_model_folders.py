"""The card that stands in the folder of a model."""

from helpers.random_models import make_model
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import TrainerState
from training_mini.evaluation import Evaluation
from training_mini.model_folders import at_best, model_card


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
