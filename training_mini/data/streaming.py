"""
Training from a dataset that is read as a stream and not stored, with resume at the exact position.

The files are divided into parts (`stream_parts`), each of which is a stream by itself and gives the same number of
sequences to each batch. A process reads only the parts that its sequences come from. So batches depend on the parts,
and not on the number of processes. With one part, every process reads the whole stream.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..arguments import DataArguments
from .batches import Batch, Batches, Collator, key_of, permute
from .files import FoundFiles, find_files, number_of_files
from .formats import RECORD_FORMATS, DataFile
from .records import Document, file_documents, find_text_column, numbered, record_documents
from .sources import BUILT_IN, load_hub_dataset

if TYPE_CHECKING:
    from datasets import IterableDataset

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
            yield from file_documents(self.files[self._file], self.arguments, self._number)
            self._file, self._record = self._file + 1, 0

    def _number(self, records: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers the records from the position on, which goes along."""
        for number, record in itertools.islice(numbered(records), self._record, None):
            self._record = number
            yield number, record

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
    """
    The records of a part of a dataset on the Hub as documents, or those of `dataset`.

    Raises:
        ValueError: if the files of the dataset cannot be divided into `stream_parts` equal numbers.
    """

    def __init__(
        self,
        arguments: DataArguments,
        dataset: "IterableDataset | None" = None,
        part: int = 0,
    ) -> None:
        self.arguments, self.text_column = arguments, arguments.text_column
        self._begin_at: dict[str, Any] | None = None  # where reading goes on, until a record was read
        # A copy begins at the beginning, wherever another one was left.
        self.dataset = copy.deepcopy(dataset) if dataset is not None else load_hub_dataset(arguments, streaming=True)
        if (parts := arguments.stream_parts) > 1:
            from datasets.distributed import split_dataset_by_node  # here, because it takes a second

            if self.dataset.num_shards % parts:  # then every part would download all files
                raise ValueError(
                    f"{arguments.dataset!r} has {number_of_files(self.dataset.num_shards)}, which cannot be divided "
                    f"equally into --stream_parts {parts}: choose a number that divides them."
                )
            self.dataset = split_dataset_by_node(self.dataset, rank=part, world_size=parts)

    def __iter__(self) -> Iterator[Document]:
        name = self.arguments.dataset
        yield from record_documents(name, self._records(), self.text_column, self.arguments.errors)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for number, record in numbered(self.dataset):
                self._begin_at = None
                yield number, record
        except Exception as error:  # any library may be reading this format from the network
            detail = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(
                f"The stream of {self.arguments.dataset!r} broke off after {number:,} records of this run "
                f"({type(error).__name__}: {detail})."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        # `datasets` says that it is at the beginning until it has read a record.
        return self.dataset.state_dict() if self._begin_at is None else self._begin_at

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The first record says which column is the text, also where the stream goes on behind it.
        if self.text_column is None and (first := next(self._records(), None)) is not None:
            self.text_column = find_text_column(self.arguments.dataset, first[1], None)
        self.dataset.load_state_dict(state)
        self._begin_at = state


def find_stream(arguments: DataArguments) -> tuple[list[Callable[[], DocumentStream]], tuple[str, ...]]:
    """
    Functions that open the records of a dataset (on the Hub or in local files), one for each of `stream_parts`, and
    sentences about the files for the user.

    Raises:
        ValueError: for fewer files than parts, and for text files. They need no stream, because they are encoded once
            and never completely in memory.
    """
    name = arguments.dataset
    found = FoundFiles() if name in BUILT_IN else find_files(arguments)
    parts = arguments.stream_parts
    in_parts = f"The stream is read in {parts} parts. Each begins again when it ends, the shorter ones more often."
    if found is None:
        return [functools.partial(HubStream, arguments, part=part) for part in range(parts)], (in_parts,) * (parts > 1)
    files = [file for file in found.files if file.record_format is not None]
    if not files:
        raise ValueError(
            f"--streaming reads datasets of the Hub and files of records ({', '.join(RECORD_FORMATS)}), and "
            f"{name!r} is neither; leave --streaming out: other text is encoded once and never held in memory."
        )
    texts = [str(file) for file in found.files if file.record_format is None]
    if texts:
        found.names_left_out["text, which is read without --streaming"] += texts
    if len(files) < parts:
        raise ValueError(
            f"--stream_parts {parts} divides the files of {name!r}, which has {number_of_files(len(files))} of "
            f"records: choose at most as many parts."
        )
    openers = [functools.partial(FileStream, files[part::parts], arguments) for part in range(parts)]
    return openers, (found.sentence(f"Streams {number_of_files(len(files))}"), *(in_parts,) * (parts > 1))


class TokenStream:
    """
    The token ids of a stream of documents. At the end of the dataset it begins again. It is opened when it is read.

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
        """Goes to a position or to the beginning of the stream."""
        self._stream: DocumentStream | None = None
        self._at_document = position
        self._ids, self._used = np.empty(0, dtype=np.int64), 0

    def _next_document(self) -> bool:
        """Goes to the next document; false at the end of the dataset."""
        if self._stream is None:
            self._stream = self.open_documents()
            if self._at_document is not None:
                self._stream.load_state_dict(self._at_document)
            self._documents = iter(self._stream)
        position = copy.deepcopy(self._stream.state_dict())
        document = next(self._documents, None)
        if document is None:
            return False
        self._at_document = position
        self._ids, self._used = self.encode(*document), 0
        return True

    def hold_out(self, tokens: int) -> np.ndarray:
        """
        Holds out the first documents that together have `tokens` ids; gives the ids, `(tokens,)`.

        Raises:
            ValueError: if there is no document, or nothing is left to train on.
        """
        pieces: list[np.ndarray] = []
        count = 0
        while count < tokens and self._next_document():
            pieces.append(self._ids)
            count += len(self._ids)
        self._held_out = len(pieces)
        if not pieces:
            raise ValueError(f"{self.name!r} has no text to hold out: none of the records that were read has any.")
        left = 0
        while not left and self._next_document():
            left = len(self._ids)  # 0 for an item of an iterable that is empty
        if not left:
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
        """
        The next `count` ids, `(count,)`.

        Raises:
            ValueError: if there is no document at all.
        """
        pieces = []
        while count:
            if self._used == len(self._ids) and not self._next_document():
                if self._at_document is None:
                    raise ValueError(f"A part of the stream of {self.name!r} has no text: choose fewer --stream_parts.")
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
        """
        Goes to a position.

        Raises:
            ValueError: if the document that the position is in has become shorter, or is not there any more.
        """
        self._begin(state["records"])
        if state["records"] is None:
            self._skip_held_out()
        else:
            self._next_document()
            self._used = state["used"]
            if self._used > len(self._ids):
                raise ValueError(
                    f"The data of {self.name!r} has changed: the document in which the run stood is shorter now, or "
                    f"is not there. Give the data as it was, or begin a new run."
                )
        self.epoch = state["epoch"]


class StreamPart:
    """
    The windows of a stream, shuffled in blocks.

    Args:
        length: the tokens of a window.
        block_windows: the windows in a block.
        seed: of the shuffling.
    """

    def __init__(self, stream: TokenStream, length: int, block_windows: int, seed: int) -> None:
        self.stream, self.length, self.block_windows, self.seed = stream, length, block_windows, seed
        self._blocks: dict[int, np.ndarray] = {}
        self._positions: dict[int, dict[str, Any]] = {}
        self._next_block = 0
        self._begin_at: dict[str, Any] | None = None  # where the stream has to go before it is read on

    @property
    def epoch(self) -> int:
        """How many times the stream was read to its end."""
        return self._begin_at["epoch"] if self._begin_at is not None else self.stream.epoch

    def go_to(self, state: dict[str, Any]) -> None:
        """Continues at a position. The stream is opened when it is read: maybe other processes read this part."""
        self._blocks.clear()
        self._positions.clear()
        self._next_block, self._begin_at = state["block"], state["position"]

    def position_of(self, window: int) -> dict[str, Any]:
        """The block of a window, and where it begins in the stream; of a block not read here, how far reading came."""
        block = min(window // self.block_windows, self._next_block)
        return {"block": block, "position": self._positions.get(block) or self._begin_at or self.stream.state_dict()}

    def read(self, first: int, last: int) -> None:
        """Reads the blocks of the windows from `first` to `last`, and drops earlier ones."""
        if self._begin_at is not None:
            self.stream.load_state_dict(self._begin_at)
            self._begin_at = None
        while self._next_block <= last // self.block_windows:
            self._positions[self._next_block] = self.stream.state_dict()
            windows = self.stream.read(self.block_windows * self.length).reshape(self.block_windows, self.length)
            key = key_of(self.seed, self._next_block)
            self._blocks[self._next_block] = windows[permute(np.arange(self.block_windows), self.block_windows, key)]
            self._next_block += 1
        for block in [block for block in self._blocks if block < first // self.block_windows]:
            del self._blocks[block], self._positions[block]

    def window(self, number: int) -> np.ndarray:
        """The ids of a window whose block was read, `(length,)`."""
        block, offset = divmod(number, self.block_windows)
        return self._blocks[block][offset]


class StreamBatches(Batches):
    """
    Global batches from a stream, or from several that are parts of one: sequence n is window `n // parts` of part
    `n % parts`. Blocks of windows come in the order of their stream, and the windows in a block are shuffled.

    Args:
        streams: the stream, or its parts.
        collator: how windows become sequences.
        batch_size: sequences of a global batch.
        block_windows: the windows in a block (default: `BLOCK_WINDOWS`). With 1, nothing is shuffled.

    Raises:
        ValueError: if the parts do not have equal shares of a batch.
    """

    def __init__(
        self,
        streams: TokenStream | Sequence[TokenStream],
        collator: Collator,
        batch_size: int,
        seed: int,
        block_windows: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        streams = [streams] if isinstance(streams, TokenStream) else streams
        if batch_size % len(streams):
            raise ValueError(
                f"train_batch_size ({batch_size}) must be divisible by stream_parts ({len(streams)}), since each part "
                f"gives as much to a batch."
            )
        self.collator = collator
        settings = collator.context_length, block_windows or BLOCK_WINDOWS
        self.parts = [StreamPart(stream, *settings, seed + number) for number, stream in enumerate(streams)]

    def epoch_of(self, step: int) -> float:
        """Whole epochs that the reading of the first part has completed; it reads ahead by up to a block."""
        return float(self.parts[0].epoch)

    def learned_tokens(self, step: int) -> int:
        return self.batch_size * self.collator.context_length

    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, count: int = 1
    ) -> Iterator[Batch]:
        """As `Batches` says; steps are asked for in order. Sequences of a part lie together, in as few processes."""
        windows, parts = np.divmod(self.sequences_of(step), len(self.parts))
        by_part = np.argsort(parts, kind="stable").reshape(num_processes, count, -1)[process_index]
        for part in np.unique(parts[by_part]):
            self.parts[part].read(int(windows[0]), int(windows[-1]))
        length = self.collator.context_length
        for sequences in by_part:
            ids = np.concatenate([self.parts[parts[i]].window(int(windows[i])) for i in sequences])
            yield self.collator.make(ids, range(0, len(ids), length))

    def state_dict(self, step: int) -> dict[str, Any]:
        """The positions of the blocks in which the batch of `step` begins. A resumed run reads on from there."""
        states = [part.position_of(self.sequences_read(step) // len(self.parts)) for part in self.parts]
        return {"parts": states} if len(states) > 1 else states[0]

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """For each part, the position of a process that has read it. Others have it as it was at their start."""
        if len(self.parts) == 1:
            return states[0]
        of_parts = zip(*(state["parts"] for state in states), strict=True)
        return {"parts": [max(positions, key=lambda position: position["block"]) for positions in of_parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continues at a position. Call `start_at` first.

        Raises:
            ValueError: for another number of parts; for an old checkpoint that has no count of sequences, if the batch
                size has changed.
        """
        states = state.get("parts", [state])
        if len(states) != len(self.parts):
            raise ValueError(
                f"The run has read its stream with --stream_parts {len(states)}, and {len(self.parts)} would give "
                f"other batches: leave it as it was."
            )
        for part, position in zip(self.parts, states, strict=True):
            if position["block"] != self._first_sequence // len(self.parts) // part.block_windows:
                raise ValueError(
                    f"The checkpoint does not say how much of the stream was read, and that was at another batch size: "
                    f"train_batch_size {self.batch_size} is not the one that the run began with."
                )
            part.go_to(position)
