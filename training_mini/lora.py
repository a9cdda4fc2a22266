"""
LoRA through peft: a few new weights are trained beside those of a model. The weights of the model stay as they are, in
full precision or quantized to 8 or 4 bits.

peft is imported within functions: it takes a second, and most runs do not need it.
"""

import math
import warnings
from pathlib import Path

import torch
from modeling_mini.analysis.cost import ModelCost
from modeling_mini.integrations import check_dora, features_of
from modeling_mini.loading.adapters import with_adapter
from modeling_mini.loading.checkpoints import load_checkpoint
from shape_mini import nearest_name
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2, with its weight transposed

from .arguments import AdapterArguments, Arguments

MIB = 2**20
USEFUL_SHARE = 0.9  # an adapter that needs more than this share of the memory for training in full saves little


def add_lora(model: PreTrainedModel, arguments: AdapterArguments) -> PreTrainedModel:
    """
    Wraps `model` in a peft model in which only the adapter is trained.

    Raises:
        ValueError: for layers that do not exist or that the adapter does not suit.
    """
    from peft import LoraConfig, get_peft_model

    check_layers(model, arguments)
    check_dora(model, arguments)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=lora_alpha(arguments),
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
        modules_to_save=arguments.lora_modules_to_save or None,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        # An embedding that is trained in full stays tied to the head; peft would copy it.
        ensure_weight_tying=bool(tied_among(model, arguments.lora_modules_to_save)),
    )
    leave_unpacked(model)
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # peft reads a deprecated name
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # for GPT-2, and peft corrects it
        return get_peft_model(model, config)


def lora_alpha(arguments: AdapterArguments) -> float:
    """What was given, or twice the rank."""
    return arguments.lora_alpha if arguments.lora_alpha is not None else 2 * arguments.lora_r


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` made it."""
    return hasattr(model, "peft_config")


def check_layers(model: PreTrainedModel, arguments: AdapterArguments) -> None:
    """Raises `ValueError` if a name matches nothing, the rank is too large, or a tied weight would be adapted twice."""
    kinds = nn.Linear | Conv1D | nn.Embedding
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    head = model.get_output_embeddings()
    chosen: dict[str, nn.Module] = {}
    for target in arguments.lora_target_modules:
        matching = {name: layer for name, layer in layers.items() if is_named(name, target)}
        if not matching:
            raise ValueError(f"lora_target_modules {target!r} matches no layer of the model{known(target, layers)}")
        chosen |= matching
    if tied := tied_among(model, arguments.lora_target_modules):
        raise ValueError(
            f"lora_target_modules: {tied} is embedding and head in one, and an adapter on it would count twice once it "
            f"is merged; train it in full by --lora_modules_to_save {tied}."
        )
    modules = dict(model.named_modules())
    for target in arguments.lora_modules_to_save:
        if not any(is_named(name, target) for name in modules):
            raise ValueError(f"lora_modules_to_save {target!r} matches nothing in the model{known(target, modules)}")
    if not chosen:
        chosen = {
            name: layer for name, layer in layers.items() if not isinstance(layer, nn.Embedding) and layer is not head
        }
    sizes = {name: sizes_of(layer) for name, layer in chosen.items()}
    name, (rows, columns) = min(sizes.items(), key=lambda item: min(item[1]))
    if arguments.lora_r > min(rows, columns):
        raise ValueError(
            f"lora_r {arguments.lora_r} is larger than {name} ({rows} x {columns}): an adapter of a rank above "
            f"{min(rows, columns)} has more weights than it can use."
        )


def is_named(name: str, target: str) -> bool:
    """Whether a module has this name, or one that ends in it: how peft matches."""
    return name == target or name.endswith(f".{target}")


def known(target: str, modules: dict[str, nn.Module]) -> str:
    """The end of a sentence: the nearest name, or all of them."""
    names = sorted({name.rsplit(".")[-1] for name in modules if name and not name.rsplit(".")[-1].isdigit()})
    return f"; there are {', '.join(names)}{nearest_name(target, names) or '.'}"


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight that an adapter is added to: outputs and inputs."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return features_of(layer)


def tied_among(model: PreTrainedModel, targets: list[str]) -> str | None:
    """The name of the embedding, if it and the head are one matrix and `targets` names one of the two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {name for name, module in model.named_modules() if module is embedding or module is head}
    is_meant = any(is_named(name, target) for name in names for target in targets)
    return next(n for n, m in model.named_modules() if m is embedding).rsplit(".")[-1] if is_meant else None


def leave_unpacked(model: PreTrainedModel) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights at the first forward pass in evaluation mode. No
    gradient passes through packed weights, and nothing says so: after its first evaluation a run would learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def blank_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same shape, with the same adapter or none. Its weights are still to be loaded."""
    copy = AutoModelForCausalLM.from_config(model.config)
    if has_lora(model):
        from peft import get_peft_model

        copy = get_peft_model(copy, model.peft_config["default"])
    copy.generation_config = model.generation_config
    return copy


def merged_model(arguments: Arguments, adapter: Path) -> PreTrainedModel:
    """The model that the run started from, with the adapter in a folder added to its weights, in float32 on the CPU."""
    quantization = arguments.adapter.quantization
    base, _ = load_checkpoint(arguments.model.model, dtype=torch.float32, quantization=quantization)
    if quantization is not None:
        base = base.dequantize()
    model = with_adapter(base.to("cpu", torch.float32), str(adapter))
    model.generation_config = GenerationConfig.from_pretrained(adapter)
    return model


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_training(
    model: PreTrainedModel, sequences: int, length: int, bf16: bool, gradient_checkpointing: bool
) -> str:
    """
    A line for the user: what share of a model is trained, and the memory for it. For an adapter also the memory for
    training all of the model, and a second line if the two hardly differ.

    The memory is a sum: the weights as they are stored; gradients and the two moments of AdamW for what is trained;
    activations by the formula of `ModelCost`, as for training in full, because a layer keeps its input for its adapter
    as it would for its weight; and what the adapters keep besides. It is within 6 % of measured peaks, and in bfloat16
    within 15 % (docs/LOG.md).

    Args:
        sequences: in a micro-batch on one device.
    """
    trainable = trainable_parameters(model)
    # A byte of 4-bit weights holds two; `num_parameters` counts both.
    total = model.num_parameters()
    share = f"{trainable:,} of {total:,} parameters learn ({trainable / total:.1%})"
    try:
        cost = ModelCost(model.config)
    except ValueError:
        return share  # not of Llama's shape
    full = cost.training_memory(sequences, length, "bfloat16" if bf16 else "float32", gradient_checkpointing)
    weights = model.get_memory_footprint()
    kept = kept_by_adapters(model, sequences * length) * (torch.bfloat16 if bf16 else torch.float32).itemsize
    if gradient_checkpointing:
        kept /= model.config.num_hidden_layers  # kept for one block at a time
    needed = weights + 3 * trainable * torch.float32.itemsize + full.activations + kept + full.working
    line = f"{share}, about {in_mib(needed)} of memory for {sequences} x {length} tokens"
    if not has_lora(model):
        return line
    line += f"; in full, {in_mib(full.total)}"
    if needed < USEFUL_SHARE * full.total:
        return line
    of_adapter, of_model = (in_mib(number * torch.float32.itemsize) for number in (trainable, total - trainable))
    return (
        f"{line}.\nThe adapter saves little memory here, because activations take most of it. It saves disk: a "
        f"checkpoint of {of_adapter} in place of {of_model}"
    )


def kept_by_adapters(model: nn.Module, tokens: int) -> float:
    """
    How many numbers the adapters keep for the backward pass of so many tokens, besides the inputs of their layers.
    With dropout: the inputs after dropout, and the mask, which on a GPU takes one byte for each. With DoRA: the outputs
    of layer and adapter, and the identity matrix that peft multiplies by the adapter.
    """
    if not has_lora(model):
        return 0
    config = model.peft_config["default"]
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    kept = 0.0
    if config.lora_dropout:
        kept += (2 if model.device.type == "cpu" else 1.25) * tokens * sum(layer.in_features for layer in layers)
    if config.use_dora:
        kept += sum(2 * tokens * layer.out_features + layer.in_features**2 for layer in layers)
    return kept


def in_mib(number: int) -> str:
    return f"{number / MIB:,.{0 if number >= 100 * MIB or math.isclose(number, 0) else 1}f} MiB"
