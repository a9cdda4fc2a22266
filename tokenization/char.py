"""CharTokenizer: one id for each character of its corpus."""

import functools
import logging
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, BatchEncoding

from .base import SPECIAL_TOKENS, UNK_ID, MiniTokenizer

logger = logging.getLogger(__name__)

FIRST_CHARACTER_ID = len(SPECIAL_TOKENS)
NUMBER_OF_CODE_POINTS = 0x110000


class CharTokenizer(MiniTokenizer):
    """
    The characters of a corpus in code-point order, after the eight special tokens. A character is a Unicode code point:
    a base letter and its combining mark are two. Characters that the corpus did not have become `<|unk|>`, and one
    warning lists them.

    Made by `CharTokenizer.from_text(...)` or `CharTokenizer.from_files(...)`.
    """

    def __init__(self, vocab: dict[str, int], merges: None = None, **kwargs: Any) -> None:
        super().__init__(vocab=vocab, **kwargs)
        self._characters = sorted(vocab, key=vocab.__getitem__)[FIRST_CHARACTER_ID:]
        self._warned: set[str] = set()

    @classmethod
    def from_text(cls, text: str | Iterable[str], **kwargs: Any) -> "CharTokenizer":
        """
        The tokenizer of a text, or of an iterable of texts (a generator is read once and never held whole).

        Raises:
            ValueError: if there is no character at all, or one that UTF-8 cannot hold (a lone surrogate).
        """
        seen = np.zeros(NUMBER_OF_CODE_POINTS, dtype=bool)
        for piece in [text] if isinstance(text, str) else text:
            try:
                seen[np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32)] = True
            except UnicodeEncodeError as error:
                surrogate = ord(piece[error.start])
                raise ValueError(f"The text has a lone surrogate, U+{surrogate:04X}, which is no character.") from None
        if not seen.any():
            raise ValueError("The text is empty, so there are no characters to make a vocabulary of.")
        tokens = (*SPECIAL_TOKENS, *(chr(code_point) for code_point in np.flatnonzero(seen)))
        return cls(vocab={token: i for i, token in enumerate(tokens)}, **kwargs)

    @classmethod
    def from_files(cls, paths: Iterable[str | os.PathLike], errors: str = "strict", **kwargs: Any) -> "CharTokenizer":
        """
        The tokenizer of UTF-8 files, read in pieces.

        Args:
            errors: `"strict"`, or `"replace"` to read each invalid sequence as U+FFFD.

        Raises:
            ValueError: if a file is not valid UTF-8 and `errors` is `"strict"`.
        """

        def pieces() -> Iterable[str]:
            for path in paths:
                try:
                    # newline="" keeps CRLF as it is in the file.
                    with open(path, encoding="utf-8", errors=errors, newline="") as file:
                        while piece := file.read(1 << 20):
                            yield piece
                except UnicodeDecodeError as error:
                    raise ValueError(f"{os.fspath(path)} is not valid UTF-8 ({error.reason}).") from None

        return cls.from_text(pieces(), **kwargs)

    @staticmethod
    def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=SPECIAL_TOKENS[UNK_ID], fuse_unk=False))
        # Splitting into words changes no id; it makes `word_ids()` and alignment with words work.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+|\s+"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        return backend

    @staticmethod
    def owns_vocabulary(vocab: dict[str, int], merges: list[list[str]]) -> bool:
        tokens = sorted(vocab, key=vocab.__getitem__)
        special, characters = tuple(tokens[:FIRST_CHARACTER_ID]), tokens[FIRST_CHARACTER_ID:]
        return special == SPECIAL_TOKENS and not merges and characters == sorted(c for c in characters if len(c) == 1)

    @staticmethod
    def has_same_words(ours: dict[str, Any], theirs: dict[str, Any] | None) -> bool:
        return theirs in (ours, None)  # the first ones that were saved had none

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int | None = None,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "CharTokenizer":
        """
        The tokenizer of another corpus, with the settings of this one. `vocab_size` and `length` are those of
        transformers' interface and change nothing here: every character of the corpus gets an id.

        Args:
            text_iterator: texts, or lists of texts.
            new_special_tokens: added after the characters.
            special_tokens_map: new names for special tokens. The frozen ids keep the old ones, so a token with a new
                name is added after the characters as well.

        Raises:
            ValueError: as `from_text` does.
        """
        texts = (text for item in text_iterator for text in ([item] if isinstance(item, str) else item))
        return type(self).from_text(texts, **self._settings(new_special_tokens, special_tokens_map), **kwargs)

    def _warn_of_unknown(self, unknown: set[str]) -> None:
        if new := unknown - self._warned:
            self._warned |= new
            listed = " ".join(repr(character) for character in sorted(new)[:50])
            more = f" and {len(new) - 50} more" if len(new) > 50 else ""
            logger.warning("Characters that are not in the vocabulary became <|unk|>: %s%s", listed, more)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        encoding = super()._encode_plus(text, text_pair, **kwargs)
        if any(UNK_ID in encoded.ids for encoded in encoding.encodings or []):
            splits = kwargs.get("split_special_tokens")
            splits = self.split_special_tokens if splits is None else splits
            tokens = [token for token in self.added_tokens_decoder.values() if not (splits and token.special)]
            longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
            added = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
            characters: set[str] = set()
            nested = [text, text_pair]
            while nested:
                item = nested.pop()
                if isinstance(item, str):
                    characters.update(added.sub("", item))
                elif item is not None:
                    nested.extend(item)
            self._warn_of_unknown(characters - set(self._characters))
        return encoding

    def encode_corpus(self, data: bytes, errors: str = "strict") -> np.ndarray:
        """
        UTF-8 bytes to ids without special tokens, `(tokens,)`: text that looks like a special token stays text.

        Raises:
            UnicodeDecodeError: if the bytes are not valid UTF-8 and `errors` is `"strict"`.
        """
        return super().encode_corpus(data if errors == "strict" else data.decode("utf-8", errors).encode("utf-8"))

    def _encode_plain(self, data: bytes) -> np.ndarray:
        code_points = np.frombuffer(data.decode("utf-8").encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code_point[code_points]
        unknown = ids == UNK_ID
        if unknown.any():
            self._warn_of_unknown({chr(code_point) for code_point in np.unique(code_points[unknown])})
        return ids

    def _encode_with_added(self, data: bytes) -> np.ndarray:
        ids = self(data.decode("utf-8"), add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        return np.array(ids, dtype=self.id_dtype)

    @functools.cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """A table over all code points: one gather encodes a text at memory speed."""
        table = np.full(NUMBER_OF_CODE_POINTS, UNK_ID, dtype=self.id_dtype)
        for i, character in enumerate(self._characters):
            table[ord(character)] = FIRST_CHARACTER_ID + i
        return table

    @functools.cached_property
    def _vocabulary_bytes(self) -> list[bytes]:
        """Unknown characters come back as U+FFFD."""
        special = [b""] * FIRST_CHARACTER_ID
        special[UNK_ID] = "\ufffd".encode()
        return special + [character.encode("utf-8") for character in self._characters]

    def bytes_per_token(self) -> np.ndarray:
        """As in the other classes. An unknown character counts as one byte, the least that it can have been."""
        lengths = super().bytes_per_token()
        lengths[UNK_ID] = 1
        return lengths
