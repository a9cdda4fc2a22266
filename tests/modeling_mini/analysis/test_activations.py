"""Statistics against a naive computation and against models made to have them; nothing is left in the model."""

import math
from pathlib import Path
from typing import IO

import pytest
import torch
from configuration_mini import MiniConfig
from matplotlib import image
from matplotlib.figure import Figure
from modeling_mini import MiniForCausalLM
from modeling_mini.analysis import (
    ActivationStatistics,
    as_metrics,
    draw_activations,
    gradient_norms,
    record_activations,
    record_update,
)
from modeling_mini.analysis.activations import ActivationRecorder
from modeling_mini.analysis.figures import figure_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
}
SITES = ["embed_tokens"]
for layer in range(2):
    SITES += [f"layers.{layer}.self_attn", f"layers.{layer}.mlp.hidden", f"layers.{layer}.mlp", f"layers.{layer}"]
SITES.append("norm")


def make_model(**fields: object) -> MiniForCausalLM:
    return MiniForCausalLM(MiniConfig(**SIZES | fields))


def batch(seed: int, rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 264, (rows, length), generator=torch.Generator().manual_seed(seed))


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def naive(values: list[torch.Tensor]) -> dict[str, float]:
    numbers = torch.cat([v.flatten() for v in values]).double()
    centred = numbers - numbers.mean()
    return {
        "mean": numbers.mean().item(),
        "rms": numbers.square().mean().sqrt().item(),
        "kurtosis": (centred**4).mean().item() / (centred**2).mean().item() ** 2,
        "largest": numbers.abs().max().item(),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_statistics_are_those_of_all_calls_together(checkpointing: bool) -> None:
    model = make_model().train()
    # Calls that differ, so that averages of averages would be wrong.
    model.model.embed_tokens.weight.data[100:] *= 20
    inputs = [batch(1, rows=1, length=8) % 100, batch(2, rows=3) % 100 + 100]
    streams = [model(input_ids=ids, output_hidden_states=True).hidden_states for ids in inputs]
    if checkpointing:
        model.activation_checkpointing_enable()
    with record_activations(model) as recorder:
        for ids in inputs:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if checkpointing:
                loss.backward()
    statistics = recorder.statistics()
    assert list(statistics) == SITES
    for site, index in (("embed_tokens", 0), ("layers.0", 1), ("norm", 2)):
        expected = naive([stream[index] for stream in streams])
        measured = {name: getattr(statistics[site], name) for name in expected}
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)
    added = [stream[1] - stream[0] for stream in streams]
    mean_added = statistics["layers.0.self_attn"].mean + statistics["layers.0.mlp"].mean
    assert mean_added == pytest.approx(torch.cat([a.flatten() for a in added]).mean().item(), abs=1e-5)


def test_moments_of_unlike_calls_are_merged_exactly() -> None:
    recorder = ActivationRecorder()
    # Skewed, of different sizes, and about different means: every term of the merge counts.
    calls = [torch.rand(5, 8).pow(4) * scale + mean for scale, mean in ((1.0, 3.0), (20.0, -4.0))]
    calls.append(torch.rand(3, 7, 8).log())
    for values in calls:
        recorder.add("site", values)
    statistics, expected = recorder.statistics()["site"], naive(calls)
    assert {name: getattr(statistics, name) for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_normal_values_have_kurtosis_three_and_a_spike_has_more() -> None:
    model = make_model(vocab_size=4096)
    nn.init.normal_(model.model.embed_tokens.weight, mean=5.0)
    with record_activations(model) as recorder:
        model(input_ids=torch.arange(4096)[None])
    assert recorder.statistics()["embed_tokens"].kurtosis == pytest.approx(3, abs=0.1)
    model.model.embed_tokens.weight.data[7, 7] = 1000
    with record_activations(model) as recorder:
        model(input_ids=torch.arange(4096)[None])
    statistics = recorder.statistics()["embed_tokens"]
    assert statistics.kurtosis > 1000
    assert statistics.largest == 1000


def test_dead_units_are_found() -> None:
    model = make_model()
    # Three of the forty units of layer 1 always give zero; one gives something for one token only, and is alive.
    model.model.layers[1].mlp.up_proj.weight.data[[3, 17, 39]] = 0
    with record_activations(model) as recorder:
        model(input_ids=batch(1))
        model(input_ids=batch(2))
    statistics = recorder.statistics()
    assert statistics["layers.1.mlp.hidden"].dead == pytest.approx(3 / 40)
    assert statistics["layers.0.mlp.hidden"].dead == 0


def test_unit_that_wakes_once_is_alive() -> None:
    model = make_model()
    model.model.embed_tokens.weight.data[:, 5] = 0
    model.model.embed_tokens.weight.data[250, 5] = 1
    with record_activations(model) as recorder:
        model(input_ids=batch(1) % 250)
        assert recorder.statistics()["embed_tokens"].dead == pytest.approx(1 / 32)
        model(input_ids=torch.tensor([[250]]))
        model(input_ids=batch(2) % 250)
    assert recorder.statistics()["embed_tokens"].dead == 0


def test_a_unit_is_dead_below_a_hundredth_of_the_rms() -> None:
    recorder = ActivationRecorder()
    values = torch.ones(4, 100)
    values[:, 0], values[:, 1] = 0.009, 0.011
    values[1:, 2] = 0.0  # alive for one token
    recorder.add("site", values)
    assert recorder.statistics()["site"].dead == pytest.approx(0.01)


def test_hooks_are_removed() -> None:
    model = make_model()
    before = count_hooks(model)
    with record_activations(model) as recorder:
        assert count_hooks(model) == before + len(SITES)
        model(input_ids=batch(1))
    assert count_hooks(model) == before
    statistics = recorder.statistics()
    model(input_ids=batch(2))
    assert recorder.statistics() == statistics
    with pytest.raises(RuntimeError), record_activations(model):
        raise RuntimeError
    assert count_hooks(model) == before


def test_recording_changes_no_result() -> None:
    model, ids = make_model(), batch(1)
    plain = model(input_ids=ids, labels=ids)
    plain.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with record_activations(model):
        recorded = model(input_ids=ids, labels=ids)
    recorded.loss.backward()
    assert torch.equal(plain.logits, recorded.logits)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


class Wrapper(nn.Module):
    """As adapters and parallelism wrap a model: its modules get longer names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **kwargs: torch.Tensor) -> object:
        return self.module(**kwargs)


def test_every_llama_shaped_model_and_wrapper_has_the_same_sites() -> None:
    for model in (LlamaForCausalLM(LlamaConfig(**SIZES)), Wrapper(make_model())):
        with record_activations(model) as recorder:
            model(input_ids=batch(1))
        assert list(recorder.statistics()) == SITES


def test_models_without_layers_and_recorders_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no layers named as Llama's"), record_activations(nn.Linear(2, 2)):
        pass
    with record_activations(make_model()) as recorder, pytest.raises(ValueError, match="No activations were recorded"):
        recorder.statistics()


def test_gradient_norms_make_up_the_whole() -> None:
    model, ids = make_model(tie_word_embeddings=False), batch(1)
    with pytest.raises(ValueError, match="No parameter has a gradient"):
        gradient_norms(model)
    model(input_ids=ids, labels=ids).loss.backward()
    norms = gradient_norms(model)
    parts = [f"layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp")]
    assert set(norms) == {"embed_tokens", "lm_head", "norms", *parts}
    assert math.hypot(*norms.values()) == pytest.approx(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    head = model.lm_head.weight.grad.norm().item()
    assert norms["lm_head"] == pytest.approx(head)


def test_update_of_gradient_descent_is_the_gradient_times_the_rate() -> None:
    model, ids = make_model(), batch(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    embedding = model.model.embed_tokens.weight.detach().clone()
    with record_update(model) as update:
        optimizer.step()
    assert set(update.statistics) == set(gradient_norms(model))
    for statistics in update.statistics.values():
        assert statistics.update_norm == pytest.approx(0.1 * statistics.gradient_norm, rel=1e-3)
        assert statistics.ratio == pytest.approx(statistics.update_norm / statistics.weight_norm)
    assert update.statistics["embed_tokens"].weight_norm == pytest.approx(embedding.norm().item())


def test_frozen_weights_are_no_part_of_an_update() -> None:
    model, ids = Wrapper(make_model().requires_grad_(False)), batch(1)
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    with record_update(model) as update:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert set(update.statistics) == {"layers.0.self_attn", "layers.1.self_attn"}
    weight_norm = model.module.model.layers[0].self_attn.q_proj.weight.norm().item()
    assert update.statistics["layers.0.self_attn"].weight_norm == pytest.approx(weight_norm, rel=0.01)


def test_metrics_are_flat() -> None:
    statistics = {"layers.0": ActivationStatistics(mean=0.0, rms=1.0, kurtosis=3.0, largest=4.0, dead=0.5)}
    assert as_metrics("activations", statistics) == {
        "activations/layers.0/mean": 0.0,
        "activations/layers.0/rms": 1.0,
        "activations/layers.0/kurtosis": 3.0,
        "activations/layers.0/largest": 4.0,
        "activations/layers.0/dead": 0.5,
    }
    assert as_metrics("gradients", {"norms": 2.0}) == {"gradients/norms": 2.0}


@pytest.mark.slow
def test_picture_is_drawn(tmp_path: Path) -> None:
    model, ids = make_model(), batch(1)
    with record_activations(model) as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
    path = tmp_path / "activations.png"
    draw_activations(recorder.statistics(), gradient_norms(model), path, "A $title_$")
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[:2] == (744, 1320)
    for color in ("3182bd", "e6550d", "fdae6b"):  # a line for each kind of site
        rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert ((torch.from_numpy(pixels) - rgb).abs().amax(dim=-1) < 0.01).sum() > 200
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_picture_of_blocks_with_other_parts(tmp_path: Path) -> None:
    shape = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model, ids = PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2, pad_token_id=0)), batch(1)
    with record_activations(model) as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
    assert "layers.0.mlp" in recorder.statistics() and "layers.0.mlp.hidden" not in recorder.statistics()
    draw_activations(recorder.statistics(), gradient_norms(model), tmp_path / "activations.png")


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def half(self: Figure, file: IO[bytes], **settings: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"), figure_file(path):
        pass
    assert path.read_bytes() == b"before"
