"""A value for every field of a configuration."""

from typing import Any

# One value for each of Mini's fields, none of them the default.
EVERY_FIELD: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "hidden_act": "gelu",
    "max_position_embeddings": 76,
    "initializer_range": 0.031,
    "norm_type": "rmsnorm",
    "norm_eps": 3e-6,
    "qk_norm": True,
    "use_cache": False,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 2.0,
        "original_max_position_embeddings": 38,
        "partial_rotary_factor": 0.5,
    },
    "attention_bias": True,
    "mlp_bias": True,
    "embedding_dropout": 0.11,
    "attention_dropout": 0.12,
    "residual_dropout": 0.13,
    "pad_token_id": 11,
    "bos_token_id": 12,
    "eos_token_id": [13, 14],
}
