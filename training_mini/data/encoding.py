"""From documents to token ids: the tokenizer that was asked for or is learned, what it makes of text, and how fast."""

import collections
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenization import BpeTokenizer, ByteTokenizer, CharTokenizer, MiniTokenizer, load_tokenizer
from tokenization.base import plain_backend
from tokenization.raw_encoding import CUT, EncoderProcess, RawEncoder
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from ..arguments import DataArguments
from .formats import PIECE_SIZE, decoded

# Merges are learned from at most so much text. The library then takes 0.35 GB of memory for source code, and 1.8 GB
# where no word comes twice.
LEARNED_BYTES = 16_000_000
# A sample is taken in blocks of this size.
SAMPLED_BYTES = 1 << 16

# Text of so many bytes goes to an encoding process at a time.
BATCH_BYTES = 1 << 20
# What one process encodes in so many seconds is not worth the start of others.
ALONE_SECONDS = 3.0

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # as SentencePiece writes a byte

Chunk = tuple[str, bytes | None]  # the split, and text that is encoded by itself; `None` at the end of a document


def make_tokenizer(arguments: DataArguments) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer that was asked for; `None` for one that is learned from the text, once it is read.

    Raises:
        ValueError: if no tokenizer can be loaded, or it has no tokenizer.json, or no token that ends a document.
    """
    if arguments.tokenizer in (None, "byte"):
        return ByteTokenizer()
    if arguments.tokenizer in ("char", "bpe"):
        return None
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {arguments.tokenizer!r} is neither byte, char nor bpe, and no tokenizer could be loaded from "
            f"it ({' '.join(str(error).split())[:200]})."
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {arguments.tokenizer!r} is a program in Python ({type(tokenizer).__name__}): Mini needs "
            f"one that has a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {arguments.tokenizer!r} has no eos token to put between documents.")
    return tokenizer


def sampled(pieces: Iterable[bytes], total: int) -> Iterator[bytes]:
    """Pieces of `total` bytes, or blocks of at most `LEARNED_BYTES` that lie evenly among them."""
    seen = taken = 0
    for piece in pieces:
        if total <= LEARNED_BYTES:
            yield piece
            continue
        for start in range(0, len(piece), SAMPLED_BYTES):
            block = piece[start : start + SAMPLED_BYTES]
            seen += len(block)
            if (taken + len(block)) * total <= seen * LEARNED_BYTES:
                taken += len(block)
                yield block


def chunks_of(tokenizer: PreTrainedTokenizerBase, name: str, pieces: Iterable[bytes], errors: str) -> Iterator[bytes]:
    """
    The bytes of a document, cut anew where the tokenizer can go on.

    Raises:
        ValueError: naming document and byte, if they are not UTF-8, the tokenizer has no ids for such bytes, and
            `errors` is `"strict"`.
    """
    if isinstance(tokenizer, ByteTokenizer) and encoder_of(tokenizer) is None:
        yield from pieces
    elif isinstance(tokenizer, (ByteTokenizer, BpeTokenizer)):
        yield from cut_between_words(pieces)
    else:
        # Any other tokenizer than one of Mini cuts a token in two that lies across two pieces (4 MiB).
        yield from (text.encode("utf-8") for text in decoded(name, pieces, "utf-8", errors))


def cut_between_words(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """
    The same bytes in chunks of about `BATCH_BYTES`, which have the ids that they have together. Only text with no white
    space over four pieces is cut anywhere.
    """
    rest = b""
    for piece in pieces:
        rest += piece
        start = 0
        while cut := CUT.search(rest, start + BATCH_BYTES):
            yield rest[start : cut.start()]
            start = cut.start()
        rest = rest[start:]
        if len(rest) >= 4 * PIECE_SIZE:
            yield rest
            rest = b""
    if rest:
        yield rest


def encode_chunk(tokenizer: PreTrainedTokenizerBase, data: bytes) -> np.ndarray:
    """The ids of a chunk, `(tokens,)`, without special tokens: what looks like one stays text."""
    if isinstance(tokenizer, MiniTokenizer):
        return tokenizer.encode_corpus(data)
    ids = tokenizer(data.decode("utf-8"), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return np.array(ids["input_ids"], dtype=np.int64)


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, name: str, pieces: Iterable[bytes], errors: str
) -> Iterator[np.ndarray]:
    """The ids of a document, chunk by chunk."""
    return (encode_chunk(tokenizer, chunk) for chunk in chunks_of(tokenizer, name, pieces, errors))


def encode_chunks(tokenizer: PreTrainedTokenizerBase, chunks: Iterable[Chunk]) -> Iterator[tuple[str, np.ndarray]]:
    """
    The ids of chunks with their splits, in their order, and the end-of-text token at the end of each document. A
    tokenizer that is slower than numpy works in as many processes as there are processors; the ids are the same.
    """
    separator = np.array([tokenizer.eos_token_id])
    encoder = encoder_of(tokenizer)

    def joined(batch: list[Chunk], ids: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        remaining = iter(ids)
        for split, data in batch:
            yield split, separator if data is None else next(remaining)

    waiting: collections.deque[tuple[list[Chunk], Future]] = collections.deque()
    with contextlib.ExitStack() as stack:
        submit: Callable[[list[bytes]], Future] | None = None
        began, workers = time.monotonic(), number_of_processors()
        for batch in batches(chunks):
            texts = [data for _, data in batch if data is not None]
            if encoder is None or workers == 1 or time.monotonic() - began < ALONE_SECONDS:
                yield from joined(batch, (encode_chunk(tokenizer, text) for text in texts))
                continue
            if submit is None:
                submit = stack.enter_context(encoding_processes(encoder, workers))
            waiting.append((batch, submit(texts)))
            if len(waiting) > 2 * workers:  # more would only fill memory
                batch, future = waiting.popleft()
                yield from joined(batch, future.result())
        for batch, future in waiting:
            yield from joined(batch, future.result())


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> RawEncoder | None:
    """What other processes need to encode as this tokenizer does; `None` where they would not be faster, or cannot."""
    if isinstance(tokenizer, CharTokenizer) or (
        isinstance(tokenizer, ByteTokenizer) and not tokenizer.raw_encoder.added
    ):
        return None
    if isinstance(tokenizer, MiniTokenizer):
        return tokenizer.raw_encoder
    if isinstance(tokenizer, TokenizersBackend):
        return RawEncoder(plain_backend(tokenizer), np.dtype(np.int64), first_byte_id=None)
    return None


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Lists of chunks, of about `BATCH_BYTES` each: there may be very many small chunks."""
    batch: list[Chunk] = []
    size = 0
    for split, data in chunks:
        batch.append((split, data))
        size += len(data or b"") + 8
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def encoding_processes(encoder: RawEncoder, number: int) -> Iterator[Callable[[list[bytes]], Future]]:
    """Starts processes, and yields the function that hands texts to a free one; its future has the ids of each text."""
    with contextlib.ExitStack() as stack:
        free = collections.deque()
        for _ in range(number):
            process = EncoderProcess(encoder)
            stack.callback(process.close)
            free.append(process)

        def encode(texts: list[bytes]) -> list[np.ndarray]:
            process = free.popleft()  # there are as many threads as processes, so one is free
            try:
                return process.encode(texts)
            finally:
                free.append(process)

        threads = stack.enter_context(ThreadPoolExecutor(number))
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        yield lambda texts: threads.submit(encode, texts)


def number_of_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """
    Bytes of text per id, `(len(tokenizer),)`, 0 for special tokens. Exact for bytes, characters and byte-level BPE, and
    for tokens that were added; for others, the length of what the token adds to decoded text.
    """
    if isinstance(tokenizer, MiniTokenizer):
        return tokenizer.bytes_per_token()
    decoder = str(tokenizer.backend_tokenizer.decoder)
    is_byte_level, falls_back_to_bytes = "ByteLevel" in decoder, "ByteFallback" in decoder
    # At the beginning of a text, the decoders of SentencePiece drop the space of a token such as "▁the".
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    length_before = len(tokenizer.decode(before).encode("utf-8"))
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for i in set(range(len(tokenizer))) - special:
        if i in added:
            lengths[i] = len(added[i].content.encode("utf-8"))
        elif (token := tokenizer.convert_ids_to_tokens(i)) is not None:
            if is_byte_level:  # each character stands for a byte
                lengths[i] = len(token)
            elif falls_back_to_bytes and BYTE_TOKEN.fullmatch(token):
                lengths[i] = 1
            else:
                lengths[i] = len(tokenizer.decode([*before, i]).encode("utf-8")) - length_before
    return lengths
