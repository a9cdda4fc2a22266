"""BpeTokenizer: bytes, and longer and longer runs of them that a corpus has often."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers, trainers

from .base import SPECIAL_TOKENS
from .byte_level import VOCAB, ByteLevelTokenizer
from .raw_encoding import CUT, RawEncoder, valid_stretches

SMALLEST_VOCABULARY = len(VOCAB) + 1
# A pair that occurs once teaches nothing: its token would be in one place of the corpus.
LEAST_FREQUENCY = 2
# `learn_merges` hands text on in parts of this many bytes. The library holds 256 of them at a time.
PART_SIZE = 1 << 16
# Longer runs without a space, or of spaces, are learned from in parts of this length: for one of a megabyte the library
# takes hours, because each merge moves all that stands behind it.
LONG_RUN = re.compile(r"\S{256}|\s{256}")


class BpeTokenizer(ByteLevelTokenizer):
    """
    The ids of `ByteTokenizer`, and behind them one for each of the merges that a corpus has taught: the pair of tokens
    that occurs most becomes a token, again and again. No merge goes beyond a word with the space in front of it, a
    number, a run of punctuation or a run of white space, in which the indentation of code is one.

    Made by `BpeTokenizer.train(...)`. Decoding is exact for any bytes, as that of `ByteTokenizer` is.
    """

    # transformers looks into each class for one: only then does it take a saved tokenizer apart for it.
    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(vocab=vocab, merges=merges, **kwargs)

    @classmethod
    def train(cls, texts: Iterable[str | bytes], vocab_size: int, **kwargs: Any) -> "BpeTokenizer":
        """
        The tokenizer of texts; those that are bytes need not be UTF-8. A generator is read once and never held whole,
        but each different word is.

        Args:
            texts: documents, or parts of them.
            vocab_size: how many tokens there shall be, the 264 special tokens and bytes among them.
            kwargs: settings of the tokenizer, such as `padding_side`.

        Raises:
            ValueError: if `vocab_size` is below 265 or more than the texts can fill, or a text has a lone surrogate.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size must be at least {SMALLEST_VOCABULARY} (the {len(VOCAB)} special tokens and bytes, and a "
                f"merge), got {vocab_size}."
            )
        tokenizer = cls.from_merges(learn_merges(texts, vocab_size), **kwargs)
        if tokenizer.vocab_size < vocab_size:
            raise ValueError(
                f"The text can fill a vocabulary of {tokenizer.vocab_size}, in which every pair that occurs twice is "
                f"merged; vocab_size is {vocab_size}."
            )
        return tokenizer

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]], **kwargs: Any) -> "BpeTokenizer":
        """The tokenizer with these merges, in their order."""
        vocab = dict(VOCAB)
        for first, second in merges:
            vocab.setdefault(first + second, len(vocab))
        return cls(vocab=vocab, merges=merges, **kwargs)

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
    ) -> "BpeTokenizer":
        """
        A tokenizer of merges that are learned from another corpus, with the settings of this one.

        Args:
            text_iterator: texts, or lists of texts.
            vocab_size: the most tokens that there can be, before `new_special_tokens`. There are fewer where the corpus
                has no more pairs that occur twice, and never less than the 264 special tokens and bytes.
            length: not needed; part of transformers' interface.
            new_special_tokens: added after the merges.
            special_tokens_map: new names for special tokens. The frozen ids keep the old ones, so a token with a new
                name is added after the merges as well.

        Raises:
            ValueError: for text that UTF-8 cannot hold (a lone surrogate).
        """
        texts = (text for item in text_iterator for text in ([item] if isinstance(item, str) else item))
        merges = learn_merges(texts, vocab_size)
        settings = self._settings(new_special_tokens, special_tokens_map)
        return BpeTokenizer.from_merges(merges, add_prefix_space=self.add_prefix_space, **settings)

    @staticmethod
    def owns_vocabulary(vocab: dict[str, int], merges: list[list[str]]) -> bool:
        tokens = set(vocab) - set(VOCAB)
        return (
            bool(merges)
            and vocab.items() >= VOCAB.items()
            and {first + second for first, second in merges} == tokens
            and sorted(vocab.values()) == list(range(len(vocab)))
        )

    def _encode_plain(self, data: bytes) -> np.ndarray:
        return self.raw_encoder.encode(data)

    @functools.cached_property
    def raw_encoder(self) -> RawEncoder:
        return dataclasses.replace(super().raw_encoder, in_pieces=True)


def learn_merges(texts: Iterable[str | bytes], vocab_size: int) -> list[tuple[str, str]]:
    """
    The merges of a vocabulary of at most `vocab_size` tokens, the 264 special tokens and bytes among them. The same
    texts give the same merges, on any number of threads: ties are decided by the tokens.

    Raises:
        ValueError: if a text has a lone surrogate.
    """
    backend = ByteLevelTokenizer.build_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=LEAST_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(valid_parts(texts), trainer)
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def valid_parts(texts: Iterable[str | bytes]) -> Iterator[str]:
    """All that is UTF-8, in parts with the words that the whole has, but for very long ones."""
    for text in texts:
        try:
            data = text if isinstance(text, bytes) else text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = ord(text[error.start])
            raise ValueError(f"The text has a lone surrogate, U+{surrogate:04X}, which is no character.") from None
        start = 0
        while start < len(data):
            cut = CUT.search(data, start + PART_SIZE)
            end = cut.start() if cut else len(data)
            for part, _ in valid_stretches(data[start:end]):
                ends = [*(run.end() for run in LONG_RUN.finditer(part)), len(part)]
                yield from (part[begin:end] for begin, end in itertools.pairwise([0, *ends]) if begin < end)
            start = end
