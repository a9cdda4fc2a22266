"""
Training from a dataset that is read as a stream and not stored, with resume at the exact position.

Every process reads the whole stream and takes its own sequences from each batch, so batches do not depend on the number
of processes. If one process cannot read the dataset fast enough, encode it into shards.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ..arguments import DataArguments
from .batches import Batch, Batches, Collator, key_of, permute
from .files import FoundFiles, find_files, number_of_files
from .formats import RECORD_FORMATS, DataFile
from .records import Document, file_documents, record_documents
from .sources import BUILT_IN, load_hub_dataset

# How many windows are shuffled together. Neighbours in a stream often come from one document. With this number, a batch
# of usual size rarely has two windows of one document.
BLOCK_WINDOWS = 1024

Encode = Callable[[str, Iterator[bytes]], np.ndarray]


class DocumentStream(Protocol):
    """Documents that come one after the other and are not stored, with a position among them."""

    def __iter__(self) -> Iterator[Document]:
        """The documents from the position to the end."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document, in a form that JSON can store."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position. Call it before the iteration begins."""


class FileStream:
    """The records of local files as documents. Each file is read separately, so the files may have other columns."""

    def __init__(self, files: list[DataFile], arguments: DataArguments) -> None:
        self.files, self.arguments = files, arguments
        self._file, self._record = 0, 0  # where the next document is

    def __iter__(self) -> Iterator[Document]:
        while self._file < len(self.files):
            file = self.files[self._file]
            for name, pieces in file_documents(file, self.arguments, self._record):
                self._record = int(name.rpartition(" ")[2]) + 1
                yield name, pieces
            self._file, self._record = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "record": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "examples_iterable" not in state:
            self._file, self._record = state["file"], state["record"]
            return
        # Old checkpoints are from `datasets`, which stored where a table began and how much of it was used.
        inner = state["examples_iterable"]
        begun = inner.get("previous_state") or inner.get("examples_iterable", inner)
        used = inner.get("num_chunks_since_previous_state", 0) if inner.get("previous_state") else 0
        self._file, self._record = begun["shard_idx"], begun["shard_example_idx"] + used
        while self._file < len(self.files):
            length = sum(1 for _ in itertools.islice(self.files[self._file].records(), self._record))
            if length == self._record:
                return
            self._file, self._record = self._file + 1, self._record - length


class HubStream:
    """The records of a dataset on the Hub as documents, or those of `dataset`."""

    def __init__(self, arguments: DataArguments, dataset: "datasets.IterableDataset | None" = None) -> None:  # noqa: F821
        self.arguments = arguments
        # A copy begins at the beginning, wherever another one was left.
        self.dataset = copy.deepcopy(dataset) if dataset is not None else load_hub_dataset(arguments, streaming=True)

    def __iter__(self) -> Iterator[Document]:
        name = self.arguments.dataset
        yield from record_documents(name, self._records(), self.arguments.text_column, self.arguments.errors)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number = -1
        try:
            for number, record in enumerate(self.dataset):
                yield number, record
        except Exception as error:  # any library may be reading this format from the network
            detail = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(
                f"The stream of {self.arguments.dataset!r} broke off after {number + 1:,} records of this run "
                f"({type(error).__name__}: {detail})."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state)


def find_stream(arguments: DataArguments) -> tuple[Callable[[], DocumentStream], tuple[str, ...]]:
    """
    A function that opens the records of a dataset (on the Hub or in local files) as a stream with a position, and
    sentences about the files for the user.

    Raises:
        ValueError: for text files. They need no stream, because they are encoded once and never completely in memory.
    """
    name = arguments.dataset
    found = FoundFiles() if name in BUILT_IN else find_files(arguments)
    if found is None:
        return lambda: HubStream(arguments), ()
    files = [file for file in found.files if file.record_format is not None]
    if not files:
        raise ValueError(
            f"--streaming reads datasets of the Hub and files of records ({', '.join(RECORD_FORMATS)}), and "
            f"{name!r} is neither; leave --streaming out: other text is encoded once and never held in memory."
        )
    texts = [str(file) for file in found.files if file.record_format is None]
    if texts:
        found.names_left_out["text, which is read without --streaming"] += texts
    return lambda: FileStream(files, arguments), (found.sentence(f"Streams {number_of_files(len(files))}"),)


class TokenStream:
    """
    The token ids of a stream of documents. At the end of the dataset it begins again.

    Args:
        open_documents: opens the stream at its beginning.
        name: its name in errors.
        encode: turns the name and the bytes of a document into ids, with the separator.
    """

    def __init__(self, open_documents: Callable[[], DocumentStream], name: str, encode: Encode) -> None:
        self.open_documents, self.name, self.encode = open_documents, name, encode
        self.epoch = 0
        self._held_out = 0  # documents at the beginning that are never trained on
        self._begin(None)

    def _begin(self, position: dict[str, Any] | None) -> None:
        """Opens the stream, at a position or at its beginning."""
        self._stream = self.open_documents()
        if position is not None:
            self._stream.load_state_dict(position)
        self._documents = iter(self._stream)
        self._at_document = position
        self._ids, self._used = np.empty(0, dtype=np.int64), 0

    def _next_document(self) -> bool:
        """Goes to the next document; false at the end of the dataset."""
        position = copy.deepcopy(self._stream.state_dict())
        document = next(self._documents, None)
        if document is None:
            return False
        self._at_document = position
        self._ids, self._used = self.encode(*document), 0
        return True

    def hold_out(self, tokens: int) -> np.ndarray:
        """Holds out the first documents that together have `tokens` ids; gives the ids, `(tokens,)`."""
        pieces: list[np.ndarray] = []
        while sum(map(len, pieces)) < tokens and self._next_document():
            pieces.append(self._ids)
        self._held_out = len(pieces)
        if not pieces or not self._next_document():
            raise ValueError(
                f"{self.name!r} has no more than the {tokens} tokens to hold out; use a smaller --max_eval_tokens."
            )
        self._begin(None)
        self._skip_held_out()
        return np.concatenate(pieces)[:tokens].astype(np.uint32)

    def _skip_held_out(self) -> None:
        for _ in range(self._held_out):
            self._next_document()
        self._used = len(self._ids)

    def read(self, count: int) -> np.ndarray:
        """The next `count` ids, `(count,)`."""
        pieces = []
        while count:
            if self._used == len(self._ids) and not self._next_document():
                self.epoch += 1
                self._begin(None)
                self._skip_held_out()
                continue
            piece = self._ids[self._used : self._used + count]
            pieces.append(piece)
            self._used += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, the place of the current document in the stream, and how much of it was read."""
        return {"epoch": self.epoch, "records": self._at_document, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._begin(state["records"])
        if state["records"] is None:
            self._skip_held_out()
        else:
            self._next_document()
            self._used = state["used"]
        self.epoch = state["epoch"]


class StreamBatches(Batches):
    """
    Global batches from a stream. Blocks of windows come in the order of the stream, and the windows in a block are
    shuffled.

    Args:
        collator: how windows become sequences.
        batch_size: sequences of a global batch.
        block_windows: the windows in a block (default: `BLOCK_WINDOWS`). With 1, nothing is shuffled.
    """

    def __init__(
        self, stream: TokenStream, collator: Collator, batch_size: int, seed: int, block_windows: int | None = None
    ) -> None:
        super().__init__(batch_size)
        self.stream, self.collator, self.seed = stream, collator, seed
        self.block_windows = block_windows or BLOCK_WINDOWS
        self._blocks: dict[int, np.ndarray] = {}
        self._positions: dict[int, dict[str, Any]] = {}
        self._next_block = 0

    def epoch_of(self, step: int) -> float:
        """Whole epochs that the reading of the stream has completed; it reads ahead by up to a block."""
        return float(self.stream.epoch)

    def learned_tokens(self, step: int) -> int:
        return self.batch_size * self.collator.context_length

    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, count: int = 1
    ) -> Iterator[Batch]:
        """As `Batches` says; steps are asked for in order."""
        blocks, offsets = np.divmod(self.sequences_of(step), self.block_windows)
        self._read_blocks(int(blocks[0]), int(blocks[-1]))
        length = self.collator.context_length
        shares = zip(
            blocks.reshape(count, num_processes, -1)[:, process_index],
            offsets.reshape(count, num_processes, -1)[:, process_index],
            strict=True,
        )
        for share_blocks, share_offsets in shares:
            windows = [self._blocks[block][offset] for block, offset in zip(share_blocks, share_offsets, strict=True)]
            ids = np.concatenate(windows)
            yield self.collator.make(ids, range(0, len(ids), length))

    def _read_blocks(self, first: int, last: int) -> None:
        """Reads the blocks from `first` to `last`, and drops earlier ones."""
        length = self.collator.context_length
        while self._next_block <= last:
            self._positions[self._next_block] = self.stream.state_dict()
            windows = self.stream.read(self.block_windows * length).reshape(self.block_windows, length)
            key = key_of(self.seed, self._next_block)
            self._blocks[self._next_block] = windows[permute(np.arange(self.block_windows), self.block_windows, key)]
            self._next_block += 1
        for block in [block for block in self._blocks if block < first]:
            del self._blocks[block], self._positions[block]

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position of the block in which the batch of `step` begins. A resumed run reads on from there."""
        block = self.sequences_read(step) // self.block_windows
        position = self._positions[block] if block in self._positions else self.stream.state_dict()
        return {"block": block, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continues at a position. Call `start_at` first.

        Raises:
            ValueError: for an old checkpoint that has no count of sequences, if the batch size has changed.
        """
        if state["block"] != self._first_sequence // self.block_windows:
            raise ValueError(
                f"The checkpoint does not say how much of the stream was read, and that was at another batch size: "
                f"train_batch_size {self.batch_size} is not the one that the run began with."
            )
        self._blocks.clear()
        self._positions.clear()
        self._next_block = state["block"]
        self.stream.load_state_dict(state["position"])
