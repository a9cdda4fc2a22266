"""MiniConfig: the shape of a Mini model as a configuration of transformers, and the checks that it passes."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from shape_mini import NORM_TYPES, PRESETS, MiniShape, check_numbers, nearest_name, option
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", *sorted(ROPE_INIT_FUNCTIONS))
# What of `rope_parameters` is a number; transformers only warns of some that are none.
NEEDED_ROPE_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
ROPE_NUMBERS = (
    *NEEDED_ROPE_NUMBERS, "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "short_factor", "long_factor",
)  # fmt: skip


def unknown_norm(reader: str, norm: str) -> ValueError:
    """The refusal of whatever cannot compute a norm, in place of taking it for another one."""
    return ValueError(f"{reader} does not know the norm {norm!r}.")


def one_sentence_errors(config_class: type) -> type:
    """Turns the two-line exceptions of `@strict` into a `ValueError` that holds only the sentence that matters."""

    def translated(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(f"{type(self).__name__}: {error.__cause__ or error}") from None

        return wrapper

    for name in ("__setattr__", "validate"):
        setattr(config_class, name, translated(getattr(config_class, name)))
    return config_class


@one_sentence_errors
@strict
class MiniConfig(MiniShape, PreTrainedConfig):
    """
    The configuration of a Mini model. `MiniConfig()` is the `small` preset.

    Args:
        hidden_size, num_hidden_layers, and so on: the fields of `MiniShape`, described there.
        vocab_size: rows of the embedding; 264 are 8 special tokens and 256 bytes.
        use_cache: whether `forward` keeps keys and values where it is not told.
        pad_token_id, bos_token_id, eos_token_id: ids of the tokenizer, within the vocabulary; `None` for none.

    Raises:
        ValueError: one sentence, for any combination that cannot work.
    """

    model_type = "mini"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        # Every rank normalises its own heads with the same weight, so each holds a part of that weight's gradient.
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = option(264, "rows of the embedding", at_least=1)
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MiniConfig":
        """
        The configuration of a named size, with any field replaced: `MiniConfig.preset("tiny", qk_norm=True)`.

        Raises:
            ValueError: if there is no such preset or no such field.
        """
        if name not in PRESETS:
            hint = nearest_name(str(name), list(PRESETS)) or "."
            raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}{hint}")
        for field in overrides:
            if field not in cls.__dataclass_fields__:
                hint = nearest_name(field, list(cls.__dataclass_fields__)) or "."
                raise ValueError(f"MiniConfig has no field {field!r}{hint}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def own_fields(cls) -> tuple[str, ...]:
        """
        The fields that shape a Mini: those of `MiniShape` and what the tokenizer decides, without what every
        configuration of transformers has. Lists of fields are made from this one by what they leave out, so that a new
        field is in all of them.
        """
        return (*(field.name for field in fields(MiniShape)), *cls.__annotations__)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # A width that cannot be divided keeps `None`, which `validate_architecture` refuses with the reason.
        divisible = self.num_attention_heads > 0 < self.hidden_size and self.hidden_size % self.num_attention_heads == 0
        if self.head_dim is None and divisible:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads == 1:
            # Ranks share attention out by heads, and one key/value head cannot be shared: each rank computes all of it.
            plan = type(self).base_model_tp_plan
            self.base_model_tp_plan = {name: style for name, style in plan.items() if ".self_attn." not in name}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Run by `@strict` when a configuration is made and again before it is saved."""
        if self.head_dim is not None and (self.head_dim < 1 or self.head_dim % 2):
            raise ValueError(
                f"head_dim must be even and at least 2, because the rotary embedding turns pairs of features; "
                f"got {self.head_dim}."
            )
        check_numbers(self)
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}), or head_dim must be given."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if self.norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type must be one of {', '.join(NORM_TYPES)}, got {self.norm_type!r}.")
        if self.hidden_act not in ACT2FN:
            hint = nearest_name(self.hidden_act, list(ACT2FN)) or "."
            raise ValueError(f"hidden_act {self.hidden_act!r} is not an activation of transformers{hint}")
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}.")

    def validate_rope(self) -> None:
        """The checks of transformers for each RoPE type, and as errors what it only warns of or does not look at."""
        parameters = self.rope_parameters or {}
        needed = NEEDED_ROPE_NUMBERS
        if parameters.get("rope_type") in ("linear", "dynamic", "llama3", "proportional"):  # others do without
            needed += ("factor",)
        for name, value in parameters.items():
            if name not in ROPE_NUMBERS:
                continue
            is_list = name in ("short_factor", "long_factor")
            if is_list and not isinstance(value, list):
                raise ValueError(f"{name} must be a list of numbers, got {value!r}.")
            values = value if is_list else [value] if name in needed or value is not None else []
            for number in values:
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise ValueError(f"{name} of rope_parameters must be a number, got {number!r}.")
                if name in ("factor", "original_max_position_embeddings") and number <= 0:
                    raise ValueError(f"{name} of rope_parameters must be above 0, got {number}.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        rope = self.rope_parameters
        if not torch.finfo(torch.float32).tiny <= rope["rope_theta"] < float("inf"):
            raise ValueError(f"rope_theta must be positive, and a number of float32, got {rope['rope_theta']}.")
        share = rope.get("partial_rotary_factor", 1.0)
        rotary_dim = int(self.head_dim * share) if self.head_dim is not None else 0
        if not 0 < share <= 1 or (self.head_dim is not None and rotary_dim < 2):
            raise ValueError(f"partial_rotary_factor must be in (0, 1] and leave at least two features, got {share}.")
        if rope["rope_type"] == "dynamic" and rotary_dim == 2:
            raise ValueError(
                "head_dim or partial_rotary_factor must be larger: rope_type dynamic needs two pairs of features."
            )
        for name in ("short_factor", "long_factor"):
            if name in rope and len(rope[name]) != rotary_dim // 2:
                raise ValueError(f"{name} must have {rotary_dim // 2} numbers, one for each pair of rotary features.")
        if self.head_dim is not None and rope["rope_type"] in ROPE_INIT_FUNCTIONS:
            self.check_frequencies(ROPE_INIT_FUNCTIONS[rope["rope_type"]])

    def check_frequencies(self, compute: Callable) -> None:
        """
        Computes the frequencies as the model will, for its context and for a longer text, for which some types have
        others. Each type divides by other numbers and takes other logarithms: yarn cannot have a `rope_theta` of 1.

        Raises:
            ValueError: if they cannot be computed, or are not finite.
        """
        rope, reason = self.rope_parameters, "they are not finite"
        longer = int(rope.get("original_max_position_embeddings", 0)) + self.max_position_embeddings + 1
        try:
            with torch.device("cpu"):  # also where a model is made without memory, on the device "meta"
                results = [compute(self, seq_len=length) for length in (None, longer)]
        except (ArithmeticError, ValueError) as error:
            results, reason = [(torch.zeros(1), float("nan"))], error.args[-1]
        if not all(torch.isfinite(frequencies * factor).all() for frequencies, factor in results):
            raise ValueError(f"No frequencies can be computed from rope_parameters ({reason}), got {rope}.")

    def validate_token_ids(self) -> None:
        """Stricter than transformers, which only warns: an id outside the vocabulary fails later, on a device."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name} must be within the vocabulary (0 to {self.vocab_size - 1}), got {token_id}."
                    )


__all__ = ["MiniConfig"]
