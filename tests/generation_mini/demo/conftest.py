"""A model that writes words of a small alphabet, without any training."""

import pytest
from generation_mini.demo.writing import Author
from helpers.random_models import make_model
from tokenization import CharTokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz <>/\n"


@pytest.fixture
def author() -> Author:
    tokenizer = CharTokenizer.from_text(ALPHABET)
    return Author(make_model(vocab_size=len(tokenizer), max_position_embeddings=64), tokenizer)
