"""MLX runs native folders. It has wheels for Linux without a GPU: `pip install mlx-lm "mlx[cpu]"`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exports import random_model
from modeling_mini.export import export
from tokenization import ByteTokenizer

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (pip install mlx-lm 'mlx[cpu]')")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install mlx-lm 'mlx[cpu]')")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("stablelm", {}),
        ("stablelm", {"tie_word_embeddings": False, "norm_eps": 1e-3}),
        ("llama", {"norm_type": "rmsnorm", "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("qwen3", {"norm_type": "rmsnorm", "qk_norm": True}),
    ],
)
def test_logits_and_200_greedy_tokens(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    mx.set_default_device(mx.cpu)
    model = random_model(**fields, max_position_embeddings=256)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "m")
    ByteTokenizer().save_pretrained(tmp_path / "m")
    theirs, tokenizer = mlx_lm.load(str(export("native", tmp_path / "m", tmp_path / "native")))
    assert type(theirs).__module__ == f"mlx_lm.models.{kind}"
    ids = torch.randint(8, 264, (1, 60))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    got = np.array(theirs(mx.array(ids.numpy()))[0])
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()

    tokenizer.eos_token_ids = set()
    prompt = tokenizer.encode("def f(")
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    written = [r.token for r in mlx_lm.stream_generate(theirs, tokenizer, prompt, max_tokens=200)]
    assert written == ours[0, len(prompt) :].tolist()
