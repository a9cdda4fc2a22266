"""
Writes a LoRA adapter as a GGUF file of its own, which llama.cpp adds to the model by `--lora`.

These facts are from llama.cpp's sources (src/llama-adapter.cpp, in the version of llama-cpp-python 0.3.36): a matrix
W (out, in) of the model gets `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r), and the layer computes W x + s b (a x).
The scale s is `adapter.lora.alpha / r`. No other change of a layer has a place in the file.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from transformers import PreTrainedModel

from ..loading.adapters import adapts_tied_embedding


@dataclass
class Adapter:
    """
    The matrices of a LoRA adapter.

    Attributes:
        alpha: by which the file is scaled: `alpha / r` is the scale of every matrix, after `factors`.
        factors: for each layer A (r, in) and B (out, r), by the name of the layer in the model. Where the scale of a
            layer is not `alpha / r` (rsLoRA, or an alpha of its own), B is multiplied by what is missing.
        in_full: the modules that were trained in full, beside the adapter.
        facts: the rank and the scale, in words.
    """

    alpha: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    in_full: list[str]
    facts: str


def detach_adapter(adapted: PeftModel) -> tuple[PreTrainedModel, Adapter]:
    """
    The base without its adapter, but with the modules that were trained in full beside it, and the adapter.

    Raises:
        ValueError: if the adapter changes the model in a way that llama.cpp's files have no place for.
    """
    config = adapted.peft_config[adapted.active_adapter]
    if not isinstance(config, LoraConfig):
        raise unwritable(f"it is of the type {config.peft_type.value}, and llama.cpp has LoRA")
    if config.use_dora:
        raise unwritable("it was trained with use_dora, which llama.cpp does not compute")
    if config.bias != "none" or config.lora_bias:
        raise unwritable("it trains biases, and the file has no place for them")
    if config.trainable_token_indices:
        raise unwritable("it trains single tokens of the embedding, and the file has no place for them")
    if adapts_tied_embedding(adapted.get_base_model()):
        raise unwritable("it changes the embedding or the head alone, and both are one matrix")
    alpha, factors = float(config.lora_alpha) or 1.0, {}  # llama.cpp reads 0 as "no scale"
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, Linear) or module.lora_variant:
            kind = next(iter(module.lora_variant.values()), module)
            raise unwritable(
                f"{name} has an adapter of the kind {type(kind).__name__}, and llama.cpp adds only to the products of "
                f"a linear layer"
            )
        (active,) = module.active_adapters
        a, b = module.lora_A[active].weight.detach(), module.lora_B[active].weight.detach()
        missing = module.scaling[active] / (alpha / len(a))
        factors[name] = (a, b if missing == 1 else b * missing)
    scale = f"rsLoRA, alpha {config.lora_alpha}" if config.use_rslora else f"alpha {config.lora_alpha}"
    in_full = sorted(config.modules_to_save or [])
    return adapted.unload(), Adapter(alpha, factors, in_full, f"LoRA of rank {config.r}, {scale}")


def unwritable(reason: str) -> ValueError:
    return ValueError(f"llama.cpp cannot have this adapter beside its base: {reason}. Leave out --lora to merge it.")


def write_adapter(path: Path, architecture: str, name: str, alpha: float, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `tensors`, by their names in the file, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor_name, tensor in tensors.items():
        writer.add_tensor(tensor_name, tensor.to(torch.float32).cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
