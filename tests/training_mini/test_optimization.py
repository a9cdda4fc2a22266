"""Which parameters decay, and how the learning rate moves."""

import math

import pytest
from modeling_mini import MiniConfig, MiniForCausalLM
from training_mini.arguments import RunArguments
from training_mini.optimization import make_optimizer, make_scheduler


def test_only_matrices_decay() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, attention_bias=True, qk_norm=True))
    optimizer = make_optimizer(model, RunArguments(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6))
    decay = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("proj.weight") or "embed_tokens" in name
        assert (id(parameter) in decay) == is_matrix, name
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters())), "the tied matrix is there once"
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6


def test_warmup_then_cosine_to_a_floor() -> None:
    arguments = RunArguments(learning_rate=1.0, warmup_steps=10, max_steps=110, min_lr_rate=0.1)
    optimizer = make_optimizer(MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1)), arguments)
    scheduler = make_scheduler(optimizer, arguments)
    rates = []
    for _ in range(110):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:11] == pytest.approx([i / 10 for i in range(11)])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert rates[10:] == pytest.approx(expected)
