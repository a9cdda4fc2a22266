"""Processes that encode: the same ids as in this one, and a sentence when one is ended."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenization import BpeTokenizer, ByteTokenizer, MiniTokenizer
from tokenization.raw_encoding import EncoderProcess

TEXT = Path(__file__).read_text(encoding="utf-8") + "straße € 日本\n" * 9


def bpe_with_added_token() -> BpeTokenizer:
    tokenizer = BpeTokenizer.train([TEXT], 300)
    tokenizer.add_tokens(["€"])
    return tokenizer


@pytest.mark.parametrize("make", [ByteTokenizer, bpe_with_added_token])
def test_another_process_gives_the_same_ids(make: type[MiniTokenizer]) -> None:
    tokenizer = make()
    process = EncoderProcess(tokenizer.raw_encoder)
    texts = [TEXT.encode(), b"", b"caf\xe9 \xff\xff", "<|eos|> €".encode()]
    try:
        for _ in range(2):
            for text, ids in zip(texts, process.encode(texts), strict=True):
                np.testing.assert_array_equal(ids, tokenizer.encode_corpus(text))
                assert ids.dtype == tokenizer.id_dtype
        process._process.kill()
        with pytest.raises(ValueError, match=r"A process that encodes text was ended from outside \(exit code -9\)"):
            process.encode(texts)
    finally:
        process.close()


def test_a_tokenizer_that_was_sent_carries_no_pieces() -> None:
    tokenizer = bpe_with_added_token()
    before = len(pickle.dumps(tokenizer))
    tokenizer.encode_corpus(b"spam and eggs")
    assert tokenizer.raw_encoder.known and len(pickle.dumps(tokenizer)) == before
