"""
Packs whole examples into sequences. As many as fit share a sequence, in the order of the data. They do not see each
other, because each begins at position 0. Which examples share a sequence never changes. The order of the sequences is a
function of (seed, step), as in `batches.py`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .batches import NOT_LEARNED, Batch, Batches, key_of, permute
from .conversations import Examples


class ExampleCollator:
    """
    How examples become sequences.

    Args:
        context_length: the tokens of a sequence. Of a longer example only the beginning is learned.
        assistant_only: whether only what the model should write is learned, or every token.

    Attributes:
        learned_tokens: how many targets are learned in each sequence, `(sequences,)`.
        too_long: how many examples were cut.
        left_out: how many examples have nothing to learn after they were cut.

    Raises:
        ValueError: if no example has anything to learn.
    """

    def __init__(self, examples: Examples, context_length: int, pad_token_id: int, assistant_only: bool) -> None:
        self.examples, self.context_length = examples, context_length
        self.pad_token_id, self.assistant_only = pad_token_id, assistant_only
        self.too_long = self.left_out = 0
        self._sequences: list[list[int]] = []  # the numbers of the examples in each
        counts: list[int] = []
        capacity = 0
        for number in range(len(examples)):
            span = examples.span(number)
            length = min(span.stop - span.start - 1, context_length)  # the last id is only a target
            learned = int(self._is_learned(number).sum())
            self.too_long += span.stop - span.start - 1 > context_length
            if not learned:
                self.left_out += 1
                continue
            if length > capacity:
                self._sequences.append([])
                counts.append(0)
                capacity = context_length
            self._sequences[-1].append(number)
            counts[-1] += learned
            capacity -= length
        if not self._sequences:
            raise ValueError(
                f"None of the {len(examples)} examples has anything to learn within a context of {context_length} "
                f"tokens: the assistant says nothing in them, or they are too long."
            )
        self.learned_tokens = np.array(counts)

    def __len__(self) -> int:
        return len(self._sequences)

    def _is_learned(self, number: int) -> np.ndarray:
        """For each target of an example, whether it is learned."""
        mask = self.examples.assistant_mask[self.examples.span(number, self.context_length + 1)][1:].astype(bool)
        return mask if self.assistant_only else np.ones_like(mask)

    def targets(self, sequence: int) -> np.ndarray:
        """The ids of a sequence that are learned, in order, `(tokens,)`."""
        return np.concatenate(
            [
                self.examples.ids[self.examples.span(number, self.context_length + 1)][1:][self._is_learned(number)]
                for number in self._sequences[sequence]
            ]
        )

    def make(self, numbers: Sequence[int]) -> Batch:
        """
        A batch of the sequences with these numbers. The padding after the last example begins at position 0 too, so it
        and the examples do not see each other.
        """
        shape = len(numbers), self.context_length
        inputs = np.full(shape, self.pad_token_id, dtype=np.int64)
        targets = np.full(shape, NOT_LEARNED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for i, number in enumerate(numbers):
            end = 0
            for example in self._sequences[number]:
                ids = self.examples.ids[self.examples.span(example, self.context_length + 1)].astype(np.int64)
                here = slice(end, end + len(ids) - 1)
                inputs[i, here] = ids[:-1]
                targets[i, here] = np.where(self._is_learned(example), ids[1:], NOT_LEARNED)
                positions[i, here] = np.arange(len(ids) - 1)
                end = here.stop
            positions[i, end:] = np.arange(self.context_length - end)
        tensors = {"input_ids": torch.from_numpy(inputs), "position_ids": torch.from_numpy(positions)}
        return Batch(tensors, torch.from_numpy(targets))

    def notes(self) -> str:
        """Sentences about examples that were cut or left out; empty if there are none."""
        sentences = []
        if self.too_long:
            sentences.append(f"Examples longer than the context, learned up to there: {self.too_long:,}.")
        if self.left_out:
            sentences.append(f"Examples with nothing to learn in them, left out: {self.left_out:,}.")
        return " ".join(sentences)

    def prompt(self, number: int) -> np.ndarray:
        """The ids of an example before the first that the model should write, `(tokens,)`."""
        span = self.examples.span(number)
        mask = self.examples.assistant_mask[span].astype(bool)
        return self.examples.ids[span][: int(mask.argmax())] if mask.any() else self.examples.ids[span]


class ExampleBatches(Batches):
    """The global batches of packed examples. A keyed permutation gives the order of the sequences in each epoch."""

    def __init__(self, collator: ExampleCollator, batch_size: int, seed: int) -> None:
        super().__init__(batch_size)
        self.collator, self.seed = collator, seed

    def epoch_of(self, step: int) -> float:
        return self.sequences_read(step) / len(self.collator)

    def sequence_numbers(self, step: int) -> np.ndarray:
        """The numbers of the sequences of a global batch, `(batch_size,)`."""
        epochs, positions = np.divmod(self.sequences_of(step), len(self.collator))
        numbers = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = permute(positions[here], len(self.collator), key_of(self.seed, int(epoch)))
        return numbers

    def learned_tokens(self, step: int) -> int:
        return int(self.collator.learned_tokens[self.sequence_numbers(step)].sum())

    def micro_batches(
        self, step: int, process_index: int = 0, num_processes: int = 1, count: int = 1
    ) -> Iterator[Batch]:
        for numbers in self.sequence_numbers(step).reshape(count, num_processes, -1)[:, process_index]:
            yield self.collator.make(numbers)

    def notes(self) -> str:
        return self.collator.notes()


class HeldOutExamples:
    """Held-out examples: the first `max_tokens` tokens of their sequences, or all of them with 0. See `HeldOut`."""

    def __init__(self, collator: ExampleCollator, bytes_per_token: np.ndarray, max_tokens: int) -> None:
        self.collator = collator
        count = len(collator)
        self.count = min(count, max(1, max_tokens // collator.context_length)) if max_tokens else count
        self.ids = np.concatenate([collator.targets(number) for number in range(self.count)])
        self.bytes = max(1, int(bytes_per_token[self.ids].sum()))

    def groups(self, process: int, num_processes: int, share: int) -> list[list[int]]:
        mine = list(range(process, self.count, num_processes))
        return [mine[i : i + share] for i in range(0, len(mine), share)]

    def make(self, group: list[int]) -> Batch:
        return self.collator.make(group)

    def windows(self, count: int) -> torch.Tensor:
        return self.collator.make(range(min(count, self.count))).inputs["input_ids"]
