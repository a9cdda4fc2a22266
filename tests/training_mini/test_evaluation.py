"""Evaluation in units that mean the same for every tokenizer."""

import gzip
import lzma
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import ByteTokenizer
from torch import nn
from training_mini.data.batches import Collator
from training_mini.evaluation import HeldOutText, compressor_bits_per_byte, evaluate


@pytest.fixture(scope="module")
def model() -> MiniForCausalLM:
    torch.manual_seed(0)
    return MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, max_position_embeddings=16))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    # 50 tokens: three windows of 16 and a shorter one; two documents.
    tokenizer = ByteTokenizer()
    text = tokenizer.encode_corpus("an evaluation set of é".encode())
    return np.concatenate([text, [2], text, [2], text[:2]]).astype(np.uint16)


def test_every_token_is_predicted_once(model: MiniForCausalLM, ids: np.ndarray) -> None:
    nats = 0.0
    for start in range(0, len(ids), 16):
        window = torch.tensor(ids[start : start + 16].astype(np.int64))
        inputs = torch.cat([torch.tensor([1]), window[:-1]])
        with torch.no_grad():
            log_probabilities = nn.functional.log_softmax(model.eval()(inputs[None]).logits[0], dim=-1)
        nats -= log_probabilities[torch.arange(len(window)), window].sum().item()
    lengths = ByteTokenizer().bytes_per_token()
    for batch_size in (1, 2, 8):
        result = evaluate(model, HeldOutText(ids, lengths, Collator(16, 1)), batch_size, Accelerator(cpu=True))
        assert result.loss == pytest.approx(nats / len(ids), rel=1e-6)
        # The separators cost nats and stand for no bytes.
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (len(ids) - 2), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)


def test_dropout_is_off_and_the_mode_comes_back(ids: np.ndarray) -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, residual_dropout=0.9)).train()
    arguments = (model, HeldOutText(ids, ByteTokenizer().bytes_per_token(), Collator(16, 1)), 4, Accelerator(cpu=True))
    assert evaluate(*arguments) == evaluate(*arguments)
    assert model.training


def test_asked_to_stop_there_is_no_figure(model: MiniForCausalLM, ids: np.ndarray) -> None:
    answers = iter([False, True])
    arguments = (model, HeldOutText(ids, ByteTokenizer().bytes_per_token(), Collator(16, 1)), 1, Accelerator(cpu=True))
    assert evaluate(*arguments, should_stop=lambda: next(answers)) is None


def test_compressors() -> None:
    text = b"abc" * 1000
    assert compressor_bits_per_byte(text) == {
        "gzip": 8 * len(gzip.compress(text, compresslevel=9)) / 3000,
        "xz": 8 * len(lzma.compress(text, preset=9)) / 3000,
    }
