"""
Turns conversations, and prompts with completions, into token ids and a mask of the ids that are learned.

A record with `messages` is a conversation, and is encoded by the tokenizer's chat template. A record with `prompt` and
`completion` is plain text, and the completion ends with `<|eos|>`; but if both are lists of messages, it is a
conversation too. TRL uses the same forms.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenization import BpeTokenizer, CharTokenizer, MiniTokenizer, encode_messages, marks_the_assistant, text_of
from tokenization.base import id_dtype_of
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from .encoding import sampled
from .records import Record, kind_of_examples
from .shards import ShardedIds, ShardWriter
from .sources import DocumentSource

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Examples:
    """
    Attributes:
        ids: the ids of all examples, one after the other, `(tokens,)`.
        assistant_mask: 1 for each id that the model should write, and 0 for each id that it is given, `(tokens,)`.
        ends: the end of each example in `ids`, `(examples,)`.
    """

    ids: ShardedIds
    assistant_mask: ShardedIds
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, number: int, longest: int | None = None) -> slice:
        """The place of an example in `ids`; if it is longer than `longest`, that of its first `longest` ids."""
        start = int(self.ends[number - 1]) if number else 0
        end = int(self.ends[number])
        return slice(start, end if longest is None else min(end, start + longest))


def kind_of(source: DocumentSource, text_column: str | None) -> str | None:
    """The kind of the first record of a source; `None` for text, and if the user asked for one column."""
    if source.records is None or text_column is not None:
        return None
    first = next(iter(source.records()), None)
    return None if first is None else kind_of_examples(first[1])


def check_messages(name: str, messages: Any) -> list[dict[str, str]]:
    """
    The messages with only their roles and texts.

    Raises:
        ValueError: if it is not a list of messages with a role and a text, or if a message calls tools.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must have a list of messages, got {type(messages).__name__} {str(messages)[:60]!r}.")
    checked = []
    for message in messages:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role is not None and message.get("tool_calls"):
            raise ValueError(
                f"{name}: a message of the {role} has tool_calls, which are not learned: write them into its content."
            )
        if not isinstance(role, str):
            raise ValueError(f"{name}: a message needs a role and a content that is text, got {str(message)[:80]}.")
        try:
            checked.append({"role": role, "content": text_of(content)})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return checked


def encode_example(
    tokenizer: PreTrainedTokenizerBase, beginning: list[int], record: Record
) -> tuple[list[int], list[bool]]:
    """
    The ids of a record, and for each id whether the model should write it.

    Args:
        beginning: the ids that the tokenizer puts before a plain text.

    Raises:
        ValueError: if the record has another form. The error names it.
    """
    name, columns = record
    try:
        if columns.get("messages") is not None:
            return encode_messages(tokenizer, check_messages(name, columns["messages"]))
        prompt, completion = columns.get("prompt"), columns.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            prompt, completion = check_messages(name, prompt), check_messages(name, completion)
            ids, _ = encode_messages(tokenizer, prompt + completion)
            begun, _ = encode_messages(tokenizer, prompt, add_generation_prompt=True)
            same = sum(itertools.takewhile(bool, (a == b for a, b in zip(ids, begun, strict=False))))
            if same < len(begun) - 1:  # the last id may have merged with the completion
                raise ValueError(
                    "the chat template writes the prompt in another way where a completion follows, so nobody knows "
                    "where that begins: give the record as messages."
                )
            return ids, [number >= same for number in range(len(ids))]
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f"{name} must have messages, or a prompt and a completion that are text or lists of messages.")
    before = [*beginning, *encode_text(tokenizer, check_text(name, "prompt", prompt))]
    learned = [*encode_text(tokenizer, check_text(name, "completion", completion)), tokenizer.eos_token_id]
    return before + learned, [False] * len(before) + [True] * len(learned)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special tokens. Text that looks like a special token stays text."""
    if isinstance(tokenizer, MiniTokenizer):
        return tokenizer.encode_corpus(text.encode("utf-8")).tolist()
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def check_text(name: str, column: str, text: str) -> str:
    """The text; raises ValueError, naming the record, if it has half of a character, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half, where = ord(text[error.start]), error.start + 1
        raise ValueError(f"{name} has half of a character (U+{half:04X}) at character {where} of {column!r}.") from None
    return text


def texts_of_example(record: Record) -> Iterator[str]:
    """All texts of an example; raises ValueError as `check_text` and `check_messages` do."""
    name, columns = record
    for column in ("messages", "prompt", "completion"):
        value = columns.get(column)
        if isinstance(value, str):
            yield check_text(name, column, value)
        elif value is not None:
            yield from (message["content"] for message in check_messages(name, value))


def learned_tokenizer(source: DocumentSource, arguments: DataArguments) -> CharTokenizer | BpeTokenizer:
    """
    A tokenizer with all characters of the examples, or with merges of those that are trained on.

    Raises:
        ValueError: if the text cannot fill the vocabulary.
    """
    if arguments.tokenizer == "char":
        return CharTokenizer.from_text(text for record in source.records() for text in texts_of_example(record))

    def training_texts() -> Iterator[bytes]:
        for split, record in split_examples(source, arguments.validation_ratio):
            if split == "train":
                yield from (text.encode("utf-8") for text in texts_of_example(record))

    return BpeTokenizer.train(sampled(training_texts(), sum(map(len, training_texts()))), arguments.vocab_size)


def split_examples(source: DocumentSource, validation_ratio: float) -> Iterator[tuple[str, Record]]:
    """Each record with its split. It is "validation" if that brings the held-out share nearer to the ratio."""
    held_out = 0
    for number, record in enumerate(source.records()):
        split = "validation" if held_out + 0.5 <= validation_ratio * (number + 1) else "train"
        held_out += split == "validation"
        yield split, record


def write_examples(
    source: DocumentSource,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    validation_ratio: float,
    folder: Path,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """
    Encodes all examples into files in `folder`, and returns facts about them. `advance` is called with the number of
    examples that are done.

    Raises:
        ValueError: for a record that is not an example, or for too few examples.
    """
    if kind == "messages" and tokenizer.chat_template is None:
        raise ValueError(f"{source.name!r} has messages, and the tokenizer has no chat template to write them by.")
    id_dtype = id_dtype_of(len(tokenizer))
    beginning = tokenizer("").input_ids
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    ends: set[int] = set()
    is_chat = False
    with contextlib.ExitStack() as stack:
        writers = {
            split: [
                stack.enter_context(contextlib.closing(ShardWriter(folder, name, dtype, sys.maxsize)))
                for name, dtype in ((split, id_dtype), (mask_name(split), np.dtype(np.uint8)))
            ]
            for split in SPLITS
        }
        for split, record in split_examples(source, validation_ratio):
            ids, mask = encode_example(tokenizer, beginning, record)
            for writer, values in zip(writers[split], (ids, mask), strict=True):
                writer.write(np.array(values, dtype=writer.dtype))
            lengths[split].append(len(ids))
            is_chat = kind == "messages" or isinstance(record[1].get("prompt"), list)
            advance(1)
            if True in mask:
                ends.add(ids[len(ids) - 1 - mask[::-1].index(True)])
    if not all(lengths.values()):
        raise ValueError(
            f"{source.name!r} has too few examples ({sum(map(len, lengths.values()))}) to train on some and hold out a "
            f"share of {validation_ratio:g}."
        )
    for split in SPLITS:
        np.save(folder / f"{split}-ends.npy", np.cumsum(lengths[split]))
    return {
        "kind": kind,
        "is_chat": is_chat,
        "dtype": id_dtype.name,
        "has_assistant_mask": kind == "completion" or marks_the_assistant(tokenizer),
        # The last id of a turn, if it is a special token, as in every known chat template.
        "end_ids": sorted(ends & set(tokenizer.all_special_ids)),
        **{f"{split}_examples": len(lengths[split]) for split in SPLITS},
    }


def open_examples(folder: Path, split: str, dtype: str) -> Examples:
    """
    Raises:
        ValueError: if a file is missing or cut short.
    """
    try:
        ends = np.load(folder / f"{split}-ends.npy")
    except (OSError, ValueError, EOFError):
        raise ValueError(f"{folder / f'{split}-ends.npy'} is missing or cut short.") from None
    tokens = [int(ends[-1])]
    ids, mask = ShardedIds(folder, split, dtype, tokens), ShardedIds(folder, mask_name(split), "uint8", tokens)
    return Examples(ids, mask, ends)


def mask_name(split: str) -> str:
    """The name of the shards of the mask. It is an old name, so that encoded corpora from before can be read."""
    return f"{split}-said"
