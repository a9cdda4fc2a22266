"""The card that stands in the folder of a model."""

from helpers.random_models import make_model
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import TrainerState
from training_mini.evaluation import Evaluation
from training_mini.model_folders import model_card


def test_the_card_names_the_optimizer() -> None:
    arguments = parse_arguments([])
    evaluation = Evaluation(loss=1.0, bits_per_byte=1.44)
    for name, called in (("adamw", "AdamW"), ("muon", "Muon and AdamW")):
        arguments.optimization.optimizer = name
        card = model_card(make_model(), arguments, TrainerState(corpus={}, architecture={}), evaluation, {"gzip": 2.0})
        assert f"tokens, {called}, peak learning rate" in card
