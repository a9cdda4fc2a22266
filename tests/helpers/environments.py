"""Virtual environments that find the libraries of the tests, so that pip need not write their 29,000 files again."""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


def lend_libraries(environment: Path, names: Iterable[str], folder: Path) -> None:
    """
    Lets a virtual environment, also one that is not made yet, import libraries of the tests. For pip they are installed
    there: it checks their versions, and where one does not fit, it installs another one beside it.

    Args:
        names: of the distributions.
        folder: a new one, for links to them. Not in the environment: pip removes nothing that lies outside.
    """
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        files = (distribution.read_text("RECORD") or "").splitlines()
        for entry in {file.split(",")[0].split("/")[0] for file in files} - {"..", "__pycache__"}:
            with contextlib.suppress(FileExistsError):  # two distributions share a folder
                (folder / entry).symlink_to(distribution.locate_file(entry))
    packages = environment / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / f"{folder.name}.pth").write_text(f"{folder}\n")


def installed_for(requirements: Iterable[str]) -> set[str]:
    """The names of the installed distributions that these requirements ask for, and those ask for in their turn."""
    names, left, seen = set(), list(requirements), set()
    while left:
        if (line := left.pop()) in seen:
            continue
        seen.add(line)
        requirement = Requirement(line)
        try:
            asked = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # pip will install it
        names.add(requirement.name)
        for other in asked:
            marker = Requirement(other).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}):
                left.append(other.partition(";")[0])
    return names
