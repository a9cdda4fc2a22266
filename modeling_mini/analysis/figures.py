"""What all figures have in common: their style, and how they are written."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from files_mini import write_bytes
from matplotlib.figure import Figure

# Dots per inch: a figure of the width of a page then has one or two thousand pixels.
DPI = 120


@contextlib.contextmanager
def figure_file(path: str | os.PathLike, **kwargs: Any) -> Iterator[Figure]:
    """A figure to draw on. At the end of the context it is written to `path` as a whole. It needs no display."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        # Not through pyplot: that would choose a backend for the whole process.
        figure = Figure(layout="constrained", **kwargs)
        yield figure
        figure.savefig(content, dpi=DPI, format="png")
    write_bytes(path, content.getvalue())
