"""The order of the house: the floors and folders, imports that go down and never in a circle, and what is installed."""

import ast
import configparser
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each module of the root, package, and folder of a package that stands on a floor of its own.
FLOORS = {
    "shape_mini": 1, "configuration_mini": 1, "tokenization": 1, "files_mini": 1, "entry_points_mini": 1,
    "cards_mini": 1, "installation_mini": 1, "memory_mini": 1,
    "modeling_mini": 2,
    "modeling_mini/analysis": 3, "modeling_mini/export": 3, "modeling_mini/web": 3,
    "training_mini": 4, "generation_mini": 4, "sharing_mini": 4,
    "train_accelerate": 5, "generate": 5, "push_to_hub": 5,
    "box_mini": 5,
}  # fmt: skip
# The folders of each package that hold modules.
FOLDERS = {
    "box_mini": set(),
    "tokenization": set(),
    "modeling_mini": {"loading", "analysis", "export", "web"},
    "training_mini": {"data"},
    "generation_mini": {"demo", "serving"},
    "sharing_mini": set(),
}
# A newcomer reads each of these in one sitting.
MOST_LINES = {"modeling_mini/modeling_mini.py": 500}
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*_mini/**/*.py"), *ROOT.glob("tokenization/**/*.py")]
)
TESTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def floor_of(name: str) -> int | None:
    """The floor of a path or dotted module of Mini; `None` for anything else."""
    name = name.replace(".", "/").removesuffix("/py")
    start = max((start for start in FLOORS if name == start or name.startswith(f"{start}/")), key=len, default=None)
    return None if start is None else FLOORS[start]


class Imports(ast.NodeVisitor):
    """
    All that a file imports, also inside functions and by relative names: for each import, the names that it may mean,
    the likeliest first. What is imported for type hints alone is in `for_hints`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[list[str]] = []
        self.for_hints: list[list[str]] = []
        self.visit(ast.parse((ROOT / path).read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            known, self.names = self.names, []
            self.generic_visit(node)
            self.for_hints += self.names
            self.names = known
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [[alias.name] for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            base = ".".join([*self.path.parts[: len(self.path.parts) - node.level], *([base] if base else [])])
        self.names += [[f"{base}.{alias.name}", base] for alias in node.names]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_down(path: Path) -> None:
    floor = floor_of(str(path))
    assert floor is not None, f"{path} has no floor"
    package = path.parts[0].removesuffix(".py")
    imports = Imports(path)
    for name, *_ in imports.names + imports.for_hints:
        other = floor_of(name)
        if other is None:
            continue
        assert other <= floor, f"{path} (floor {floor}) imports {name} (floor {other})"
        if other == floor and name.split(".")[0] != package:
            assert floor == 1, f"{path} imports {name}, which stands on the same floor"


def test_no_import_runs_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        imports = Imports(path)
        meant = imports.names + imports.for_hints  # who reads a file follows its hints too
        found = (next((name for name in names if name in MODULES), module) for names in meant)
        graph[module] = {name for name in found if name != module}
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle


def test_a_circle_would_be_found() -> None:
    with pytest.raises(graphlib.CycleError, match="in a cycle"):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    imports = Imports(Path("train_accelerate.py"))  # which loads torch only when it trains
    assert ["training_mini.result.TrainingResult", "training_mini.result"] in imports.for_hints


def test_the_layout() -> None:
    folders = {package: set() for package in FOLDERS}
    for path in SOURCES:
        if len(path.parts) > 1:
            folders[path.parts[0]] |= {"/".join(path.parts[1:-1])} - {""}
    assert folders == FOLDERS
    for path, lines in MOST_LINES.items():
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= lines, path
    for path in SOURCES:
        assert path.with_suffix("").parts[0] in {name.split("/")[0] for name in FLOORS}, f"{path} has no floor"


def test_tests_mirror_the_tree_and_share_through_helpers_alone() -> None:
    mirrored = {path.parent for path in SOURCES} | {Path("benchmarks"), Path("docs")}
    own = {"helpers", "conformance", "data"}
    tests = {path.stem for path in TESTS if path.name.startswith("test_") and "support" not in path.parts}
    for path in TESTS:
        folder = path.parent.relative_to("tests")
        assert folder in mirrored or folder.parts[0] in own, f"{path} mirrors no folder"
        for names in Imports(path).names:
            # Of transformers' own suites, which the tests of conformance run, some have such names too.
            if not names[0].startswith("transformers"):
                imported = {name.rsplit(".", 1)[-1] for name in names}
                assert not imported & tests, f"{path} imports another test file"


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


def test_each_lint_exception_has_its_reason() -> None:
    benchmarks = [path.relative_to(ROOT) for path in ROOT.glob("benchmarks/*.py")]
    for path in [*SOURCES, *TESTS, *benchmarks]:
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
            assert not re.search(r"# noqa(: [A-Z0-9, ]+)?$", line), f"{path} gives no reason: {line.strip()}"


def test_no_personal_paths() -> None:
    for path in SOURCES:
        assert not re.search(r"/(home|Users|root)/\w", (ROOT / path).read_text(encoding="utf-8")), path
