"""What the figures share."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# For figures that are seen at the size of a page: a thousand pixels or two.
DPI = 120


@contextlib.contextmanager
def figure_file(path: str | os.PathLike, **kwargs: Any) -> Iterator[Figure]:
    """A figure that is drawn without a display, and written beside `path` and renamed when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        # Not through pyplot: that would choose a backend for the whole process.
        figure = Figure(layout="constrained", **kwargs)
        yield figure
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, dpi=DPI, format="png")
        partial.replace(path)
