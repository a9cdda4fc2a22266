"""Small random models and requests, for tests that hold a fast path to a slow one."""

import random
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from modeling_mini import MiniForCausalLM
from torch import nn

# A model of a checkpoint folder, for tests that read or convert it.
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def groups(count: int) -> list[Any]:
    """Numbers of groups of random models, for a test of each. Together they take long, so the short run has one."""
    return [0, *(pytest.param(group, marks=pytest.mark.slow) for group in range(1, count))]


def make_model(**settings: Any) -> MiniForCausalLM:
    """A small random model, with logits far enough apart that what it writes varies."""
    defaults = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    model = MiniForCausalLM(MiniConfig(**{**defaults, **settings})).eval()
    # Norms and biases of a new model are ones and zeros, which would hide a wrong one.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_settings(draw: random.Random) -> dict[str, Any]:
    """Any shape that a config allows, and every RoPE type."""
    heads = draw.choice([1, 2, 4, 6])
    head_dim = draw.choice([4, 8, 16, 24])
    rope = draw.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            {
                "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            {
                "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16,
                "short_factor": [1.0 + i / 4 for i in range(head_dim // 2)],
                "long_factor": [2.0 + i for i in range(head_dim // 2)],
            },
        ]
    )  # fmt: skip
    return {
        "hidden_size": draw.choice([8, 24, 48, 64]),
        "intermediate_size": draw.choice([16, 40, 96]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": head_dim,
        "vocab_size": draw.choice([11, 64, 97, 264]),
        "norm_type": draw.choice(["layernorm", "rmsnorm"]),
        "qk_norm": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "hidden_act": draw.choice(["silu", "gelu", "relu2", "gelu_pytorch_tanh"]),
        "max_position_embeddings": draw.choice([16, 32, 128]),
        "rope_parameters": {"rope_theta": 10000.0, **rope},
    }


def random_request(draw: random.Random, vocab_size: int) -> dict[str, Any]:
    """Sequences, padded or not, and any of the settings that the fast path takes."""
    batch, length = draw.choice([1, 1, 2, 5]), draw.randint(1, 20)
    input_ids = torch.randint(1, vocab_size, (batch, length))
    attention_mask = torch.ones_like(input_ids)
    if draw.random() < 0.5:
        for row in range(batch):
            attention_mask[row, : draw.randrange(length)] = 0
    request = {"input_ids": input_ids, "attention_mask": attention_mask, "max_new_tokens": draw.randint(1, 24)}
    if draw.random() < 0.6:
        request["do_sample"] = True
        choices = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05}
        request |= {name: value for name, value in choices.items() if draw.random() < 0.5}
        if draw.random() < 0.3:
            request["num_return_sequences"] = 3
    choices = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "prefill_chunk_size": 4}
    request |= {name: value for name, value in choices.items() if draw.random() < 0.2}
    if draw.random() < 0.5:
        request["eos_token_id"] = torch.randint(1, vocab_size, (draw.choice([1, 3]),)).tolist()
    return request
