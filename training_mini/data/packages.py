"""
The Python source that every machine with Mini has: the standard library, and behind it the packages that Mini requires,
whose licences allow learning from them.
"""

import importlib.metadata
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from .records import Document

# What requirements.txt names, in the order of the alphabet.
PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "filelock", "httpx2", "huggingface_hub", "matplotlib", "numpy", "peft",
    "psutil", "pyarrow", "PyYAML", "rich", "safetensors", "tokenizers", "torch", "transformers", "zstandard",
)  # fmt: skip
LICENCES = ("Apache", "BSD", "MIT", "PSF", "Python Software Foundation")
# Tests repeat each other, and copies of other packages come under other licences.
LEFT_OUT = {"test", "tests", "testing", "vendor", "_vendor", "third_party", "extern", "externals", "vendored_packages"}
LONG_LINE = 40  # characters of a line that two files hardly share by chance
LARGEST_SHARE = 0.3  # of its long lines that a file may share with those before it


def standard_library_files() -> list[Path]:
    """
    The modules of the running interpreter's standard library, without tests and installed packages.

    Raises:
        ValueError: if this Python has no source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for parent, folders, names in os.walk(root):
        # Walking through installed packages would take a second.
        folders[:] = [folder for folder in folders if folder not in left_out]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"The standard library of this Python has no source in {root}; name another --dataset.")
    return sorted(files)


def package_files() -> list[Path]:
    """
    The modules of the packages that are installed, in a fixed order, without their tests and what they copied.

    Raises:
        ValueError: for a package whose licence is not one of `LICENCES`.
    """
    files = []
    for name in PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # bitsandbytes and the like do not exist for every machine
        licence = licence_of(package)
        if not any(known in licence for known in LICENCES):
            raise ValueError(
                f"The licence of the package {name} is {licence or 'unknown'}: use --dataset python-stdlib."
            )
        sources = (file for file in package.files or () if file.suffix == ".py" and ".." not in file.parts)
        files += sorted(Path(package.locate_file(file)) for file in sources if not LEFT_OUT & set(file.parts))
    return [file for file in files if file.is_file()]


def licence_of(package: importlib.metadata.Distribution) -> str:
    """The licence that a package states: as an expression, as a classifier or as free text."""
    classifiers = [text for text in package.metadata.get_all("Classifier", []) if text.startswith("License")]
    stated = [package.metadata.get("License-Expression"), *classifiers, package.metadata.get("License")]
    return next((text.splitlines()[0] for text in stated if text), "")


def without_copies(documents: Iterable[Document], always: int) -> Iterator[Document]:
    """
    The documents that do not repeat those before them: at most `LARGEST_SHARE` of their long lines. So no copy of a
    document that is held out is learned from.

    Args:
        documents: names and pieces of bytes.
        always: how many of them, at the start, are kept in any case.
    """
    seen: set[int] = set()
    for number, (name, pieces) in enumerate(documents):
        content = b"".join(pieces)
        lines = [hash(line) for raw in content.splitlines() if len(line := raw.strip()) >= LONG_LINE]
        if number < always or sum(line in seen for line in lines) <= LARGEST_SHARE * len(lines):
            seen.update(lines)
            yield name, iter([content])
