"""Label smoothing, the z-loss and annealed dropout, against their definitions."""

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from torch import nn
from training_mini.arguments import OptimizationArguments
from training_mini.optimization import ExponentialMovingAverage, dropout_at, regularized_loss, set_dropout


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.0, 1e-2])
def test_loss_is_that_of_torch_plus_the_squared_log_partition(smoothing: float, weight: float) -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 5))
    loss, cross_entropy = regularized_loss(logits, targets, smoothing, weight)
    flat = logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(flat, targets.flatten(), label_smoothing=smoothing, reduction="sum")
    expected = expected + weight * flat.exp().sum(-1).log().square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum")
    assert cross_entropy.item() == pytest.approx(plain.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_do_not_count(smoothing: float) -> None:
    logits, targets = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    targets[0, :3] = -100
    loss, cross_entropy = regularized_loss(logits, targets, smoothing, 1e-2)
    alone = [
        regularized_loss(logits[i : i + 1, j:], targets[i : i + 1, j:], smoothing, 1e-2) for i, j in ((0, 3), (1, 0))
    ]
    assert loss.item() == pytest.approx(sum(part.item() for part, _ in alone), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert cross_entropy.item() == pytest.approx(plain.item(), rel=1e-5)


def test_dropout_goes_from_start_to_end() -> None:
    settings = {"max_steps": 101, "dropout_start": 0.4, "dropout_end": 0.2}
    linear = OptimizationArguments(**settings)
    cosine = OptimizationArguments(**settings, dropout_annealing="cosine")
    assert [dropout_at(step, linear) for step in (0, 25, 50, 100)] == pytest.approx([0.4, 0.35, 0.3, 0.2])
    assert [dropout_at(step, cosine) for step in (0, 25, 50, 100)] == pytest.approx([0.4, 0.370711, 0.3, 0.2])
    assert dropout_at(3, OptimizationArguments()) is None


def test_dropout_is_set_everywhere_it_acts() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2)).train()
    ids = torch.randint(8, 264, (1, 8))

    def output() -> torch.Tensor:
        return model(ids).logits

    assert torch.equal(output(), output())
    set_dropout(model, 0.5)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.5}
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.5}
    assert not torch.equal(output(), output())
    set_dropout(model, 0.0)
    assert torch.equal(output(), output())


def test_weight_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(model, decay=0.9)
    expected = model.weight.item()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.averages["weight"].item() == pytest.approx(expected, rel=1e-5)
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 199
