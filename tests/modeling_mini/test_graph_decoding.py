"""Decoding by CUDA graphs: all of it but the recording itself on a CPU, and the whole where there is a GPU."""

import copy
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_models import make_model, random_request, random_settings
from modeling_mini import MiniForCausalLM, graph_decoding
from modeling_mini.graph_decoding import GraphStep, Recording


class Unrecorded(Recording):
    """Runs the step where a graph would be replayed, on the same buffers; its output too has one place."""

    steps = 0

    def record(self) -> None:
        self.output = self.step()
        self.graph = SimpleNamespace(replay=self.run)

    def run(self) -> None:
        Unrecorded.steps += 1
        self.output.copy_(self.step())

    def mark_end(self) -> None:
        """There are no streams."""

    wait = mark_end


class UnrecordedStep(GraphStep):
    recording_class = Unrecorded


def steps_of(model: MiniForCausalLM, request: dict[str, Any]) -> tuple[Any, int]:
    """What is written, and by how many steps on recordings."""
    torch.manual_seed(7)
    before = Unrecorded.steps
    written = model.generate(**request)
    return written, Unrecorded.steps - before


@pytest.mark.slow
@pytest.mark.parametrize("group", range(8))
def test_random_models_and_requests_give_the_same(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 models of random shapes, batches with and without padding, and caches that have to grow."""
    for number in range(10):
        draw = random.Random(f"graph {group} {number}")
        monkeypatch.setattr(graph_decoding, "FIRST_CAPACITY", draw.choice([2, 1024]))
        torch.manual_seed(draw.randrange(2**32))
        settings = random_settings(draw)
        model = make_model(**settings)
        recorded = copy.deepcopy(model)  # dynamic RoPE keeps the frequencies of the last text
        recorded.compiled_step = UnrecordedStep(recorded)
        request = random_request(draw, settings["vocab_size"])
        request |= {"return_dict_in_generate": True, "output_logits": True}
        expected, _ = steps_of(model, {**request, "fast_decoding": False})
        written, steps = steps_of(recorded, request)
        assert steps == len(written.logits) - 1  # the first token comes from the prompt
        assert torch.equal(written.sequences, expected.sequences), f"{settings}\n{request}"
        for a, b in zip(written.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        for a, b in zip(written.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=2e-5, atol=2e-5)


def test_recordings_are_used_again_until_a_weight_moves() -> None:
    model = make_model()
    model.compiled_step = step = UnrecordedStep(model)
    request = {"inputs": torch.randint(1, 97, (2, 5)), "max_new_tokens": 12, "do_sample": False}

    def both() -> Recording:
        written, steps = steps_of(model, request)
        assert steps == 11 and torch.equal(written, model.generate(**request, fast_decoding=False))
        (recording,) = [each for each in step.free if (each.batch, each.capacity) == (2, 16)]
        return recording

    first = both()
    cache = model.generate(**request, return_dict_in_generate=True).past_key_values.layers[0].keys.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert both() is first, "what is changed in place is seen"
    again = model.generate(**request, return_dict_in_generate=True).past_key_values.layers[0].keys
    assert not torch.equal(cache, again), "a cache that was given back is its owner's"
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(80, 48)
    assert both() is not first
    assert copy.deepcopy(model).compiled_step is None and pickle.loads(pickle.dumps(model)).compiled_step is None


def test_recordings_are_few_and_none_is_of_a_model_as_it_was() -> None:
    model = make_model()
    model.compiled_step = step = UnrecordedStep(model)
    for batch in range(1, 9):
        request = {"inputs": torch.randint(1, 97, (batch, 5)), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(steps_of(model, request)[0], model.generate(**request, fast_decoding=False))
    assert [each.batch for each in step.free] == [5, 6, 7, 8]
    mine = step.take(model, 8, 8)
    assert all(each is not mine for each in step.free), "two calls at once never share one"
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    other = step.take(model, 8, 8)
    step.give_back(mine)
    assert other is not mine and not step.free


def test_recordings_can_be_written_in_and_outside_of_inference_mode() -> None:
    """As a first call in inference mode, and the next without; also what PyTorch makes at the first recording."""
    model = make_model()
    ids = torch.randint(1, 97, (1, 5))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, fast_decoding=False)
    with torch.inference_mode():
        model.compiled_step = step = UnrecordedStep(model)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    for recording in step.free:
        buffers = (recording.token_ids, recording.cache_position, recording.mask, recording.output, *recording.caches)
        assert not any(buffer.is_inference() for buffer in buffers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_on_a_gpu(dtype: torch.dtype, batch: int) -> None:
    model = make_model(hidden_size=64, head_dim=16).to("cuda", dtype)
    request = {"inputs": torch.randint(1, 97, (batch, 5), device="cuda"), "max_new_tokens": 80, "do_sample": False}
    request |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**request, fast_decoding=False)
    with torch.inference_mode():  # the recordings are of use outside of it too
        model.compile_decoding()
    assert type(model.compiled_step) is GraphStep
    for _ in range(2):
        written = model.generate(**request)
        first = slice(0, None) if dtype == torch.float32 else slice(0, 2)  # a tie in bfloat16 decides the rest
        for a, b in list(zip(written.logits, expected.logits, strict=True))[first]:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
