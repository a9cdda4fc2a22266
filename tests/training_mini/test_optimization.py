"""Which parameters decay, and how the learning rate moves."""

import math

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from training_mini.arguments import OptimizationArguments
from training_mini.optimization import make_optimizers, make_schedulers
from transformers import get_scheduler


def test_only_matrices_decay() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, attention_bias=True, qk_norm=True))
    arguments = OptimizationArguments(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    (optimizer,) = make_optimizers(model, arguments)
    decay = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("proj.weight") or "embed_tokens" in name
        assert (id(parameter) in decay) == is_matrix, name
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters())), "the tied matrix is there once"
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6


def test_muon_takes_all_of_an_adapter_of_matrices() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1)).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    (optimizer,) = make_optimizers(model, OptimizationArguments(optimizer="muon"))
    assert type(optimizer) is torch.optim.Muon


def rates_of(start: int = 0, **settings: object) -> list[float]:
    """The learning rate of each step from `start` on."""
    arguments = OptimizationArguments(learning_rate=1.0, warmup_steps=10, max_steps=110, **settings)
    optimizers = make_optimizers(MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1)), arguments)
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


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2))
    muon, adamw = make_optimizers(model, OptimizationArguments(optimizer="muon", muon_momentum=0.9))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert muon.defaults["momentum"] == 0.9
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    left = {id(p) for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in taken) == name.endswith("proj.weight"), name
        assert (id(parameter) in left) != (id(parameter) in taken), name
