"""Token ids in several files (shards), so that a corpus can be larger than one disk and be copied in pieces."""

import bisect
import itertools
from pathlib import Path

import numpy as np


class ShardWriter:
    """
    Writes ids into `NAME-00000.bin`, `NAME-00001.bin`, ... of at most `shard_tokens` ids each.

    Attributes:
        lengths: how many ids are in each file so far.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.lengths: list[int] = []
        self._file = None

    def write(self, ids: np.ndarray) -> None:
        """Appends ids, `(tokens,)`."""
        while len(ids):
            if self._file is None or self.lengths[-1] == self.shard_tokens:
                self.close()
                self._file = open(self.folder / shard_name(self.name, len(self.lengths)), "wb")  # noqa: SIM115 (closed by `close`)
                self.lengths.append(0)
            part = ids[: self.shard_tokens - self.lengths[-1]]
            self._file.write(part.astype(self.dtype, copy=False).tobytes())
            self.lengths[-1] += len(part)
            ids = ids[len(part) :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def shard_name(name: str, number: int) -> str:
    return f"{name}-{number:05}.bin"


class ShardedIds:
    """
    The ids of several memory-mapped files as one array, `(tokens,)`. A slice within one file copies nothing.

    Args:
        lengths: how many ids are in each file.

    Raises:
        ValueError: if a file is missing or has another size. The error names it.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype | str, lengths: list[int]) -> None:
        self.dtype = np.dtype(dtype)
        self._ends = list(itertools.accumulate(lengths))
        self._parts = []
        for number, length in enumerate(lengths):
            path = folder / shard_name(name, number)
            size = path.stat().st_size if path.is_file() else -1
            if size != length * self.dtype.itemsize:
                found = f"has {size:,} bytes" if size >= 0 else "is missing"
                raise ValueError(f"The shard {path} {found}; {length * self.dtype.itemsize:,} bytes belong there.")
            self._parts.append(np.memmap(path, dtype=self.dtype, mode="r", shape=(length,)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, stride = window.indices(len(self))
        if stride != 1:
            raise ValueError("Token ids are read forwards, without gaps.")
        pieces = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            offset = self._ends[number] - len(self._parts[number])
            piece = self._parts[number][start - offset : stop - offset]
            pieces.append(piece)
            start += len(piece)
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)
