"""
The shape of a Mini model as plain data: each field with its help text and its range, and the presets.

It imports nothing but the standard library, so that a program knows its flags before it has loaded torch. It travels
with every checkpoint, beside `configuration_mini.py`, which makes a configuration of transformers of it.
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

NORM_TYPES = ("layernorm", "rmsnorm")

# All widths are multiples of 64 (bitsandbytes' 4-bit kernels need that, and tensor cores like it). Parameter counts
# are with tied embeddings; all but `gpt2` read bytes or characters.
PRESETS: dict[str, dict[str, Any]] = {
    # 0.49M: learns in minutes on two CPU cores
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    },
    # 2.53M: the default
    "small": {
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    # 19.6M: for one GPU
    "medium": {
        "hidden_size": 512,
        "intermediate_size": 1152,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    # 85.2M: GPT-2's body over bytes
    "large": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
    },
    # 123.6M: the same body with GPT-2's vocabulary, where one token both begins and ends a document
    "gpt2": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
        "vocab_size": 50257,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    },
}


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` when one of `known` looks like `name`, else an empty string; for error messages."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Interval:
    """The numbers that a setting may have. An end that is `None` is open, but NaN and infinity are never inside."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def describe(self, number: float) -> str:
        """What `number` is not, to be put after "must be"."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            if isinstance(number, int) and self.at_least is not None and self.at_most is not None:
                return f"from {low} to {high}"
            return f"in {'(' if self.at_least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"
        if low is None and high is None:
            return "finite"
        if high is not None:
            words = f"at most {high}" if self.at_most is not None else f"below {high}"
        elif self.at_least is None:
            words = f"above {low}"
        else:
            words = f"at least {low}"
        return words if number in Interval() else f"{words} and finite"


def option(default: Any, help: str, **metadata: Any) -> Any:
    """
    A dataclass field that is a setting.

    Args:
        help: the help text of its flag.
        metadata: the ends of its `Interval`; and for the parser, `aliases` and `choices` of the flag, and whether it is
            `common`: one that most people need.
    """
    ends = {name: metadata.pop(name) for name in Interval.__dataclass_fields__ if name in metadata}
    metadata = {"help": help, "interval": Interval(**ends), **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_numbers(settings: Any) -> None:
    """
    Raises ValueError, in one sentence, for a number in a dataclass that is outside of the interval of its field; for a
    number in a list or a mapping, only where it is NaN or infinite.
    """
    for setting in fields(settings):
        interval = setting.metadata.get("interval", Interval())
        value = getattr(settings, setting.name)
        if not isinstance(value, int | float):
            interval = Interval()
        for name, number in numbers_in(value, setting.name):
            if number not in interval:
                raise ValueError(f"{name} must be {interval.describe(number)}, got {number}.")


def numbers_in(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers_in(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_in(item, f"{name}: {key}")


@dataclass(kw_only=True, repr=False, eq=False)  # MiniConfig has those of transformers
class MiniShape:
    """
    The fields of a Mini model that a person chooses. Each is a flag of the trainer and of `modeling_mini.analysis
    cost`, with its help and its range from here; `MiniConfig` adds what the tokenizer decides.

    Names are Llama's wherever Llama has the field. Mini's own are `norm_type`, `norm_eps`, `qk_norm`,
    `embedding_dropout` and `residual_dropout`.
    """

    hidden_size: int = option(256, "width of the residual stream", at_least=1)
    intermediate_size: int = option(320, "width of the SwiGLU layer", at_least=1)
    num_hidden_layers: int = option(6, "number of blocks", at_least=1)
    num_attention_heads: int = option(8, "number of query heads", at_least=1)
    num_key_value_heads: int | None = option(
        2,
        "number of key/value heads: as many as query heads is multi-head attention, 1 is multi-query, between is "
        "grouped-query",
        at_least=1,
    )
    head_dim: int | None = option(
        None, "width of one head, an even number; hidden_size / num_attention_heads where it is not given", at_least=2
    )
    hidden_act: str = option("silu", "activation inside the SwiGLU layer, by its name in transformers")
    max_position_embeddings: int = option(256, "context length in tokens", at_least=1)
    initializer_range: float = option(
        0.02, "standard deviation of the initial weight matrices", above=0, at_most=1
    )  # see MiniPreTrainedModel._init_weights
    norm_type: str = option("layernorm", f"normalization: {' or '.join(NORM_TYPES)}")
    norm_eps: float = option(1e-5, "epsilon of every normalization", above=0, at_most=1)
    qk_norm: bool = option(False, "normalize queries and keys per head, before the rotary embedding")
    tie_word_embeddings: bool = option(True, "share one matrix between the embedding and the head")
    rope_parameters: dict[str, Any] | None = option(
        None,
        "rotary embedding as a mapping: rope_type, rope_theta and what the type needs, such as "
        "'{rope_type: linear, rope_theta: 10000, factor: 2}'; any type of transformers",
    )
    attention_bias: bool = option(False, "biases in the four attention projections")
    mlp_bias: bool = option(False, "biases in the three SwiGLU projections")
    embedding_dropout: float | int = option(0.0, "dropout after the embedding", at_least=0, below=1)
    attention_dropout: float | int = option(0.0, "dropout on the attention weights", at_least=0, below=1)
    residual_dropout: float | int = option(0.0, "dropout on what a block adds", at_least=0, below=1)


__all__ = ["NORM_TYPES", "PRESETS", "Interval", "MiniShape", "check_numbers", "nearest_name", "option"]
