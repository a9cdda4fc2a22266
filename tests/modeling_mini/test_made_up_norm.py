"""A norm that only the configuration and the model know: it works, and whoever does not know it says so."""

from pathlib import Path

import configuration_mini
import pytest
import torch
from configuration_mini import MiniConfig
from helpers.random_models import make_model
from modeling_mini import MiniForCausalLM, decoding, modeling_mini
from modeling_mini.analysis.cost import ModelCost
from modeling_mini.export.gguf import export_gguf
from modeling_mini.export.native import native_config
from modeling_mini.export.onnx_graph import build_graph
from modeling_mini.fast_generation import forwards_of
from tokenization import ByteTokenizer
from torch import nn

IDS = torch.randint(1, 97, (1, 7), generator=torch.Generator().manual_seed(0))


def divide_by_largest(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return states / (states.abs().amax(-1, keepdim=True) + eps) * weight


class MadeUp(nn.Module):
    """Divides by the largest feature."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return divide_by_largest(states, self.weight, self.eps)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MiniForCausalLM:
    """A model with the norm. These two changes are all that it takes to add one."""
    monkeypatch.setattr(configuration_mini, "NORM_TYPES", ("layernorm", "rmsnorm", "made_up"))
    monkeypatch.setitem(modeling_mini.NORM_CLASSES, "made_up", MadeUp)
    return make_model(norm_type="made_up", qk_norm=True)


def written_by_the_model_alone(model: MiniForCausalLM, tokens: int) -> torch.Tensor:
    """Greedy, without a cache and without `generate`."""
    ids = IDS
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def write(model: MiniForCausalLM) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)


def test_it_loads_trains_and_writes_by_the_loop_of_transformers(model: MiniForCausalLM, tmp_path: Path) -> None:
    assert "norm is not a plain MadeUp" in decoding.obstacle_of_model(model, model.plain_modules)
    assert torch.equal(write(model), written_by_the_model_alone(model, 12))
    model.save_pretrained(tmp_path)
    loaded = MiniForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.norm) is MadeUp
    loaded(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in loaded.parameters())


def test_whatever_computes_a_model_in_another_way_refuses_it(
    model: MiniForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"^decoding_step does not know the norm 'MadeUp'\.$"):
        decoding.Weights.of(model)  # which recording for a GPU begins with, too
    with caplog.at_level("WARNING", "modeling_mini.fast_generation"):
        model.compile_decoding()
    assert model.compiled_step is None
    with pytest.raises(ValueError, match=r"^The format native does not know the norm 'made_up'\.$"):
        native_config(model.config)
    with pytest.raises(ValueError, match=r"^The format native does not know the norm 'made_up'\.$"):
        export_gguf(model, ByteTokenizer(), tmp_path, ["F32"])
    with pytest.raises(ValueError, match=r"^The format onnx takes a plain Mini, and '.*norm' is a MadeUp"):
        build_graph(model)
    with pytest.raises(ValueError, match=r"^The estimate of memory does not know the norm 'MadeUp'\.$"):
        ModelCost(model.config)


def test_a_third_file_teaches_the_fast_path_and_the_others_still_refuse(
    model: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoding.NORMS, MadeUp, (divide_by_largest, ("weight", "eps")))
    monkeypatch.setattr(MiniForCausalLM, "plain_modules", forwards_of(*MiniForCausalLM.plain_modules))
    assert decoding.obstacle_of_model(model, model.plain_modules) is None
    assert torch.equal(write(model), written_by_the_model_alone(model, 12))
    with pytest.raises(ValueError, match=r"^The format onnx does not know the norm 'MadeUp'\.$"):
        build_graph(model)


def test_a_name_without_a_class_is_refused_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration_mini, "NORM_TYPES", ("made_up",))
    with pytest.raises(ValueError, match=r"^The model does not know the norm 'made_up'\.$"):
        MiniForCausalLM(MiniConfig(norm_type="made_up"))


def test_the_norms_of_peers_are_known_by_name() -> None:
    from modeling_mini.analysis.cost import saved_by
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    assert saved_by(Qwen3RMSNorm(8)) == saved_by(nn.RMSNorm(8)) != saved_by(nn.LayerNorm(8))
