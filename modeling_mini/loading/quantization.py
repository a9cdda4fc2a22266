"""Loading in INT8 and INT4 through bitsandbytes."""

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig


def quantization_config(kind: str, config: PreTrainedConfig, device: torch.device | None = None) -> BitsAndBytesConfig:
    """
    How to quantize a model that is not quantized yet. Shapes that bitsandbytes computes wrongly are refused when the
    model is loaded: see `integrations.check_quantized_layers`.

    Args:
        kind: "8bit" (LLM.int8) or "4bit" (nf4 with double quantization).
        device: where the model will be; by default a GPU if there is one.

    Raises:
        ValueError: if the checkpoint is quantized already, or bitsandbytes is missing or does not support the device.
    """
    if is_quantized(config):
        raise ValueError("The checkpoint is quantized already: load it without load_in_8bit and load_in_4bit.")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_bitsandbytes(device)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights of a checkpoint are quantized."""
    return getattr(config, "quantization_config", None) is not None


def check_bitsandbytes(device: torch.device) -> None:
    """
    Checks that quantized weights can be used on this device.

    Raises:
        ValueError: if bitsandbytes is missing, or does not support the device.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("Quantized weights need bitsandbytes: pip install bitsandbytes.") from None
    if device.type not in bitsandbytes.supported_torch_devices:
        there = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise ValueError(
            f"bitsandbytes has no quantized weights on the device {str(device)!r}; it has them on {there}."
        )
    if device.type == "cuda" and not bitsandbytes.cextension.lib.compiled_with_cuda:
        raise ValueError(
            "bitsandbytes finds no library of its own for this GPU (python -m bitsandbytes says why): load without "
            "quantizing, or with --device cpu."
        )
