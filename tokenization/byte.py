"""ByteTokenizer: one id for each byte, so that any text, and any file, is in vocabulary."""

from typing import Any

import numpy as np

from .bpe import BpeTokenizer
from .byte_level import FIRST_BYTE_ID, VOCAB, ByteLevelTokenizer


class ByteTokenizer(ByteLevelTokenizer):
    """
    Byte b has id b + 8, after the eight special tokens: 264 ids in all.

    A byte-level BPE without merges, so decoding equals `bytes.decode("utf-8", errors="replace")` for any bytes.
    """

    def __init__(self, vocab: dict[str, int] | None = None, merges: None = None, **kwargs: Any) -> None:
        super().__init__(vocab=VOCAB, **kwargs)

    @staticmethod
    def owns_vocabulary(vocab: dict[str, int], merges: list[list[str]]) -> bool:
        return vocab == VOCAB and not merges

    def _encode_plain(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8).astype(self.id_dtype) + self.id_dtype.type(FIRST_BYTE_ID)

    # Learning makes a tokenizer of merges out of one of bytes too.
    train_new_from_iterator = BpeTokenizer.train_new_from_iterator
