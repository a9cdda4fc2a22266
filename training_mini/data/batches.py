"""
The order of the data: a pure function of (seed, step).

The training ids are cut into windows of one context. An epoch visits every window once. A keyed permutation gives the
window at any position of that order. So to find the batch of step N takes the same time for any N and any size of the
corpus, and a resumed run does not have to repeat anything. Each epoch cuts at another offset, so the borders of windows
change. The number of processes decides only which sequences of a batch each of them computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .shards import ShardedIds

NOT_LEARNED = -100  # the target that the losses of torch and transformers ignore
_FEISTEL_ROUNDS = 4


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): maps 64-bit integers to others that look random."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*numbers: int) -> np.uint64:
    """One 64-bit key from several integers."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        with np.errstate(over="ignore"):
            key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.uint64(number % 2**64))
    return key[0]


def permute(positions: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """
    Where `positions` go in a permutation of range(size) that `key` selects.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the range up to the next power of four. A result outside
    range(size) is permuted again until it is inside (cycle walking, Black and Rogaway 2002), on average less than four
    times.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64(2 ** int(half_bits) - 1)
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        values = result[outside]
        left, right = values >> half_bits, values & mask
        for round_number in range(_FEISTEL_ROUNDS):
            round_key = key_of(int(key), round_number)
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        result[outside] = (left << half_bits) | right
        outside = result >= size
    return result.astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """
    Attributes:
        inputs: the arguments of the model: `input_ids`, and `position_ids` if documents in a sequence do not see each
            other; each `(sequences, length)`.
        targets: the token that follows each input, or -100 where nothing is learned, `(sequences, length)`.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.to(device, non_blocking=True))


@dataclass(frozen=True)
class Collator:
    """
    How windows of token ids become the sequences of a batch.

    Attributes:
        context_length: the tokens of a sequence.
        bos_token_id: the first input of every sequence. So a window begins like a prompt, and its first token is
            predicted too.
        separator_id: if given (eos), documents in a sequence do not see each other. After this id a document begins
            with bos and with position 0. Where positions begin again at 0, every attention of transformers sees the end
            of a document.
    """

    context_length: int
    bos_token_id: int
    separator_id: int | None = None

    def make(self, ids: np.ndarray, starts: Sequence[int], length: int | None = None) -> Batch:
        """A sequence for each window of `ids` that begins at one of `starts`, of `length` (one context by default)."""
        length = length or self.context_length
        targets = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[:, 0] = self.bos_token_id
        inputs[:, 1:] = targets[:, :-1]
        if self.separator_id is None:
            return Batch({"input_ids": torch.from_numpy(inputs)}, torch.from_numpy(targets))
        begins = np.zeros_like(inputs, dtype=bool)
        begins[:, 1:] = targets[:, :-1] == self.separator_id
        inputs[begins] = self.bos_token_id
        positions = np.broadcast_to(np.arange(length), inputs.shape)
        positions = positions - np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        tensors = {"input_ids": torch.from_numpy(inputs), "position_ids": torch.from_numpy(positions)}
        return Batch(tensors, torch.from_numpy(targets))


class Batches(ABC):
    """
    The global batches of a run, one for each step.

    Sequences are numbered from 0, through all epochs. With one batch size, the numbers in a step follow from the step.
    After a resume with another batch size, they follow from how many sequences were read before it.

    Args:
        batch_size: the sequences in a global batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._first_step = self._first_sequence = 0

    def start_at(self, step: int, sequences: int) -> None:
        """Continues after `step` steps, which have read `sequences`."""
        self._first_step, self._first_sequence = step, sequences

    def sequences_read(self, step: int) -> int:
        """How many sequences the first `step` steps read."""
        return self._first_sequence + (step - self._first_step) * self.batch_size

    def sequences_of(self, step: int) -> np.ndarray:
        """The numbers of the sequences of a global batch, `(batch_size,)`."""
        return np.arange(self.sequences_read(step), self.sequences_read(step + 1))

    @abstractmethod
    def epoch_of(self, step: int) -> float:
        """How many epochs the first `step` steps are, with fractions."""

    @abstractmethod
    def learned_tokens(self, step: int) -> int:
        """How many tokens of a global batch are learned; the loss is the mean over them."""

    @abstractmethod
    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, count: int = 1
    ) -> Iterator[Batch]:
        """The part of the batch of a step that one process reads, in `count` micro-batches."""

    def notes(self) -> str:
        """Sentences about data that could not be used completely; empty if all of it is used."""
        return ""

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint at `step` must contain about the data: nothing, if batches are a function of the step."""
        return {}

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The one state of the run, from those of all processes."""
        return states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have nothing to load)
        """Continues at the position of a state."""


class TrainingBatches(Batches):
    """
    The batches of encoded text.

    Args:
        ids: training token ids, `(tokens,)`.
        collator: how windows become sequences.
        batch_size: sequences of a global batch.

    Raises:
        ValueError: if there are fewer ids than one context.
    """

    def __init__(self, ids: np.ndarray | ShardedIds, collator: Collator, batch_size: int, seed: int) -> None:
        context_length = collator.context_length
        if len(ids) < context_length:
            raise ValueError(
                f"The training text has {len(ids)} tokens, less than one context of {context_length}: "
                f"use more text or a smaller --max_position_embeddings."
            )
        self.ids = ids
        self.collator = collator
        self.context_length = context_length
        super().__init__(batch_size)
        self.seed = seed
        # One window fewer than there are, so that the cuts can be shifted by up to a context.
        self.windows_per_epoch = max(1, len(ids) // context_length - 1)

    def epoch_of(self, step: int) -> float:
        return self.sequences_read(step) / self.windows_per_epoch

    def starts(self, step: int) -> np.ndarray:
        """The positions in `ids` at which the sequences of a global batch begin, `(batch_size,)`."""
        epochs, positions = np.divmod(self.sequences_of(step), self.windows_per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        slack = min(self.context_length - 1, len(self.ids) - self.windows_per_epoch * self.context_length)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = key_of(self.seed, int(epoch))
            offset = int(key_of(int(key))) % (slack + 1)
            starts[here] = offset + permute(positions[here], self.windows_per_epoch, key) * self.context_length
        return starts

    def learned_tokens(self, step: int) -> int:
        return self.batch_size * self.context_length

    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, count: int = 1
    ) -> Iterator[Batch]:
        for starts in self.starts(step).reshape(count, num_processes, -1)[:, process_index]:
            yield self.collator.make(self.ids, starts)
