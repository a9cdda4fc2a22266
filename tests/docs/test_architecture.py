"""docs/ARCHITECTURE.md is a map of what is there: what it names exists, and no package or module is left out."""

import re
from pathlib import PurePosixPath

import pytest
from helpers.programs import ROOT

PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
MAP = re.search(r"## The map\n.*?^```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[1]


def paths_on_the_map() -> list[str]:
    """Files from the root: an indented one lies in the folder of the last line that begins at the margin."""
    paths, folder = [], PurePosixPath()
    for line in MAP.splitlines():
        if line[:1].strip():
            folder = PurePosixPath()
            if start := re.match(r"[\w/]+/(?= )", line):
                folder = PurePosixPath(start[0])
                paths.append(str(folder))
        paths += [str(folder / name) for name in re.findall(r"\w+\.py\b", line)]
    return paths


def named_in_the_text() -> list[str]:
    """Paths in backticks and in the diagrams."""
    text = PAGE.replace(MAP, "")
    in_diagrams = re.findall(r"\b(?:\w+/)+\w+\.py\b", text)
    return sorted({*in_diagrams, *re.findall(r"`((?:\w+/)*\w+\.(?:py|md|yaml)|(?:\w+/)+)`", text)})


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({*paths_on_the_map(), *named_in_the_text()}))
def test_what_it_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_package_and_module_is_on_the_map() -> None:
    files = [path for pattern in ("*.py", "*_mini/**/*.py", "tokenization/**/*.py") for path in ROOT.glob(pattern)]
    packages = {str(path.parent.relative_to(ROOT)) for path in files if path.name == "__init__.py"}
    modules = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert len(packages) > 5 and len(modules) > 100
    assert sorted((packages | modules) - set(paths_on_the_map())) == []


def test_names_in_the_table_are_in_their_files() -> None:
    rows = re.search(r"## To add something\n(.*?)\n## ", PAGE, flags=re.DOTALL)[1]
    named = re.findall(r"`([\w/]+\.py)`: (?:a field of )?`(\w+)`", rows)
    named += [(path, name) for name, path in re.findall(r"`(\w+)` of `([\w/]+\.py)`", rows)]
    assert len(named) >= 8
    for path, name in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", text, flags=re.MULTILINE), f"{path} has no {name}"
