"""What byte-level tokenizers share: their tokens are written in 256 characters, each of which stands for a byte."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .base import SPECIAL_TOKENS, MiniTokenizer
from .raw_encoding import RawEncoder

FIRST_BYTE_ID = len(SPECIAL_TOKENS)
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
VOCAB = {
    **{token: i for i, token in enumerate(SPECIAL_TOKENS)},
    **{character: FIRST_BYTE_ID + byte for character, byte in BYTE_OF_CHARACTER.items()},
}


class ByteLevelTokenizer(MiniTokenizer):
    """
    A tokenizer whose tokens are written in the 256 characters that stand for bytes.

    With `add_prefix_space=True` a text gets a space in front, where it has none; a corpus stays as it is.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> None:
        super().__init__(vocab=vocab, merges=merges, **kwargs)
        self._tokenizer.pre_tokenizer.add_prefix_space = self.add_prefix_space

    @staticmethod
    def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        # Words with the space in front of them, numbers, punctuation and white space are apart, as in GPT-2.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        return backend

    @staticmethod
    def has_same_words(ours: dict[str, Any], theirs: dict[str, Any] | None) -> bool:
        return theirs is not None and ours | {"add_prefix_space": theirs.get("add_prefix_space")} == theirs

    @functools.cached_property
    def raw_encoder(self) -> RawEncoder:
        encoder = super().raw_encoder
        encoder.backend.pre_tokenizer.add_prefix_space = False
        return dataclasses.replace(encoder, first_byte_id=FIRST_BYTE_ID)

    @functools.cached_property
    def _vocabulary_bytes(self) -> list[bytes]:
        tokens = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        special = [b""] * len(SPECIAL_TOKENS)
        return special + [bytes(map(BYTE_OF_CHARACTER.__getitem__, token)) for token in tokens[len(SPECIAL_TOKENS) :]]

    def _encode_with_added(self, data: bytes) -> np.ndarray:
        return self.raw_encoder.encode(data)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """
        As in transformers.

        Raises:
            ValueError: for a token that would not come back when it is decoded. In tokens of a byte-level vocabulary
                letters such as "é" stand for bytes, so one that is written in such letters alone cannot be told apart.
        """
        tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        # While a saved tokenizer is loaded, it gets the tokens that it has.
        for text in map(str, tokens if self._is_built else ()):
            if text not in self.get_added_vocab() and self._tokenizer.decoder.decode([text]) != text:
                raise ValueError(
                    f"The token {text!r} cannot be added: a byte-level tokenizer would decode its letters beyond ASCII "
                    f"as bytes. A token with a space, or with a character such as € or 日, can be."
                )
        return super().add_tokens(new_tokens, special_tokens=special_tokens)
