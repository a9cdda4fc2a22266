"""Loading in INT8 and INT4 through bitsandbytes, where it gets the shapes right."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

# bitsandbytes stores 4-bit weights in blocks of 64 of a row, and its CPU kernel takes 32 rows at once. Other shapes end
# in an assertion, or are silently read back wrong (docs/LOG.md).
BLOCK_COLUMNS, BLOCK_ROWS = 64, 32


def quantization_config(kind: str, config: PreTrainedConfig) -> BitsAndBytesConfig:
    """
    How to quantize a model that is not quantized yet.

    Args:
        kind: "8bit" (LLM.int8) or "4bit" (nf4 with double quantization).

    Raises:
        ValueError: if bitsandbytes is missing, the checkpoint is quantized already, or a layer does not fit.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("Quantizing needs bitsandbytes: pip install bitsandbytes.") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("The checkpoint is quantized already: load it without load_in_8bit and load_in_4bit.")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if unfit := unfit_for_4bit(config):
        raise ValueError(
            f"INT4 needs widths that are multiples of {BLOCK_COLUMNS} in and {BLOCK_ROWS} out; these layers have "
            f"others: {', '.join(unfit)}. Load in INT8 instead."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )


def unfit_for_4bit(config: PreTrainedConfig) -> list[str]:
    """The linear layers that bitsandbytes would get wrong, as `name (out x in)`; those of a like shape once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    shapes: dict[tuple[str, int, int], str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            rows, columns = module.out_features, module.in_features
            if rows % BLOCK_ROWS or columns % BLOCK_COLUMNS:
                shapes.setdefault((name.rsplit(".")[-1], rows, columns), name)
    return [f"{name} ({rows} x {columns})" for (_, rows, columns), name in shapes.items()]
