"""
Counts what a test has made, because a mixin that finds nothing to do passes too.

Counted are models, configurations and tokenizers of Mini, in this process and in the ranks that a test starts.
"""

import functools
from collections import Counter
from collections.abc import Mapping

from configuration_mini import MiniConfig
from modeling_mini import MiniPreTrainedModel
from tokenization import MiniTokenizer

_counts: Counter[str] = Counter()


# What is counted, and the method that runs once for each. A configuration's `__init__` is the dataclass's own.
_COUNTED = {
    "models": (MiniPreTrainedModel, "__init__"),
    "configurations": (MiniConfig, "__post_init__"),
    "tokenizers": (MiniTokenizer, "__init__"),
}


def _count_calls(cls: type, method: str, what: str) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def counted(self, *args, **kwargs) -> None:
        _counts[what] += 1
        original(self, *args, **kwargs)

    counted.counts_constructions = True
    setattr(cls, method, counted)


def start() -> None:
    """Counts from zero."""
    for what, (cls, method) in _COUNTED.items():
        if not hasattr(getattr(cls, method), "counts_constructions"):
            _count_calls(cls, method, what)
    _counts.clear()


def add(counts: Mapping[str, int]) -> None:
    """Adds what another process has counted."""
    _counts.update(counts)


def counts() -> dict[str, int]:
    """How many of each there were since `start`."""
    return dict(_counts)
