"""How much of the machine a run uses: MFU and memory."""

import re

import psutil
import torch

# Dense bfloat16 TFLOP/s of the data sheets, without sparsity. The first whose words a device's name contains counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """The FLOP/s that MFU is a share of: what the user says, or the data sheet for bfloat16, or `None`."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    # By whole words: an L40 is no L4.
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """The largest memory that tensors took on a GPU so far; elsewhere what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
