"""What a caller in Python adds to a run, or puts in the place of Mini's own parts; docs/EXTENDING.md shows each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A number of one's own that is computed at each evaluation.
Metric = Callable[["PreTrainedModel", "PreTrainedTokenizerBase"], float]


@dataclass(frozen=True)
class Hooks:
    """
    Attributes:
        model: the model to train, or the class of a new one.
        data: what to learn from, in the place of `dataset`.
        callbacks: objects with methods of the names and arguments of transformers' `TrainerCallback`.
        metrics: numbers to compute at each evaluation, by name.
        is_quiet: whether the run prints nothing.
    """

    model: "PreTrainedModel | type[PreTrainedModel] | None" = None
    data: Iterable[Any] | None = None
    callbacks: tuple[object, ...] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    is_quiet: bool = False

    @property
    def has_model(self) -> bool:
        """Whether there is a model, and not only its class."""
        return self.model is not None and not isinstance(self.model, type)


NO_HOOKS = Hooks()
