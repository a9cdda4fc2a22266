"""The page of the demo as a Space: an app of three lines, the part of Mini that it imports, and what to install."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import yaml

from .staging import Staged

ROOT = Path(__file__).parent.parent
PAGE = "generation_mini.demo.server"
# What the page has beside its modules.
DATA = ("generation_mini/demo/*.js", "modeling_mini/web/*.html", "modeling_mini/web/*.css", "modeling_mini/web/*.js")
# Module to distribution, where they differ.
DISTRIBUTIONS = {"yaml": "pyyaml"}
APP = '''"""The page to try {name}."""

import os
import sys

from generation_mini.demo import main

sys.argv[1:] = ["--{flag}", "{name}", "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
main()
'''


def write_space(name: str, staged: Staged, folder: Path, license: str | None) -> None:
    """
    Writes the files of a Space that shows a model of the Hub.

    Args:
        folder: empty.
    """
    modules = modules_of(PAGE)
    data = [path.relative_to(ROOT) for pattern in DATA for path in ROOT.glob(pattern)]
    for path in [*modules, *data]:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / path).read_text(encoding="utf-8"), encoding="utf-8")
    flag = "adapter" if staged.kind == "adapter" else "model"
    (folder / "app.py").write_text(APP.format(name=name, flag=flag), encoding="utf-8")
    needed = libraries_of(modules) - {"bitsandbytes", "peft", "gradio"} | {"accelerate"}
    if staged.kind == "adapter":
        needed.add("peft")
    if staged.config.get("quantization_config"):
        needed.add("bitsandbytes")
    lines = [f"{library}=={version_of(library)}" for library in sorted(needed)]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    front = {
        "title": name.split("/")[-1], "sdk": "gradio", "sdk_version": version_of("gradio"), "app_file": "app.py",
        "python_version": "3.11", "models": [name], "pinned": False,
    }  # fmt: skip
    if license is not None:
        front["license"] = license
    text = (
        f"A page to try [{name}](https://huggingface.co/{name}): it shows for each character how unsure the model was."
    )
    content = f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n\n{text}\n"
    (folder / "README.md").write_text(content, encoding="utf-8")


def version_of(library: str) -> str:
    """
    The version that is installed here, without the part that only a build has (2.13.0+cpu).

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.metadata.version(library).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"The Space needs {library}: pip install {library}, for its version to be named.") from None


def modules_of(name: str) -> list[Path]:
    """The files of Mini that a module needs, itself among them, by what they import."""
    found, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        for path in files_of_module(module):
            if path not in found:
                found.add(path)
                waiting += imports_of(path)
    return sorted(found)


def files_of_module(module: str) -> list[Path]:
    """The file of a module and the packages that it lies in; none for what is not Mini's."""
    parts = module.split(".")
    files = []
    for end in range(1, len(parts) + 1):
        stem = Path(*parts[:end])
        files += [path for path in (stem / "__init__.py", stem.with_suffix(".py")) if (ROOT / path).is_file()]
    return files


def imports_of(path: Path) -> list[str]:
    """The absolute names of all that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*path.parts[: len(path.parts) - node.level], *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def libraries_of(paths: list[Path]) -> set[str]:
    """What else the files import, as distributions."""
    tops = {name.split(".")[0] for path in paths for name in imports_of(path)} - {""}
    ours = {path.parts[0].removesuffix(".py") for path in paths}
    others = tops - ours - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in others}
