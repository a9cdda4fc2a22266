"""Data that a caller in Python brings: a `datasets.Dataset`, or an iterable of token ids."""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenization.base import id_dtype_of
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from .corpus import Corpus, StreamCorpus, TextCorpus, load_corpus, stream_corpus, tokenizer_key
from .encoding import bytes_per_token, make_tokenizer
from .sources import dataset_source
from .streaming import HubStream, TokenStream

OWN_DATA = "own-data"  # what `dataset` is in the settings of such a run
INTEGERS_AT_ONCE = 4096  # of an iterable of single ids
ORDER = (
    "The data is an iterable: its order is that of the batches, whatever the seed. A run that is resumed reads it from "
    "the beginning up to where it was, and is exact only if the same ids come again."
)


def own_corpus(
    data: Iterable[Any] | None, arguments: DataArguments, max_eval_tokens: int, show_progress: bool
) -> Corpus:
    """
    The corpus of what was given to `train(data=...)`; with `None`, the one that the settings name.

    - A `datasets.Dataset` of text, of messages, or of prompts and completions is read as one of the Hub is; a
      `datasets.IterableDataset` as a stream. Both have an exact order.
    - Token ids in a list or an array are one text, and a list of such lists is several. Nothing is put between them.
      Records may have their ids under `input_ids`. A share of `validation_ratio` at the end is held out.
    - The same from any other iterable comes as a stream. The first `max_eval_tokens` are held out.

    Raises:
        ValueError: for anything else, for ids that the tokenizer does not have, and if a run whose data came from
            Python is resumed without it.
    """
    if data is None:
        if arguments.dataset == OWN_DATA:
            raise ValueError("This run learns from data that Python gave it: resume it by train(..., data=...) again.")
        return load_corpus(arguments, max_eval_tokens, show_progress)
    datasets = sys.modules.get("datasets")  # an object of it can only be there if it was imported
    can_be_read = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, str | bytes | Mapping) or not can_be_read:
        raise ValueError(
            f"data must be a datasets.Dataset or an iterable of token ids, got {type(data).__name__}: name a file by "
            f"dataset in the settings, or one split of a DatasetDict."
        )
    is_dataset = datasets is not None and isinstance(data, datasets.Dataset | datasets.IterableDataset)
    # A stream may not know its columns before it is read.
    if is_dataset and "input_ids" not in (data.column_names or next(iter(data), {})):
        if isinstance(data, datasets.Dataset):
            return load_corpus(arguments, max_eval_tokens, show_progress, dataset_source(data, arguments))
        return stream_corpus(arguments, max_eval_tokens, [lambda: HubStream(arguments, data)])
    tokenizer = make_tokenizer(arguments)
    if tokenizer is None:
        raise ValueError(f"tokenizer {arguments.tokenizer!r} is learned from text, and the data is token ids already.")
    if isinstance(data, Sequence | np.ndarray | torch.Tensor) or (is_dataset and isinstance(data, datasets.Dataset)):
        return corpus_of_ids(data, tokenizer, arguments)
    return corpus_of_iterable(data, tokenizer, arguments, max_eval_tokens)


def corpus_of_ids(data: Iterable[Any], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> TextCorpus:
    """
    Ids that are all there, with the end held out.

    Raises:
        ValueError: for what are no ids of the tokenizer, or too few.
    """
    ids = np.concatenate([np.empty(0, dtype=np.int64), *arrays_of_ids(data, len(tokenizer))])
    held_out = round(arguments.validation_ratio * len(ids))
    if not 0 < held_out < len(ids):
        raise ValueError(f"The data has {len(ids)} token ids, too few to train on some and hold some out.")
    ids = ids.astype(id_dtype_of(len(tokenizer)))
    return TextCorpus(
        name=OWN_DATA,
        train=ids[:-held_out],
        validation=ids[-held_out:],
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token(tokenizer),
        settings=settings_of(ids, tokenizer, arguments) | {"validation_ratio": arguments.validation_ratio},
    )


def corpus_of_iterable(
    data: Iterable[Any], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, max_eval_tokens: int
) -> StreamCorpus:
    """
    Ids that come one after the other, with the first held out.

    Raises:
        ValueError: for what are no ids of the tokenizer, or too few; and without `max_eval_tokens`.
    """
    if not max_eval_tokens:
        raise ValueError("Of an iterable, the first max_eval_tokens are held out, so max_eval_tokens cannot be 0.")
    items = Items(data, len(tokenizer))
    stream = TokenStream(lambda: ItemStream(items), OWN_DATA, lambda name, ids: ids)
    validation = stream.hold_out(max_eval_tokens)
    return StreamCorpus(
        name=OWN_DATA,
        train=stream,
        validation=validation,
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token(tokenizer),
        settings=settings_of(validation, tokenizer, arguments),
        problem=ORDER,
        block_windows=1,
    )


def settings_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> dict[str, Any]:
    """What shows, when a run is resumed, that the data is the same."""
    digest = hashlib.sha256(ids.astype(np.uint32).tobytes()).hexdigest()[:20]
    return {"content": digest, "tokenizer": tokenizer_key(arguments, tokenizer)}


def arrays_of_ids(data: Iterable[Any], vocabulary: int) -> Iterator[np.ndarray]:
    """The items of data as arrays of ids, `(tokens,)`; single ids in groups."""
    if isinstance(data, np.ndarray | torch.Tensor):
        yield checked(data, vocabulary)
        return
    singles: list[int] = []
    for item in data:
        if isinstance(item, Mapping) and "input_ids" not in item:
            raise ValueError(
                f"The data has a record without input_ids ({', '.join(map(str, item))}): give texts and examples as a "
                f"datasets.Dataset, or encode them."
            )
        ids = item["input_ids"] if isinstance(item, Mapping) else item
        if np.ndim(ids) == 0:
            singles.append(ids)
        if singles and (np.ndim(ids) or len(singles) == INTEGERS_AT_ONCE):
            yield checked(singles, vocabulary)
            singles = []
        if np.ndim(ids):
            yield checked(ids, vocabulary)
    if singles:
        yield checked(singles, vocabulary)


def checked(ids: Any, vocabulary: int) -> np.ndarray:
    """
    Token ids as an array, `(tokens,)`.

    Raises:
        ValueError: if they are no integers, or no ids of the vocabulary.
    """
    array = np.asarray(ids).reshape(-1)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"The data must be token ids, which are integers, got {array.tolist()[0]!r} ({array.dtype}): give texts as "
            f"a datasets.Dataset, or encode them."
        )
    if array.size and not (array.min() >= 0 and array.max() < vocabulary):
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(
            f"The data has the token id {wrong}, and the tokenizer has {vocabulary:,}: name its tokenizer."
        )
    return array.astype(np.int64)


class Items:
    """
    The items of an iterable, which can be opened again. What an iterator gives while the held-out part is read is kept,
    so that training can begin at its beginning.
    """

    def __init__(self, data: Iterable[Any], vocabulary: int) -> None:
        self.data, self.vocabulary = data, vocabulary
        self.most = 0  # items that one reading gave
        self._kept: list[np.ndarray] | None = [] if iter(data) is data else None
        self._rest = arrays_of_ids(data, vocabulary)
        self._is_opened = self._is_spent = False

    def open(self) -> Iterator[np.ndarray]:
        """
        The items from the beginning.

        Raises:
            ValueError: at the end of an iterator, or of data that gives fewer items than before.
        """
        if self._kept is None:
            items = arrays_of_ids(self.data, self.vocabulary)
        elif not self._is_opened:
            items = (self._kept.append(item) or item for item in self._rest)
        elif not self._is_spent:
            items = itertools.chain(self._kept, self._spend())
        else:
            raise self._ended()
        is_first, self._is_opened, count = not self._is_opened, True, 0
        for item in items:
            count += 1
            self.most = max(self.most, count)
            yield item
        if count < self.most or (self._kept is not None and not is_first):
            raise self._ended()

    def _spend(self) -> Iterator[np.ndarray]:
        for item in self._rest:
            self._is_spent = True
            yield item

    def _ended(self) -> ValueError:
        return ValueError(
            f"The data ended after {self.most:,} items and does not begin again: give a list, or an object whose "
            f"__iter__ begins anew, or fewer max_steps."
        )


class ItemStream:
    """The items of an iterable as documents, with their number as the position. See `DocumentStream`."""

    def __init__(self, items: Items) -> None:
        self.items, self._number = items, 0

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for item in itertools.islice(self.items.open(), self._number, None):
            self._number += 1
            yield f"item {self._number}", item

    def state_dict(self) -> dict[str, Any]:
        return {"item": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["item"]
