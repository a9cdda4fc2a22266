"""The Python source that every machine with Mini has."""

import itertools
import re
from pathlib import Path

import pytest
from helpers.programs import ROOT
from training_mini.arguments import DataArguments
from training_mini.data import packages
from training_mini.data.packages import package_files, standard_library_files, without_copies
from training_mini.data.sources import open_source

LINES = [f"    value_{number} = compute_the_value_of_number({number})".encode() for number in range(10)]


def kept(*contents: bytes, always: int = 0) -> list[int]:
    documents = ((str(number), iter([content])) for number, content in enumerate(contents))
    return [int(name) for name, _ in without_copies(documents, always)]


def test_they_are_the_packages_of_requirements_txt() -> None:
    required = re.findall(r"^(\S+?)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(required) == sorted(packages.PACKAGES)


@pytest.mark.slow
def test_the_standard_library_comes_first_and_as_it_is() -> None:
    library = standard_library_files()
    documents = open_source(DataArguments(dataset="python-packages")).read()
    first = [(name, b"".join(pieces)) for name, pieces in itertools.islice(documents, len(library))]
    assert first == [(str(file), file.read_bytes()) for file in library]
    name, _ = next(documents)
    assert name == str(next(file for file in package_files() if str(file) == name))


@pytest.mark.slow
def test_tests_and_copies_of_others_are_left_out() -> None:
    folders = {part for file in package_files() for part in file.parts}
    assert {"torch", "transformers", "numpy", "rich"} <= folders
    assert not folders & {"tests", "testing", "_vendor", "third_party"}


def test_what_repeats_earlier_documents_is_left_out() -> None:
    whole = b"\n".join(LINES)
    assert kept(whole, whole) == [0]
    assert kept(whole, b"# indented otherwise\n" + whole.replace(b"    ", b"\t")) == [0]
    own = [line.replace(b"value", b"other") for line in LINES]
    assert kept(whole, b"\n".join([*LINES[:3], *own[:7]])) == [0, 1]  # 30 % of the lines
    assert kept(whole, b"\n".join([*LINES[:4], *own[:6]])) == [0]
    assert kept(whole, b"x = 1\n", b"x = 1\n") == [0, 1, 2]  # short lines are alike by chance
    assert kept(whole, whole, whole, always=2) == [0, 1]


def test_a_licence_that_does_not_allow_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "secret-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: secret\nVersion: 1\nLicense-Expression: GPL-3.0-only\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "PACKAGES", ("secret",))
    with pytest.raises(ValueError, match=r"The licence of the package secret is GPL-3\.0-only"):
        package_files()
    monkeypatch.setattr(packages, "PACKAGES", ("not-installed-anywhere",))
    assert package_files() == []
