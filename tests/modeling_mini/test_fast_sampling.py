"""Sampling for one sequence: the tokens and the random numbers of transformers' warpers and `torch.multinomial`."""

import random
from unittest import mock

import pytest
import torch
from modeling_mini.fast_sampling import FastSampler
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def some_warpers(draw: random.Random) -> list[LogitsProcessor]:
    temperature, top_k = draw.choice([0.1, 0.7, 0.8, 1.3, 2.0]), draw.choice([1, 2, 20, 50, 300])
    top_p = draw.choice([0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0])
    warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    return [warper for warper in warpers if draw.random() < 0.7]


def some_scores(draw: random.Random, size: int) -> torch.Tensor:
    """(1, size), near to each other or far apart, with equal ones, or with many that are not allowed."""
    scores = torch.randn(1, size) * draw.choice([0.01, 1, 4, 10])
    if draw.random() < 0.2:
        scores = (scores * 4).round() / 4
    if draw.random() < 0.2:
        scores[0, torch.randperm(size)[: size // 2]] = -float("inf")
    return scores


def by_torch(warpers: list[LogitsProcessor], scores: torch.Tensor) -> torch.Tensor:
    for warper in warpers:
        scores = warper(None, scores)
    return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)


@pytest.mark.slow
def test_tokens_and_random_numbers_are_those_of_torch() -> None:
    """1,000 cases; few of them are left to torch."""
    left_to_torch = 0
    for number in range(1000):
        draw = random.Random(number)
        torch.manual_seed(number)
        warpers = some_warpers(draw)
        scores = some_scores(draw, draw.choice([8, 50, 264, 2048]))
        rest, sampler = FastSampler.taken_from(warpers)
        assert rest == []
        results = []
        for way in (sampler, lambda scores, warpers=warpers: by_torch(warpers, scores)):
            torch.manual_seed(number)
            with mock.patch.object(sampler, "warped", wraps=sampler.warped) as warped:
                results.append((way(scores.clone()), torch.rand(1)))
            left_to_torch += warped.call_count
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1]), number
    assert 0 < left_to_torch < 250


def test_what_it_takes_the_place_of() -> None:
    penalty, temperature = RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.8)
    top_k, top_p, min_p = TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)
    rest, sampler = FastSampler.taken_from([penalty, temperature, top_k, top_p])
    assert rest == [penalty] and sampler.warpers == [temperature, top_k, top_p]
    rest, sampler = FastSampler.taken_from([top_k, min_p])  # another warper follows: nothing but the draw is left
    assert rest == [top_k, min_p] and sampler.warpers == []
    rest, sampler = FastSampler.taken_from([top_p, top_k])  # in the order of somebody else
    assert rest == [top_p] and sampler.warpers == [top_k]
    for other in (TopKLogitsWarper(2, min_tokens_to_keep=2), TopPLogitsWarper(0.5, filter_value=-1e9)):
        assert FastSampler.taken_from([temperature, other]) == ([temperature, other], None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error_as_in_torch(value: float) -> None:
    scores = torch.zeros(1, 9)
    scores[0, 3] = value
    _, sampler = FastSampler.taken_from([TopKLogitsWarper(4)])
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        sampler(scores)
