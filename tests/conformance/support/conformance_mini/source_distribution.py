"""
Fetches the source distribution of the installed transformers and makes its test modules importable.

The distribution carries `tests/test_*.py`, where the mixins are, and none of the folders beside them. The few modules
that the mixins import from those folders are written anew in `support/transformers_tests`; both halves together are
the package `transformers_tests`.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

# Goes into the folder's name: a cache of another layout is not read.
LAYOUT = 1

# The package's second half is found by its name along sys.path.
PACKAGE_INIT = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"

# TokenizerTesterMixin reads a text file that the distribution leaves out. Any text of a few paragraphs serves.
SAMPLE_TEXT = "The tide came in.\n\nNobody had moved the boats, and by noon they were afloat.\n\nThen it went out.\n"


class SuiteUnavailableError(Exception):
    """The source distribution is neither in the cache nor to be had from pip."""


def cache_folder() -> Path:
    """`$MINI_CONFORMANCE_CACHE`, else `mini-conformance` in the user's cache folder: it outlives a run of the tests."""
    if folder := os.environ.get("MINI_CONFORMANCE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-conformance"


def fetched_suite() -> Path:
    """
    The folder that holds the package `transformers_tests`, fetched if it is not in the cache.

    Raises:
        SuiteUnavailableError: one sentence, if pip cannot fetch it.
    """
    release = version("transformers")
    cache = cache_folder()
    folder = cache / f"transformers-{release}-tests-{LAYOUT}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=cache) as work:
            archive = _download(release, Path(work))
            complete = Path(work, folder.name)
            _unpack(archive, complete)
            complete.rename(folder)
    return folder


def _download(release: str, work: Path) -> Path:
    # --no-binary for transformers alone: what pip needs to read its metadata may come as wheels.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(work), f"transformers=={release}"]
    result = subprocess.run(command, capture_output=True, text=True)
    archive = work / f"transformers-{release}.tar.gz"
    if result.returncode or not archive.is_file():
        said = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()[-1]
        raise SuiteUnavailableError(
            f"The conformance tests need the source distribution of transformers {release}, and pip could not fetch it "
            f"({said}): run them once where pip reaches a package index, and it stays in {cache_folder()}."
        )
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    package = folder / "transformers_tests"
    (package / "fixtures").mkdir(parents=True)
    with tarfile.open(archive) as distribution:
        for member in distribution:
            _, *path = member.name.split("/")
            if len(path) == 2 and path[0] == "tests" and path[1].endswith(".py") and member.isfile():
                (package / path[1]).write_bytes(distribution.extractfile(member).read())
    (package / "__init__.py").write_text(PACKAGE_INIT)
    (package / "fixtures" / "sample_text.txt").write_text(SAMPLE_TEXT)
    # The models that test_pipeline_mixin.py knows by name; the tests put Mini's in its place.
    (folder / "tests" / "utils").mkdir(parents=True)
    (folder / "tests" / "utils" / "tiny_model_summary.json").write_text("{}\n")
    # test_pipeline_mixin.py executes the file at this place and then takes the transformers that is imported already.
    # An empty file leaves the installed one there.
    (folder / "src" / "transformers").mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").touch()
