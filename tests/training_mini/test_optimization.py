"""Which parameters decay and how fast each moves, how the learning rate moves, and what adding an optimizer takes."""

import math
from pathlib import Path

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from training_mini.arguments import OptimizationArguments, parse_arguments
from training_mini.checkpoints import TrainerState
from training_mini.evaluation import Evaluation
from training_mini.model_folders import model_card
from training_mini.muon import Muon
from training_mini.optimization import make_optimizers, make_schedulers
from training_mini.optimizers import LEARNING_RATES, OPTIMIZERS, Optimizer, ParameterGroups
from transformers import MixtralConfig, MixtralForCausalLM, get_scheduler

ARGUMENTS = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}


def small_model(**shape: object) -> MiniForCausalLM:
    return MiniForCausalLM(MiniConfig.preset("tiny", **{"num_hidden_layers": 1, **shape}))


def kind_of(name: str, is_tied: bool) -> str:
    if name.endswith("proj.weight"):
        return "matrices"
    if "embed_tokens" in name:
        return "embedding"
    return "head" if name == "lm_head.weight" and not is_tied else "vectors"


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_kind_of_parameter_has_its_rate_and_only_matrices_decay(name: str, is_tied: bool) -> None:
    model = small_model(attention_bias=True, qk_norm=True, tie_word_embeddings=is_tied)
    rates = {"matrices": 0.4, "embedding": 0.3, "head": 0.2, "vectors": 0.1}
    given = {setting: rates[kind] for kind, setting in LEARNING_RATES.items()}
    optimizers = make_optimizers(model, OptimizationArguments(optimizer=name, **given, **ARGUMENTS))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    of_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        kind, group = kind_of(parameter_name, is_tied), of_parameter[id(parameter)]
        assert group["lr"] == group["initial_lr"] == rates[kind], parameter_name
        assert group["weight_decay"] == (0.0 if kind == "vectors" else 0.3), parameter_name
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == len(list(model.parameters())), "each is there once"
    assert optimizers[-1].defaults["betas"] == (0.8, 0.9) and optimizers[-1].defaults["eps"] == 1e-6


def test_a_model_with_other_weights_than_matrices_is_not_for_muon() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=264, num_hidden_layers=1, num_local_experts=2, **sizes))
    sentence = r"^--optimizer muon takes matrices, and the model has weights of shape \(2, .* give --optimizer adamw\.$"
    with pytest.raises(ValueError, match=sentence):
        make_optimizers(model, OptimizationArguments(optimizer="muon"))
    assert make_optimizers(model, OptimizationArguments(optimizer="adamw"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_given_is_derived_from_the_optimizer(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    arguments = OptimizationArguments(optimizer=name)
    for setting, value in optimizer.defaults.items():
        assert getattr(arguments, setting) == value, setting
    scaled = OptimizationArguments(optimizer=name, learning_rate=0.5, head_learning_rate=0.07)
    assert scaled.learning_rate_of("matrices") == 0.5 and scaled.learning_rate_of("head") == 0.07
    for kind in ("embedding", "vectors"):
        assert scaled.learning_rate_of(kind) == 0.5 * optimizer.rates.get(kind, 1.0)


def test_groups_that_differ_in_nothing_are_one() -> None:
    """As in the states of runs from before kinds had rates of their own."""
    (optimizer,) = make_optimizers(small_model(), OptimizationArguments(optimizer="adamw"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_new_optimizer_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag takes it, its defaults hold, it is made, and the card names it."""

    def make(groups: ParameterGroups, settings: OptimizationArguments) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(list(groups.values()), momentum=settings.adam_beta1)]

    defaults = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 2.0}
    monkeypatch.setitem(OPTIMIZERS, "sgd", Optimizer("SGD with momentum", make, defaults, {"embedding": 2.0}))
    arguments = parse_arguments(["--optimizer", "sgd"])
    model = small_model()
    (sgd,) = make_optimizers(model, arguments.optimization)
    assert type(sgd) is torch.optim.SGD
    assert [group["lr"] for group in sgd.param_groups] == [0.3, 0.6, 0.3]
    assert arguments.optimization.max_grad_norm == 2.0 and arguments.optimization.lr_scheduler_type == "constant"
    state, evaluation = TrainerState(corpus={}, architecture={}), Evaluation(loss=1.0, bits_per_byte=1.44)
    assert "tokens, SGD with momentum, peak learning rate 0.3" in model_card(model, arguments, state, evaluation, {})


def test_adapters_and_trained_models_are_tuned_by_adamw(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    assert parse_arguments([]).optimization.optimizer == "muon"
    assert parse_arguments(["--model", str(tmp_path)]).optimization.optimizer == "adamw"
    assert parse_arguments(["--model", str(tmp_path), "--optimizer", "muon"]).optimization.optimizer == "muon"


def test_muon_takes_all_of_an_adapter_of_matrices() -> None:
    model = small_model().requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    settings = {"muon_momentum": 0.9, "muon_iterations": 4, "muon_dtype": "bfloat16"}
    (optimizer,) = make_optimizers(model, OptimizationArguments(optimizer="muon", **settings))
    assert type(optimizer) is Muon and optimizer.dtype == torch.bfloat16
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["iterations"] == 4


def rates_of(start: int = 0, **settings: object) -> list[float]:
    """The learning rate of each step from `start` on."""
    arguments = OptimizationArguments(
        learning_rate=1.0, embedding_learning_rate=1.0, vector_learning_rate=1.0, warmup_steps=10, max_steps=110,
        **settings,
    )  # fmt: skip
    optimizers = make_optimizers(small_model(), arguments)
    schedulers = make_schedulers(optimizers, arguments, start)
    rates = []
    for _ in range(start, 110):
        assert len({scheduler.get_last_lr()[0] for scheduler in schedulers}) == 1
        rates.append(optimizers[-1].param_groups[0]["lr"])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    return rates


SCHEDULES = {
    "cosine": [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)],
    "wsd": [1.0] * 78 + [1 - 0.9 * i / 22 for i in range(22)],
    "linear": [1 - i / 100 for i in range(100)],
    "constant": [1.0] * 100,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_schedules_warm_up_and_go_their_way(name: str, optimizer: str) -> None:
    settings = {"lr_scheduler_type": name, "optimizer": optimizer, "min_lr_rate": 0.1}
    rates = rates_of(**settings)
    start = 0.1 if name == "wsd" else 0.0  # transformers' wsd rises from the floor
    assert rates[:11] == pytest.approx([start + (1 - start) * i / 10 for i in range(11)])
    assert rates[10:] == pytest.approx(SCHEDULES[name])
    assert rates_of(start=90, **settings) == rates[90:], "a resumed run goes on with the same rates"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 13])
def test_schedules_are_those_of_transformers(name: str, warmup: int) -> None:
    total, rate = 60, 3e-3
    arguments = OptimizationArguments(
        learning_rate=rate, lr_scheduler_type=name, warmup_steps=warmup, max_steps=total, min_lr_rate=0.07
    )
    settings = {
        "cosine": {"min_lr_rate": 0.07},
        "wsd": {"num_decay_steps": arguments.decay_steps, "min_lr_ratio": 0.07, "decay_type": "linear"},
    }
    of_transformers = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate) for _ in range(2))
    (scheduler,) = make_schedulers([ours], arguments, 0)
    expected = get_scheduler(of_transformers.get(name, name), theirs, warmup, total, settings.get(name))
    for step in range(total + 5):  # and beyond the end, where a run may be told to go on
        assert scheduler.get_last_lr() == expected.get_last_lr(), step
        for each in (ours, scheduler, theirs, expected):
            each.step()
