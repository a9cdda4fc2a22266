"""oneDNN's products give what torch's own give, in both directions."""

import copy

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from torch import nn
from training_mini import cpu_kernels
from training_mini.cpu_kernels import onednn_is_faster, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (1, 1)])
def test_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    other = nn.Sequential(copy.deepcopy(layer))
    use_onednn(other)
    inputs = torch.randn(*shape, 24)
    results = []
    for module in (layer, other):
        leaf = inputs.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append([output, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    assert type(results[1][0].grad_fn).__name__ == "OneDnnLinearBackward"
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_model_and_what_is_saved_of_it_stay_the_same() -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2, attention_bias=True))
    other = copy.deepcopy(model)
    use_onednn(other)
    ids = torch.randint(8, 264, (2, 32))
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, expected), actual in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, faster in (("AuthenticAMD", True), ("GenuineIntel", False)):
        monkeypatch.setattr(cpu_kernels.Path, "read_text", lambda path, vendor=vendor: f"vendor_id : {vendor}\n")
        monkeypatch.setattr(cpu_kernels.Path, "is_file", lambda path: True)
        monkeypatch.setattr(cpu_kernels.platform, "system", lambda: "Linux")
        assert onednn_is_faster() is faster
