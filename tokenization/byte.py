"""ByteTokenizer: one id for each byte, so that any text, and any file, is in vocabulary."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .base import SPECIAL_TOKENS, MiniTokenizer

FIRST_BYTE_ID = len(SPECIAL_TOKENS)
VOCAB = {
    **{token: i for i, token in enumerate(SPECIAL_TOKENS)},
    **{character: FIRST_BYTE_ID + byte for byte, character in bytes_to_unicode().items()},
}


class ByteTokenizer(MiniTokenizer):
    """
    Byte b has id b + 8, after the eight special tokens: 264 ids in all.

    A byte-level BPE without merges, so decoding equals `bytes.decode("utf-8", errors="replace")` for any bytes. With
    `add_prefix_space=True` a text gets a space in front, where it has none.
    """

    def __init__(self, vocab: dict[str, int] | None = None, **kwargs: Any) -> None:
        super().__init__(vocab=VOCAB, **kwargs)
        self._tokenizer.pre_tokenizer.add_prefix_space = self.add_prefix_space

    @staticmethod
    def build_backend(vocab: dict[str, int]) -> Tokenizer:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        # Splitting into words changes no id; it makes `word_ids()` and alignment with words work.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        return backend

    def encode_corpus(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8).astype(self.id_dtype) + self.id_dtype.type(FIRST_BYTE_ID)

    def decode_corpus(self, ids: np.ndarray) -> bytes:
        is_byte = (ids >= FIRST_BYTE_ID) & (ids < FIRST_BYTE_ID + 256)
        return (ids[is_byte] - FIRST_BYTE_ID).astype(np.uint8).tobytes()

    def bytes_per_token(self) -> np.ndarray:
        lengths = np.zeros(len(self), dtype=np.int64)
        lengths[FIRST_BYTE_ID : FIRST_BYTE_ID + 256] = 1
        return lengths
