"""What comes out of a run, for the program that reports it and for people who train from Python."""

import functools
import importlib.util
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files_mini import find_checkpoint
from modeling_mini.loading.checkpoints import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .build import Run
from .evaluation import Evaluation
from .model_folders import at_best
from .monitoring import curves_of, read_metrics

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False, eq=False)
class TrainingResult:
    """
    The result of a run.

    Attributes:
        run: the parts of the run.
        stopped_by: the signal that stopped it, or `None`. Then there are no evaluation and no samples.
        seconds: how long this call took.
        start_step: the step that the run was resumed at; 0 for a new one.
        evaluation: the last one.
        samples: what the model wrote at the end, one text for each prompt.
        valid_functions: of a corpus of Python, the share of functions by the model that are valid, from 0 to 1.
    """

    run: Run
    stopped_by: int | None
    seconds: float
    start_step: int
    evaluation: Evaluation | None
    samples: list[str] = field(default_factory=list)
    valid_functions: float | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run: metrics, curves, checkpoints, and the folders `best` and `final`."""
        return self.run.folder

    @property
    def best(self) -> Path:
        """The checkpoint folder of the best model, to load, share and write with; the newest where there is no best."""
        return Path(find_checkpoint(str(self.folder)))

    @property
    def final(self) -> Path:
        """The checkpoint folder of the last model."""
        return self.folder / "final"

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """
        The best model, loaded from `best` when it is first asked for, in evaluation mode. An adapter is on its base.

        Raises:
            ValueError: if the run was stopped before it had saved a model.
        """
        model, _ = load_model(str(self.best))
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.run.corpus.tokenizer

    @property
    def metrics(self) -> "pandas.DataFrame | list[dict[str, float]]":
        """The lines of `metrics.jsonl`: a DataFrame where pandas is installed, and else a list of records."""
        records = read_metrics(self.folder)
        if importlib.util.find_spec("pandas") is None:
            return records
        import pandas  # loads for half a second

        return pandas.DataFrame.from_records(records)

    @property
    def curves(self) -> "Figure | None":
        """The curves as a figure of matplotlib, which a notebook shows; `None` before the first log line."""
        return curves_of(self.folder, self.run.title, self.run.compressors)

    @property
    def best_evaluation(self) -> Evaluation | None:
        """The figures of the best step."""
        return at_best(self.run.state, self.evaluation)[1] if self.evaluation is not None else None

    @property
    def loss(self) -> float | None:
        """The validation loss of the best step, in nats per token."""
        return self.best_evaluation.loss if self.evaluation is not None else None

    @property
    def bits_per_byte(self) -> float | None:
        """The bits per byte of the best step on the held-out text."""
        return self.best_evaluation.bits_per_byte if self.evaluation is not None else None

    def __repr__(self) -> str:
        state = self.run.state
        last = f", the last {state.step - self.start_step}" if self.start_step else ""
        about: list[Any] = [f"{str(self.folder)!r}", f"{state.step} steps{last} in {self.seconds:.1f} s"]
        if self.stopped_by is not None:
            about.append(f"stopped by {signal.Signals(self.stopped_by).name}: resume=True goes on")
        elif self.evaluation is not None:
            about.append(f"{self.bits_per_byte:.3f} bits per byte at step {state.best_step}")
        return f"TrainingResult({', '.join(about)})"
