"""Muon beside the plain mathematics: singular values, the momentum, and one matrix at a time."""

import numpy as np
import pytest
import torch
from training_mini import muon as muon_module
from training_mini.muon import COEFFICIENTS, SAFETY, Muon, orthogonalize, orthogonalized, polynomials

SHAPES = [(48, 48), (48, 48), (64, 32), (32, 64), (64, 32), (16, 8), (1, 24)]
CUSHION = 0.02407327424182761  # the paper's


def matrices(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def best_polynomial(low: float, high: float) -> np.ndarray:
    """a, b and c of the odd polynomial of degree 5 that is nearest to 1 on [low, high], by Remez' exchange."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))  # where it is steepest from 1
    return np.array([a, b, c])


def test_coefficients_are_the_best_for_what_their_predecessors_leave() -> None:
    low, high = 1e-3, 1.0
    for known in COEFFICIENTS[:6]:
        computed = best_polynomial(max(low, CUSHION * high), high)
        ends = [np.dot(computed, [x, x**3, x**5]) for x in (low, high)]
        computed *= 2 / sum(ends)  # with the cushion, its values are not even about 1
        assert known == pytest.approx(computed, rel=1e-6)
        low = np.dot(computed, [low, low**3, low**5])
        high = 2 - low


@pytest.mark.parametrize(("iterations", "lowest", "highest"), [(3, 0.13, 1.87), (5, 0.84, 1.13), (8, 0.999, 1.001)])
def test_singular_values_come_near_1(iterations: int, lowest: float, highest: float) -> None:
    """All from a thousandth of the norm on; beside the factor U V^T of the singular value decomposition."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(2))
    values = torch.logspace(-2.5, 0, 48)
    left, right = left[:, :48], right[:, :48]
    result = orthogonalize(((left * values) @ right.T)[None], iterations)[0]
    singular = torch.linalg.svdvals(result)[:48]
    assert lowest <= singular.min() and singular.max() <= highest
    # The same singular vectors: what is left is diagonal, and is the polynomials of the singular values.
    expected = values / (values.norm() * SAFETY)
    for a, b, c in polynomials(iterations):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(left.T @ result @ right, expected.diag(), rtol=0, atol=2e-4)
    if iterations == 8:
        torch.testing.assert_close(result, left @ right.T, rtol=0, atol=1e-3)


def test_batched_is_one_by_one() -> None:
    given = matrices(*SHAPES)
    together = orthogonalized(given, 5)
    for matrix, result in zip(given, together, strict=True):
        assert result.shape == matrix.shape and result.dtype == torch.float32
        torch.testing.assert_close(result, orthogonalize(matrix[None], 5)[0], rtol=0, atol=1e-5)


def test_bfloat16_is_near_float32() -> None:
    (matrix,) = matrices((64, 96))
    rough = orthogonalize(matrix.bfloat16()[None], 5)[0]
    assert rough.dtype == torch.bfloat16
    exact = orthogonalize(matrix[None], 5)[0]
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


def test_steps_are_those_of_the_definition() -> None:
    """Momentum and Nesterov's look ahead, decay apart from the gradient, and a step of the spectral norm `lr`."""
    weights = [torch.nn.Parameter(matrix) for matrix in matrices(*SHAPES)]
    expected = [weight.detach().double() for weight in weights]
    buffers = [torch.zeros_like(weight) for weight in expected]
    muon = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.2, iterations=8)
    for step in range(3):
        gradients = matrices(*SHAPES, seed=step + 1)
        for i, gradient in enumerate(gradients):
            weights[i].grad = gradient.clone()
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient.double()
            left, _, right = torch.linalg.svd(0.1 * gradient.double() + 0.9 * buffers[i], full_matrices=False)
            rows, columns = gradient.shape
            expected[i] = (1 - 0.1 * 0.2) * expected[i] - 0.1 * max(1, rows / columns) ** 0.5 * (left @ right)
        muon.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, rtol=0, atol=2e-3)
    for weight, buffer in zip(weights, buffers, strict=True):
        torch.testing.assert_close(muon.state[weight]["momentum_buffer"].double(), buffer, rtol=0, atol=1e-6)


def test_what_has_no_gradient_or_a_zero_one_stays() -> None:
    still, unused = (torch.nn.Parameter(matrix) for matrix in matrices((8, 8), (8, 8)))
    before = [still.detach().clone(), unused.detach().clone()]
    still.grad = torch.zeros_like(still)
    muon = Muon([still, unused], lr=0.1)
    assert muon.step(lambda: torch.tensor(2.5)) == 2.5, "the loss of the closure"
    assert torch.equal(still, before[0]) and torch.equal(unused, before[1])


def test_one_product_for_all_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = []

    def record(given: torch.Tensor, iterations: int) -> torch.Tensor:
        assert given.dtype == torch.bfloat16
        stacked.append(tuple(given.shape))
        return orthogonalize(given, iterations)

    monkeypatch.setattr(muon_module, "orthogonalize", record)
    orthogonalized(matrices(*SHAPES), 5, torch.bfloat16)
    assert sorted(stacked) == [(1, 1, 24), (1, 8, 16), (2, 48, 48), (3, 32, 64)], "tall ones lie among wide ones"


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
