"""Modules of a folder that only some tests import."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """
    The modules of this folder can be imported. Afterwards they are forgotten: a later test that writes a module of
    the same name must get its own.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name, module in sys.modules.items() if lies_in(module, folder)]:
            del sys.modules[name]


def lies_in(module: object, folder: Path) -> bool:
    """Whether the module was read from this folder."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)
