"""
The way back from native.py: a Llama, Qwen3 or StableLM as the Mini that computes the same.

A Mini that went out as one of them comes back bit by bit. Models that were never Mini come in too, where Mini has all
that they use.
"""

import copy
from pathlib import Path
from typing import Any

from configuration_mini import MiniConfig
from files_mini import writing
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .card import ExportCard
from .native import FIELDS_OF_MINI_ALONE, LARGEST_DIFFERENCE, SHARED_FIELDS, relative_difference, with_weights_of


def mini_config(config: PreTrainedConfig) -> MiniConfig:
    """
    The configuration of the Mini that computes what a Llama, Qwen3 or StableLM does.

    Raises:
        ValueError: if it is none of them, or uses what Mini does not have, naming the field.
    """
    kind = config.model_type
    if kind not in ("llama", "qwen3", "stablelm"):
        raise ValueError(f"mini takes a model of type llama, qwen3 or stablelm, and this one is {kind!r}.")
    fields: dict[str, Any] = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields.update({name: getattr(config, name) for name in FIELDS_OF_MINI_ALONE if hasattr(config, name)})
    fields["rope_parameters"] = dict(config.rope_parameters)
    if kind in ("llama", "qwen3"):
        if fields["rope_parameters"]["rope_type"] != "proportional":
            fields["rope_parameters"].pop("partial_rotary_factor", None)  # neither reads it
        fields.update(
            norm_type="rmsnorm",
            norm_eps=config.rms_norm_eps,
            head_dim=config.head_dim,
            attention_bias=config.attention_bias,
            qk_norm=kind == "qwen3",
            mlp_bias=getattr(config, "mlp_bias", False),
        )
        if getattr(config, "sliding_window", None) is not None:
            raise ValueError(f"Mini has no sliding window: sliding_window is {config.sliding_window}.")
    else:
        for name in ("use_parallel_residual", "qk_layernorm", "use_qkv_bias"):
            if getattr(config, name):
                raise ValueError(f"Mini does not compute this StableLM: {name} is true.")
        if fields["rope_parameters"]["partial_rotary_factor"] == 1:
            del fields["rope_parameters"]["partial_rotary_factor"]  # Mini's default
        fields.update(norm_type="layernorm", norm_eps=config.layer_norm_eps)
    return MiniConfig(**fields)


def to_mini(native: PreTrainedModel) -> PreTrainedModel:
    """
    The Mini that computes what a native model does, with a copy of its weights, in evaluation mode.

    Raises:
        ValueError: if Mini does not compute the same.
    """
    model = with_weights_of(native, mini_config(native.config))
    model.generation_config = copy.deepcopy(native.generation_config)
    return model


def export_mini(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> ExportCard:
    """
    Writes the Mini checkpoint of a native model into the folder `out`.

    Raises:
        ValueError: if Mini does not compute the same, by the configuration or by the logits.
    """
    mini = to_mini(model)
    difference = relative_difference(model, mini)
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(f"As Mini it gives other logits (by {difference:.0e}), so it is left alone.")
    with writing(out):
        mini.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return ExportCard(
        title="",
        usage="",
        exactness=f"It computes what the {type(model).__name__} does that it was made of. When this was written, its "
        f"logits on random tokens differed by {difference:.0e} of the largest, which is rounding.",
        library_name="transformers",
        config=mini.config,
    )
