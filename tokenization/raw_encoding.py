"""
From bytes to ids by a tokenizer of the `tokenizers` library, as fast as Python can, in this process or in others.

This needs nothing but that library and numpy. So it is also a program that starts in a moment, of which several encode
a corpus at the same time: see `EncoderProcess`.
"""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

# Text can be cut before ASCII white space that follows anything but white space, and both sides have the ids that they
# have together: white space always begins a new piece there. Beyond ASCII, Unicode has these white spaces.
WIDE_SPACE = rb"(?:%s)" % b"|".join(
    rb"(?<=%s)" % space
    for space in (
        rb"\xc2[\x85\xa0]",
        rb"\xe1\x9a\x80",
        rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]",
        rb"\xe2\x81\x9f",
        rb"\xe3\x80\x80",
    )
)
CUT = re.compile(rb"(?<![\t-\r ])(?!%(wide)s)(?=[\t-\r ])" % {b"wide": WIDE_SPACE})
# ASCII as far as it can be cut; or white space and a word, or some, that are not all ASCII.
STRETCHES = re.compile(
    rb"([\x00-\x7f]+(?:(?<![\t-\r ])(?=[\t-\r ])|\Z))|([\t-\r ]*[^\t-\r ]+(?:%(wide)s[\t-\r ]+[^\t-\r ]*)*)"
    % {b"wide": WIDE_SPACE}
)
# The pieces that the library's ByteLevel cuts ASCII into, none of which merges with another.
ASCII_PIECES = re.compile(
    rb"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\t-\r ]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# Pieces of text repeat. The ids of each are kept, for at most so many pieces of at most so many bytes.
KEPT_PIECES, KEPT_PIECE_SIZE = 1 << 18, 64

ESCAPED_BYTES = re.compile("([\udc80-\udcff]+)")  # how Python decodes bytes that are no UTF-8, when told to keep them


@dataclass
class RawEncoder:
    """
    The ids of bytes. Those that are not UTF-8 get the ids of bytes.

    Attributes:
        backend: the tokenizer. It is set so that what looks like a special token stays text.
        dtype: of the ids.
        first_byte_id: the id of byte 0; nothing where the tokenizer has no ids of bytes, and all text has to be UTF-8.
        in_pieces: whether the tokenizer is a byte-level BPE that cuts text as GPT-2's does. Then the ids of pieces of
            text that were seen before are known. Otherwise the tokenizer reads each text as a whole.
        added: tokens that it finds in a text before the text is cut.
    """

    backend: Tokenizer
    dtype: np.dtype
    first_byte_id: int | None
    in_pieces: bool = False
    added: Sequence[bytes] = ()

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True  # which a copy of a tokenizer forgets
        self.known = KnownPieces(self)

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of a text, `(tokens,)`."""
        if not self.in_pieces or any(token in data for token in self.added):
            return self.encode_whole(data)
        pieces: list[bytes] = []
        for ascii_text, other in STRETCHES.findall(data):
            if ascii_text:
                pieces += ASCII_PIECES.findall(ascii_text)
            else:
                pieces.append(other)
        return np.frombuffer(b"".join(map(self.known.__getitem__, pieces)), dtype=self.dtype)

    def encode_whole(self, data: bytes) -> np.ndarray:
        """As `encode`, by the tokenizer alone."""
        if self.first_byte_id is None:
            return np.array(self.backend.encode(data.decode("utf-8"), add_special_tokens=False).ids, dtype=self.dtype)
        ids: list[int] = []
        for text, invalid in valid_stretches(data):
            ids += self.backend.encode(text, add_special_tokens=False).ids
            ids += [self.first_byte_id + byte for byte in invalid]
        return np.array(ids, dtype=self.dtype)


class KnownPieces(dict[bytes, bytes]):
    """From pieces of text to the bytes of their ids, which are found out when they are asked for."""

    def __init__(self, encoder: RawEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def __missing__(self, piece: bytes) -> bytes:
        ids = self.encoder.encode_whole(piece).tobytes()
        if len(piece) <= KEPT_PIECE_SIZE:
            if len(self) == KEPT_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def valid_stretches(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The text of bytes that may not all be UTF-8, in stretches, each with the invalid bytes that follow it."""
    # Text and escaped bytes take turns; text comes first and last.
    parts = [*ESCAPED_BYTES.split(data.decode("utf-8", "surrogateescape")), ""]
    for text, escaped in zip(parts[::2], parts[1::2], strict=True):
        yield text, escaped.encode("utf-8", "surrogateescape")


class EncoderProcess:
    """
    A process that encodes as this encoder does.

    Raises:
        ValueError: from `encode`, if the process was ended from outside.
    """

    def __init__(self, encoder: RawEncoder) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the program that started this one
        )
        self._send({field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)})

    def _send(self, message: object) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """The ids of each text, `(tokens,)`. One thread at a time may call this."""
        try:
            self._send(texts)
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise ValueError(
                f"A process that encodes text was ended from outside (exit code {self._process.wait()}); perhaps there "
                f"was not enough memory."
            ) from None

    def close(self) -> None:
        """Ends the process, also while it is at work."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Reads the attributes of a `RawEncoder` and then lists of texts, and answers each list with their ids."""
    encoder = RawEncoder(**pickle.load(sys.stdin.buffer))
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump([encoder.encode(text) for text in texts], sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
