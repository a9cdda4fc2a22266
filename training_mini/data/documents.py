"""Documents become token ids on the disk: in shards, with a part of them held out."""

import codecs
import contextlib
import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenization import ByteTokenizer, CharTokenizer
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from ..monitoring import progress_bar
from .files import printable
from .formats import PIECE_SIZE, decoded, guess_of_encoding, with_end
from .shards import ShardWriter, shard_name
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
    position.
    """
    passes = 2 if tokenizer is None else 1
    total = source.total_bytes and source.total_bytes * passes
    with progress_bar(f"Encoding {source.name}", total, "bytes", show_progress) as advance:

        def documents() -> Iterator[tuple[str, Iterator[bytes]]]:
            for name, pieces in source.read():
                yield name, (advance(len(piece)) or piece for piece in pieces)

        if tokenizer is None:
            texts = (text for name, pieces in documents() for text in decoded(name, pieces, "utf-8", arguments.errors))
            tokenizer = CharTokenizer.from_text(texts)
        id_dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        separator = np.array([tokenizer.eos_token_id], dtype=id_dtype)
        read_bytes = {"train": 0, "validation": 0}
        number_of_documents = 0
        not_utf8: list[tuple[str, str]] = []  # document, and a guess at its encoding
        writers = {
            "train": ShardWriter(folder, "train", id_dtype, SHARD_TOKENS),
            "validation": ShardWriter(folder, "validation", id_dtype, sys.maxsize),
        }
        with contextlib.closing(writers["train"]), contextlib.closing(writers["validation"]):
            for name, pieces in documents():
                first = next(pieces, b"")
                if not first:
                    continue
                # Of a longer document nobody knows the length yet: it trains, and the end of the corpus makes up.
                held_out = read_bytes["validation"] + len(first) / 2
                is_due = held_out <= arguments.validation_ratio * (sum(read_bytes.values()) + len(first))
                split = "validation" if is_due and len(first) < PIECE_SIZE else "train"
                all_pieces = counted(first, pieces, read_bytes, split)
                if isinstance(tokenizer, ByteTokenizer):  # the others refuse or replace what is not UTF-8
                    all_pieces = noticing(name, all_pieces, not_utf8)
                for ids in encode_pieces(tokenizer, name, all_pieces, arguments.errors):
                    writers[split].write(ids)
                writers[split].write(separator)
                number_of_documents += 1
        if not number_of_documents:
            raise ValueError(f"There is no text in {source.name!r}.")
    tokens = {split: sum(writer.lengths) for split, writer in writers.items()}
    by_position = move_tail(
        folder, writers["train"].lengths, tokens["validation"], arguments.validation_ratio, id_dtype
    )
    tokens = {"train": tokens["train"] - by_position, "validation": tokens["validation"] + by_position}
    if not tokens["train"] or not tokens["validation"]:
        total = sum(tokens.values())
        raise ValueError(f"{source.name!r} has {total} tokens, too few to train on some and hold some out.")
    facts = {
        "documents": number_of_documents,
        "train_tokens": tokens["train"],
        "train_shards": writers["train"].lengths,
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


def counted(first: bytes, rest: Iterator[bytes], counts: dict[str, int], split: str) -> Iterator[bytes]:
    """A piece that was read ahead and those behind it, their bytes counted under `split`."""
    for piece in itertools.chain([first], rest):
        counts[split] += len(piece)
        yield piece


def move_tail(folder: Path, lengths: list[int], held_out: int, ratio: float, id_dtype: np.dtype) -> int:
    """
    Moves the end of the training ids to validation where that, with `held_out` ids, has less than half its share.
    Shortens `lengths`, the ids in each training shard, by what it moved, and returns that.
    """
    target = int((sum(lengths) + held_out) * ratio)
    missing = target - held_out
    if missing <= target / 2:
        return 0
    left = missing
    moves = []  # from the last shard backwards: which, and where to cut it
    for number in reversed(range(len(lengths))):
        part = min(left, lengths[number])
        lengths[number] -= part
        moves.append((folder / shard_name("train", number), lengths[number] * id_dtype.itemsize))
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
    return missing


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


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, name: str, pieces: Iterable[bytes], errors: str
) -> Iterator[np.ndarray]:
    """The ids of a document, piece by piece."""
    if isinstance(tokenizer, ByteTokenizer):
        yield from map(tokenizer.encode_corpus, pieces)
    elif isinstance(tokenizer, CharTokenizer):
        for text in decoded(name, pieces, "utf-8", errors):
            yield tokenizer.encode_corpus(text.encode("utf-8"))
    else:
        # Any other tokenizer sees one piece at a time: a token across two pieces (4 MiB) is cut in two.
        for text in decoded(name, pieces, "utf-8", errors):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            yield np.array(ids["input_ids"], dtype=np.int64)
