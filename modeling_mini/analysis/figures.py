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


class Picture(Figure):
    """A figure that a notebook shows, also where nothing has told matplotlib that it is in one."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, dpi=DPI, format="png")
        return content.getvalue()


@contextlib.contextmanager
def new_figure(**kwargs: Any) -> Iterator[Picture]:
    """A figure to draw on. It needs no display. Its parts find room by themselves, unless `layout` says otherwise."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        # Not through pyplot: that would choose a backend for the whole process.
        yield Picture(**{"layout": "constrained", **kwargs})


@contextlib.contextmanager
def figure_file(path: str | os.PathLike, **kwargs: Any) -> Iterator[Picture]:
    """A figure to draw on. At the end of the context it is written to `path` as a whole."""
    with new_figure(**kwargs) as figure:
        yield figure
        write_figure(figure, Path(path))


def write_figure(figure: Picture, path: Path) -> None:
    """Writes a figure as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, figure._repr_png_())
