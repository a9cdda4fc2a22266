"""
Turns a Mini into the native class that computes the same: Llama (RMSNorm), Qwen3 (RMSNorm and QK-norm) or StableLM
(LayerNorm).

Their parameters have the same names and layout as Mini's, also for the rotary embedding. So the weights do not change,
and only the configuration is translated. A configuration that the class cannot express is refused, because it would
load without an error and compute something else.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from configuration_mini import MiniConfig, unknown_norm
from files_mini import writing
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    StableLmConfig,
)

from .card import ExportCard

# No native class has these fields. They are kept as additional entries for the way back, and others ignore them.
FIELDS_OF_MINI_ALONE = ("embedding_dropout", "residual_dropout")
# These have another name or meaning in at least one of the three classes. `native_config` translates them.
TRANSLATED_FIELDS = (
    "norm_type", "norm_eps", "qk_norm", "head_dim", "rope_parameters", "attention_bias", "mlp_bias"
)  # fmt: skip
# All other fields have the same name and meaning in the three classes and in Mini.
SHARED_FIELDS = tuple(
    name for name in MiniConfig.own_fields() if name not in (*FIELDS_OF_MINI_ALONE, *TRANSLATED_FIELDS)
)
# For the check of the result. Rounding gives differences of 1e-6, and a wrong frequency or norm gives 1e-1.
CHECKED_TOKENS, LARGEST_DIFFERENCE = 256, 1e-3


def native_config(config: MiniConfig) -> PreTrainedConfig:
    """
    The configuration of Llama, Qwen3 or StableLM that computes what this one does.

    Raises:
        ValueError: if none of them does. The error names the field that is the reason.
    """
    fields: dict[str, Any] = {name: getattr(config, name) for name in (*SHARED_FIELDS, *FIELDS_OF_MINI_ALONE)}
    fields["rope_parameters"] = dict(config.rope_parameters)
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    turns_whole_heads = int(config.head_dim * share) == config.head_dim
    # With this RoPE type there are frequencies for the whole head, and those beyond the share are 0.
    proportional = config.rope_parameters["rope_type"] == "proportional"
    fits_heads = config.hidden_size % config.num_attention_heads == 0

    if config.norm_type == "layernorm":
        if config.qk_norm:
            raise unequal(config, "qk_norm", "StableLM normalises each head with weights of its own and no bias")
        if config.attention_bias:
            raise unequal(config, "attention_bias", "StableLM has no bias in o_proj")
        if config.mlp_bias:
            raise unequal(config, "mlp_bias", "StableLM has none")
        if not fits_heads or config.head_dim != config.hidden_size // config.num_attention_heads:
            raise unequal(config, "head_dim", "in StableLM it is hidden_size / num_attention_heads")
        if proportional and not turns_whole_heads:
            raise unequal(config, "partial_rotary_factor", "StableLM cannot have that with proportional frequencies")
        if not proportional and int(config.head_dim * share) % 2:
            raise unequal(config, "partial_rotary_factor", "StableLM cannot turn an odd number of features")
        fields["rope_parameters"]["partial_rotary_factor"] = share  # the default would be a quarter
        return StableLmConfig(layer_norm_eps=config.norm_eps, **fields)

    if config.norm_type != "rmsnorm":
        raise unknown_norm("The format native", config.norm_type)
    name = "Qwen3" if config.qk_norm else "Llama"
    if not proportional:
        if not turns_whole_heads:
            raise unequal(config, "partial_rotary_factor", f"{name} turns whole heads")
        fields["rope_parameters"].pop("partial_rotary_factor", None)
    fields.update(rms_norm_eps=config.norm_eps, head_dim=config.head_dim, attention_bias=config.attention_bias)
    if config.qk_norm:
        if config.mlp_bias:
            raise unequal(config, "mlp_bias", "Qwen3 has none")
        return Qwen3Config(**fields)
    if not fits_heads:
        raise unequal(config, "hidden_size", "Llama wants a multiple of num_attention_heads")
    return LlamaConfig(mlp_bias=config.mlp_bias, **fields)


def unequal(config: MiniConfig, name: str, reason: str) -> ValueError:
    value = config.rope_parameters.get(name) if name == "partial_rotary_factor" else getattr(config, name)
    return ValueError(f"No native class computes this model: {name} is {value}, and {reason}.")


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """
    The native model that computes what a Mini does, with a copy of its weights, in evaluation mode.

    Raises:
        ValueError: if no native class computes the same.
    """
    if model.config.model_type != MiniConfig.model_type:
        raise ValueError(
            f"native takes a Mini, and this is a model of type {model.config.model_type!r}: of a folder in the format "
            f"native, the format mini makes a Mini again."
        )
    native = with_weights_of(model, native_config(model.config))
    native.generation_config = copy.deepcopy(model.generation_config)
    return native


def with_weights_of(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """
    A model of this configuration with copies of the parameters of `model`, which have the same names.

    Raises:
        ValueError: if a parameter is missing, left over or of another shape.
    """
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    other, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
    )
    if wrong := {kind: sorted(names) for kind, names in report.items() if names}:
        raise ValueError(f"The weights are not those of the configuration: {wrong}.")
    return other.eval()


def relative_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """
    The largest difference between the logits of two models, over the largest logit, in float32 on random tokens.
    """
    length = min(CHECKED_TOKENS, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (copy.deepcopy(m).float()(input_ids=ids, use_cache=False).logits for m in (model, other))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def checked_native(model: PreTrainedModel) -> tuple[PreTrainedModel, float]:
    """
    The native model, and by how much its logits differ (`relative_difference`).

    Raises:
        ValueError: if no native class computes the same, by the configuration or by the logits.
    """
    native = to_native(model)
    difference = relative_difference(model, native)
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(
            f"{type(native).__name__} gives other logits (by {difference:.0e}): the model is not what its config says."
        )
    return native, difference


def export_native(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> ExportCard:
    """
    Writes a native checkpoint into the folder `out`.

    Raises:
        ValueError: see `checked_native`.
    """
    native, difference = checked_native(model)
    name = type(native).__name__
    with writing(out):
        native.save_pretrained(out, state_dict=weights_to_save(native))
        tokenizer.save_pretrained(out)
        name_as_before(out / "config.json")
    usage = """
It loads without custom code:

```python
from transformers import pipeline

generator = pipeline("text-generation", model="PATH_OR_REPOSITORY")
{}
```

Or behind the protocol of OpenAI:

```bash
transformers serve PATH_OR_REPOSITORY
```
"""
    return ExportCard(
        title=f"Mini as {name.removesuffix('ForCausalLM')}, {model.num_parameters() / 1e6:.1f}M parameters",
        usage=usage.format('print(generator("The", max_new_tokens=100)[0]["generated_text"])'),
        usage_of_chat=usage.format(
            'messages = [{"role": "user", "content": QUESTION}]\n'
            'print(generator(messages, max_new_tokens=100)[0]["generated_text"][-1]["content"])'
        ),
        exactness=f"`{name}` computes what Mini does. When this was written, its logits on random tokens differed by "
        f"{difference:.0e} of the largest, which is rounding.",
        facts={"class": f"`{name}` of transformers"},
        library_name="transformers",
        tags=[native.config.model_type],
    )


def weights_to_save(native: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights. For StableLM a tied head is added: MLX needs it, because it does not tie, and others ignore it."""
    weights = native.state_dict()
    if native.config.tie_word_embeddings and native.config.model_type == "stablelm":
        weights["lm_head.weight"] = native.lm_head.weight.detach().clone()
    return weights


def name_as_before(config_file: Path) -> None:
    """
    Adds the entries of the rotary embedding to `config.json` under the names from before transformers 5, which other
    runtimes read. transformers itself reads `rope_parameters`.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[name] = rope.pop(name)
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
