"""The order of the house: imports go down the floors, and what is installed is what is there."""

import configparser
import re
from pathlib import Path

import pytest
from sharing_mini.space import imports_of

ROOT = Path(__file__).parent.parent
FLOORS = [
    ("configuration_mini", 1),
    ("shape_mini", 1),
    ("tokenization", 1),
    ("entry_points_mini", 1),
    ("files_mini", 1),
    ("modeling_mini/analysis", 3),
    ("modeling_mini/export", 3),
    ("modeling_mini", 2),
    ("training_mini", 4),
    ("generation_mini", 4),
    ("sharing_mini", 4),
    ("train_accelerate", 5),
    ("generate", 5),
    ("push_to_hub", 5),
]
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*_mini/**/*.py"), *ROOT.glob("tokenization/**/*.py")]
)


def floor_of(name: str) -> int | None:
    """The floor of a path or dotted module of Mini; `None` for anything else."""
    name = name.replace(".", "/").removesuffix("/py")
    return next((floor for start, floor in FLOORS if name == start or name.startswith(f"{start}/")), None)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_down(path: Path) -> None:
    floor = floor_of(str(path))
    assert floor is not None, f"{path} has no floor"
    package = path.parts[0].removesuffix(".py")
    for name in imports_of(path):
        other = floor_of(name)
        if other is None:
            continue
        assert other <= floor, f"{path} (floor {floor}) imports {name} (floor {other})"
        if other == floor and name.split(".")[0] != package:
            assert floor == 1, f"{path} imports {name}, which stands on the same floor"


def test_what_is_importable_ends_in_mini_or_is_fixed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    modules = setup["options"]["py_modules"].split()
    packages = [name.removesuffix("*") for name in setup["options.packages.find"]["include"].split()]
    for name in modules + packages:
        assert name.endswith("_mini") or name in {"tokenization", "train_accelerate", "push_to_hub"}
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def test_requirements_lie_within_the_bounds_of_the_package() -> None:
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for name in ("", "-test") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    for line in (line for line in lines.splitlines() if line and not line.startswith("#")):
        requirement = Requirement(line)
        version = pinned.get(requirement.name.lower().replace("_", "-"))
        assert version is not None, f"{requirement.name} is not pinned in a requirements file"
        assert requirement.specifier.contains(version), f"{requirement} does not admit the tested {version}"


def test_no_personal_paths() -> None:
    for path in SOURCES:
        assert not re.search(r"/(home|Users|root)/\w", (ROOT / path).read_text(encoding="utf-8")), path
