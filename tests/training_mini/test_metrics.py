"""The peak that MFU is measured against."""

import pytest
import torch
from training_mini.metrics import peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),  # which is no L4
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_gpus(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), torch.bfloat16, None)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12, rel=0.01))
    assert peak_flops(torch.device("cuda"), torch.float32, None) is None


def test_a_given_peak_wins() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32, 2.5) == 2.5e12
    assert peak_flops(torch.device("cpu"), torch.bfloat16, None) is None
