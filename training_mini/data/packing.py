"""
Rows of whole examples. As many as fit share a row, in the order of the data, and none sees another: each begins at
position 0. Which examples share a row never changes; the order of the rows is a function of (seed, step), as in
`batches.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .batches import NOT_LEARNED, Batch, SequenceOrder, key_of, permute
from .conversations import Examples


class ExampleRows:
    """
    How examples become rows.

    Args:
        context_length: tokens of a row. Of a longer example the beginning is learned.
        said_only: whether only what the model is to say counts, or every token.

    Attributes:
        learned_tokens: the targets in each row that count, `(rows,)`.
        too_long: how many examples were cut.
        left_out: how many have nothing to learn, once they are cut.

    Raises:
        ValueError: if no example has anything to learn.
    """

    def __init__(self, examples: Examples, context_length: int, pad_token_id: int, said_only: bool) -> None:
        self.examples, self.context_length = examples, context_length
        self.pad_token_id, self.said_only = pad_token_id, said_only
        self.too_long = self.left_out = 0
        self._rows: list[list[int]] = []
        counts: list[int] = []
        room = 0
        for number in range(len(examples)):
            span = examples.span(number)
            length = min(span.stop - span.start - 1, context_length)  # the last id is no input
            learned = int(self._is_learned(number).sum())
            self.too_long += span.stop - span.start - 1 > context_length
            if not learned:
                self.left_out += 1
                continue
            if length > room:
                self._rows.append([])
                counts.append(0)
                room = context_length
            self._rows[-1].append(number)
            counts[-1] += learned
            room -= length
        if not self._rows:
            raise ValueError(
                f"None of the {len(examples)} examples has anything to learn within a context of {context_length} "
                f"tokens: nothing in them is said by the assistant, or they are too long."
            )
        self.learned_tokens = np.array(counts)

    def __len__(self) -> int:
        return len(self._rows)

    def _is_learned(self, number: int) -> np.ndarray:
        """For each target of an example, whether it counts."""
        is_said = self.examples.is_said[self.examples.span(number, self.context_length + 1)][1:].astype(bool)
        return is_said if self.said_only else np.ones_like(is_said)

    def targets(self, row: int) -> np.ndarray:
        """The ids of a row that are learned, in order."""
        return np.concatenate(
            [
                self.examples.ids[self.examples.span(number, self.context_length + 1)][1:][self._is_learned(number)]
                for number in self._rows[row]
            ]
        )

    def make(self, rows: Sequence[int]) -> Batch:
        """A batch of these rows. What follows the last example of a row is padding, apart from it as examples are."""
        shape = len(rows), self.context_length
        inputs = np.full(shape, self.pad_token_id, dtype=np.int64)
        targets = np.full(shape, NOT_LEARNED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(rows):
            place = 0
            for number in self._rows[row]:
                ids = self.examples.ids[self.examples.span(number, self.context_length + 1)].astype(np.int64)
                here = slice(place, place + len(ids) - 1)
                inputs[i, here] = ids[:-1]
                targets[i, here] = np.where(self._is_learned(number), ids[1:], NOT_LEARNED)
                positions[i, here] = np.arange(len(ids) - 1)
                place = here.stop
            positions[i, place:] = np.arange(self.context_length - place)
        tensors = {"input_ids": torch.from_numpy(inputs), "position_ids": torch.from_numpy(positions)}
        return Batch(tensors, torch.from_numpy(targets))

    def notes(self) -> str:
        """What is to be known of examples that could not be taken as they are; nothing if all could."""
        sentences = []
        if self.too_long:
            sentences.append(f"Examples longer than the context, learned up to there: {self.too_long:,}.")
        if self.left_out:
            sentences.append(f"Examples with nothing to learn in them, left out: {self.left_out:,}.")
        return " ".join(sentences)

    def prompt(self, number: int) -> np.ndarray:
        """The ids of an example up to the first that the model is to say."""
        span = self.examples.span(number)
        is_said = self.examples.is_said[span].astype(bool)
        return self.examples.ids[span][: int(is_said.argmax())] if is_said.any() else self.examples.ids[span]


class ExampleBatches(SequenceOrder):
    """Global batches of rows of examples: an epoch has every row once, in an order that a keyed permutation gives."""

    def __init__(self, rows: ExampleRows, batch_size: int, seed: int) -> None:
        super().__init__(batch_size)
        self.rows, self.seed = rows, seed

    def epoch_of(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self.sequences_read(step) / len(self.rows)

    def row_numbers(self, step: int) -> np.ndarray:
        """The rows of a global batch, `(batch_size,)`."""
        epochs, positions = np.divmod(self.sequences_of(step), len(self.rows))
        numbers = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = permute(positions[here], len(self.rows), key_of(self.seed, int(epoch)))
        return numbers

    def learned_tokens(self, step: int) -> int:
        """The tokens of a global batch that the loss is a mean over."""
        return int(self.rows.learned_tokens[self.row_numbers(step)].sum())

    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, parts: int = 1
    ) -> Iterator[Batch]:
        """The share of one process in the batch of a step, in `parts`."""
        for rows in self.row_numbers(step).reshape(parts, num_processes, -1)[:, process_index]:
            yield self.rows.make(rows)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing: the batch of a step is a function of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class HeldOutExamples:
    """Examples that are never trained on: the first `max_tokens` tokens of their rows (0: all), see `HeldOut`."""

    def __init__(self, rows: ExampleRows, bytes_per_token: np.ndarray, max_tokens: int) -> None:
        self.rows = rows
        self.count = min(len(rows), max(1, max_tokens // rows.context_length)) if max_tokens else len(rows)
        self.ids = np.concatenate([rows.targets(row) for row in range(self.count)])
        self.bytes = max(1, int(bytes_per_token[self.ids].sum()))

    def groups(self, process: int, num_processes: int, share: int) -> list[list[int]]:
        mine = list(range(process, self.count, num_processes))
        return [mine[i : i + share] for i in range(0, len(mine), share)]

    def make(self, group: list[int]) -> Batch:
        return self.rows.make(group)

    def windows(self, count: int) -> torch.Tensor:
        return self.rows.make(range(min(count, self.count))).inputs["input_ids"]
