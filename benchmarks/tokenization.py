"""
Encoding speed of the raw path that corpora take, beside the tokenizer itself, in one run and in turns.

    python benchmarks/tokenization.py [--text FILE] [--megabytes 64] [--rounds 7]

Medians in MB/s; the last line is JSON.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich.console import Console
from rich.table import Table

from measuring import OutputSettings, run_benchmark, settings_of  # isort: skip


@dataclass
class Settings(OutputSettings):
    """What is encoded, and how often."""

    text: str | None = option(None, "UTF-8 file to encode (default: the generated sample)")
    megabytes: int = option(64, "size to repeat the text to", at_least=1)
    rounds: int = option(7, "how often each way has its turn; the median counts", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and not Path(self.text).is_file():
            raise ValueError(f"There is no file {self.text!r} to encode.")


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

from tokenization import ByteTokenizer, CharTokenizer
from training_mini.data.encoding import encode_chunks, number_of_processors
from training_mini.data.formats import PIECE_SIZE
from training_mini.data.samples import sample_documents


def measure(settings: Settings) -> dict[str, Any]:
    text = Path(settings.text).read_bytes() if settings.text else b"".join(b"".join(p) for _, p in sample_documents())
    data = text * -(-settings.megabytes * 10**6 // len(text))
    # Whole repetitions in each piece, so that none ends inside a character.
    per_piece = max(1, PIECE_SIZE // len(text)) * len(text)
    pieces = [data[i : i + per_piece] for i in range(0, len(data), per_piece)]
    byte, char = ByteTokenizer(), CharTokenizer.from_text(text.decode("utf-8"))
    bpe = byte.train_new_from_iterator([text[: 16 * 10**6].decode("utf-8", "ignore")], 2048)
    chunks = [("train", data[i : i + 2**20]) for i in range(0, len(data), 2**20)]
    processes = f"learned merges, {number_of_processors()} processes"
    small = text[: 2**20].decode("utf-8", "ignore")
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "bytes, raw path": (lambda: [byte.encode_corpus(piece) for piece in pieces], len(data)),
        "characters, raw path": (lambda: [char.encode_corpus(piece) for piece in pieces], len(data)),
        "learned merges, raw path": (lambda: [bpe.encode_corpus(chunk) for _, chunk in chunks], len(data)),
        processes: (lambda: list(encode_chunks(bpe, chunks)), len(data)),
        "bytes, tokenizer": (lambda: byte(small, add_special_tokens=False), len(small.encode())),
        "characters, tokenizer": (lambda: char(small, add_special_tokens=False), len(small.encode())),
        "learned merges, tokenizer": (lambda: bpe(small, add_special_tokens=False), len(small.encode())),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(settings.rounds + 1):
        for name, (encode, _) in ways.items():
            start = time.perf_counter()
            encode()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: size / statistics.median(seconds[name]) / 1e6 for name, (_, size) in ways.items()}
    return {"megabytes_per_second": {name: round(speed, 1) for name, speed in speeds.items()}}


def show(results: dict[str, Any], settings: Settings) -> None:
    table = Table("", "MB/s", title="Encoding a corpus")
    for name, speed in results["megabytes_per_second"].items():
        table.add_row(name, f"{speed:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
