"""Documents become token ids on the disk: in shards, with a part of them held out."""

import codecs
import collections
import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenization import BpeTokenizer, ByteTokenizer, CharTokenizer
from tokenization.base import id_dtype_of
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from ..monitoring import progress_bar
from .encoding import Chunk, chunks_of, cut_between_words, encode_chunks, sampled
from .files import printable
from .formats import PIECE_SIZE, decoded, guess_of_encoding, with_end
from .records import Document
from .shards import ShardedIds, ShardWriter, shard_name
from .sources import DocumentSource

SHARD_TOKENS = 2**29  # 1 GiB of 16-bit ids


def write_documents(
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase | None,
    arguments: DataArguments,
    folder: Path,
    show_progress: bool,
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """
    Writes the shards of `train` and of `validation` (always one) into `folder`, and gives the tokenizer, which is made
    of the text where `tokenizer` is `None`, and what is to be known of them.

    A document goes to validation whenever that brings the share held out nearer to the ratio. Where whole documents
    cannot make the ratio (there is one, or a few long ones), the rest is taken from the end of the training ids, by
    position: counted in tokens, or in bytes with learned merges, so that these are not learned from it.

    Raises:
        ValueError: if there is no text, too little to train on some and hold some out, or text that the tokenizer
            cannot read.
    """
    ratio = arguments.validation_ratio
    passes = 1 if tokenizer is not None else 2 if arguments.tokenizer == "char" else 3
    total = source.total_bytes and source.total_bytes * passes
    with progress_bar(f"Encoding {source.name}", total, "bytes", show_progress) as advance:

        def documents() -> Iterator[Document]:
            for name, pieces in source.read():
                yield name, (advance(len(piece)) or piece for piece in pieces)

        if tokenizer is None and arguments.tokenizer == "char":
            texts = (text for name, pieces in documents() for text in decoded(name, pieces, "utf-8", arguments.errors))
            tokenizer = CharTokenizer.from_text(texts)
        elif tokenizer is None:
            tokenizer = learn_merges(documents, ratio, arguments.vocab_size)
        id_dtype = id_dtype_of(len(tokenizer))
        read_bytes = {"train": 0, "validation": 0}
        number_of_documents = 0
        not_utf8: list[tuple[str, str]] = []  # document, and a guess at its encoding

        def chunks() -> Iterator[Chunk]:
            nonlocal number_of_documents
            for split, name, pieces in split_documents(documents(), ratio, read_bytes):
                if isinstance(tokenizer, (ByteTokenizer, BpeTokenizer)):  # the others refuse or replace such bytes
                    pieces = noticing(name, pieces, not_utf8)
                for chunk in chunks_of(tokenizer, name, pieces, arguments.errors):
                    yield split, chunk
                yield split, None
                number_of_documents += 1

        writers = {
            "train": ShardWriter(folder, "train", id_dtype, SHARD_TOKENS),
            "validation": ShardWriter(folder, "validation", id_dtype, sys.maxsize),
        }
        encoded = encode_chunks(tokenizer, chunks())
        with contextlib.ExitStack() as stack:
            for closable in (*writers.values(), encoded):
                stack.enter_context(contextlib.closing(closable))
            for split, ids in encoded:
                writers[split].write(ids)
        if not number_of_documents:
            raise ValueError(f"There is no text in {source.name!r}.")
    tokens = {split: sum(writer.lengths) for split, writer in writers.items()}
    lengths = writers["train"].lengths
    if isinstance(tokenizer, BpeTokenizer):
        tail = share_to_move(sum(read_bytes.values()), read_bytes["validation"], ratio)
        by_position = ids_at_end(folder, lengths, id_dtype, tokenizer.bytes_per_token(), tail)
    else:
        by_position = share_to_move(sum(tokens.values()), tokens["validation"], ratio)
    move_tail(folder, lengths, by_position, id_dtype)
    tokens = {"train": tokens["train"] - by_position, "validation": tokens["validation"] + by_position}
    if not tokens["train"] or not tokens["validation"]:
        total = sum(tokens.values())
        change = "smaller" if ratio > 0.5 else "larger" if ratio < 0.01 else ""
        hint = f" with a validation_ratio of {ratio:g}: give a {change} one" if change else ""
        raise ValueError(f"{source.name!r} has {total} tokens, too few to train on some and hold some out{hint}.")
    facts = {
        "documents": number_of_documents,
        "train_tokens": tokens["train"],
        "train_shards": lengths,
        "validation_tokens": tokens["validation"],
        "validation_tokens_by_position": by_position,
        "dtype": id_dtype.name,
        "text_bytes": sum(read_bytes.values()),
    }
    if source.found is not None:
        facts["recoded_files"] = sum(not file.own_encoding.startswith("utf-8") for file in source.found.files)
    if not_utf8:
        facts["not_utf8"] = {"documents": len(not_utf8), "first": not_utf8[0][0], "guess": not_utf8[0][1]}
    return tokenizer, facts


def split_documents(
    documents: Iterable[Document], ratio: float, read_bytes: dict[str, int]
) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """
    The split, the name and the pieces of each document that is not empty. The pieces have to be read before the next
    document is asked for; their bytes are counted in `read_bytes`, by split.
    """
    for name, pieces in documents:
        # Several, because those of a compressed file, or of one in UTF-16, are shorter than PIECE_SIZE.
        read_ahead, length = [], 0
        while length < PIECE_SIZE and (piece := next(pieces, None)) is not None:
            read_ahead.append(piece)
            length += len(piece)
        if length:
            # The length of a longer document is not known yet, so it goes to training. What is then missing in the
            # held-out part comes from the end of the corpus: see `move_tail`.
            held_out = read_bytes["validation"] + length / 2
            is_due = held_out <= ratio * (sum(read_bytes.values()) + length)
            split = "validation" if is_due and length < PIECE_SIZE else "train"
            yield split, name, counted(itertools.chain(read_ahead, pieces), read_bytes, split)


def counted(pieces: Iterable[bytes], counts: dict[str, int], split: str) -> Iterator[bytes]:
    """The same pieces, their bytes counted under `split`."""
    for piece in pieces:
        counts[split] += len(piece)
        yield piece


def learn_merges(documents: Callable[[], Iterator[Document]], ratio: float, vocab_size: int) -> BpeTokenizer:
    """
    The tokenizer of merges of the documents that are trained on.

    Raises:
        ValueError: if their text cannot fill the vocabulary.
    """
    read_bytes = {"train": 0, "validation": 0}
    for _, _, pieces in split_documents(documents(), ratio, read_bytes):
        collections.deque(pieces, maxlen=0)  # reads them, so that they are counted
    size = read_bytes["train"] - share_to_move(sum(read_bytes.values()), read_bytes["validation"], ratio)

    def training_text() -> Iterator[bytes]:
        left = size
        for split, _, pieces in split_documents(documents(), ratio, {"train": 0, "validation": 0}):
            for chunk in cut_between_words(pieces):
                if split == "train":
                    yield chunk[:left]
                    left -= min(left, len(chunk))

    return BpeTokenizer.train(sampled(training_text(), size), vocab_size)


def share_to_move(total: int, held_out: int, ratio: float) -> int:
    """How much of the training part is to be held out too: nothing if `held_out` has half of its share of `total`."""
    target = int(total * ratio)
    missing = target - held_out
    return missing if missing > target / 2 else 0


def ids_at_end(folder: Path, lengths: list[int], id_dtype: np.dtype, bytes_of_id: np.ndarray, number: int) -> int:
    """How many of the last training ids, which lie in shards of `lengths`, stand for at most `number` bytes."""
    ids = ShardedIds(folder, "train", id_dtype, lengths)
    end = len(ids)
    while number and end:
        start = max(0, end - SHARD_TOKENS // 64)
        sizes = np.cumsum(bytes_of_id[ids[start:end]][::-1])
        fitting = int(np.searchsorted(sizes, number, side="right"))
        end -= fitting
        if fitting < len(sizes):
            break
        number -= int(sizes[-1])
    return len(ids) - end


def move_tail(folder: Path, lengths: list[int], number: int, id_dtype: np.dtype) -> None:
    """
    Moves so many ids from the end of the training ids to validation. Shortens `lengths`, the ids in each training
    shard, by them.
    """
    if not number:
        return
    left = number
    moves = []  # from the last shard backwards: which, and where to cut it
    for shard in reversed(range(len(lengths))):
        part = min(left, lengths[shard])
        lengths[shard] -= part
        moves.append((folder / shard_name("train", shard), lengths[shard] * id_dtype.itemsize))
        left -= part
        if not left:
            break
    with open(folder / shard_name("validation", 0), "ab") as validation_file:
        for path, start in reversed(moves):
            with open(path, "r+b") as file:
                file.seek(start)
                shutil.copyfileobj(file, validation_file)
                file.truncate(start)
            if not start:
                path.unlink()
    while lengths and not lengths[-1]:
        lengths.pop()


def noticing(name: str, pieces: Iterable[bytes], found: list[tuple[str, str]]) -> Iterator[bytes]:
    """The same pieces; adds name and guess to `found` where they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_valid = True
    for piece, is_last in with_end(pieces):
        if is_valid:
            try:
                decoder.decode(piece, is_last)
            except UnicodeDecodeError as error:
                is_valid = False
                found.append((printable(name), guess_of_encoding(error.object)))
        if piece:
            yield piece
