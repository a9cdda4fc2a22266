"""What the page shows of the inside of a model."""

from pathlib import Path

import pytest
import torch
from generation_mini.demo.inside import look_inside
from generation_mini.demo.writing import Author
from helpers.random_models import make_model
from modeling_mini.analysis.attention import attention_weights, eager_attention
from tokenization import ByteTokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM


def test_attention_and_layers_are_those_before_the_token(author: Author) -> None:
    ids = author.tokenizer("the cat").input_ids
    seen = look_inside(author, ids, token_id=12)
    with eager_attention(author.model):
        weights = attention_weights(author.model, torch.tensor([ids]))[:, 0, :, -1]
    torch.testing.assert_close(torch.tensor(seen["attention"]), weights, atol=1e-4, rtol=0)
    assert seen["pieces"][:2] == [{"text": "bos", "tokens": 1, "special": True}, {"text": "t", "tokens": 1}]
    with torch.no_grad():
        probabilities = author.model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1)
    assert len(seen["lens"]) == 3, "the embedding and two layers"
    last = seen["lens"][-1]
    assert last["text"] == author.label(int(probabilities.argmax())) and seen["notice"] == ""
    assert last["probability"] == pytest.approx(probabilities.max().item(), abs=1e-5)
    assert last["chosen"] == pytest.approx(probabilities[12].item(), abs=1e-5)
    assert author.model.config._attn_implementation == "sdpa" and not author.lock.locked()


def test_a_character_of_several_bytes_is_one_piece() -> None:
    author = Author(make_model(vocab_size=264), ByteTokenizer())
    seen = look_inside(author, author.tokenizer("é").input_ids, token_id=12)
    assert [(piece["text"], piece["tokens"]) for piece in seen["pieces"]] == [("bos", 1), ("é", 2)]


def test_other_families(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    gpt2 = Author(GPT2LMHeadModel(GPT2Config(**sizes)).eval(), ByteTokenizer())
    seen = look_inside(gpt2, [1, 20, 30], token_id=12)
    assert len(seen["attention"]) == 2 and len(seen["lens"]) == 3 and seen["notice"] == ""
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4)
    seen = look_inside(Author(MambaForCausalLM(config).eval(), ByteTokenizer()), [1, 20, 30], token_id=12)
    assert seen["attention"] == [] and "returns no attention weights" in seen["notice"]
