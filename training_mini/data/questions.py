"""Conversations about Python's standard library, made of its signatures and docstrings."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .packages import standard_library_files

# Programs that come with Python, and nothing that users call.
PROGRAMS = {"idlelib", "lib2to3", "pydoc_data", "turtledemo"}
LONGEST_ANSWER = 240  # characters; a small model loses the thread after that
PURPOSES = ("What does {name} do?", "What is {name} for?", "Explain {name}.", "Tell me about {name}.")
CALLS = ("How do I call {name}?", "What arguments does {name} take?", "What is the signature of {name}?")


@dataclass(frozen=True)
class Definition:
    """
    A module, class or function that users of the library may meet.

    Attributes:
        name: with its module, as users write it: `os.path.join`.
        summary: the first paragraph of its docstring on one line.
        signature: how it is called, of a function with its parameters; `None` of anything else.
    """

    name: str
    summary: str
    signature: str | None = None


def python_questions() -> list[dict[str, Any]]:
    """Some thousand conversations of one or two turns, in a fixed order that mixes the modules."""
    generator = random.Random(0)
    examples = []
    for definition in definitions():
        turns = [(generator.choice(PURPOSES), definition.summary)]
        if definition.signature is not None:
            call = (generator.choice(CALLS), definition.signature)
            # Some ask for the call alone, and some after they have heard what it does.
            turns = generator.choice(([*turns, call], turns, [call]))
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question.format(name=definition.name)})
            messages.append({"role": "assistant", "content": answer})
        examples.append({"messages": messages})
    generator.shuffle(examples)
    return examples


def definitions() -> Iterator[Definition]:
    """The public definitions of the standard library that have a docstring."""
    for file in standard_library_files():
        parts = list(file.relative_to(sysconfig.get_paths()["stdlib"]).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        module = ".".join(parts)
        if parts and parts[0] not in PROGRAMS and not any(part.startswith("_") for part in parts):
            # posixpath is what users know as os.path.
            yield from definitions_in(file, "os.path" if module == "posixpath" else module)


def definitions_in(file: Path, module: str) -> Iterator[Definition]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the library keeps files that are wrong on purpose
    yield from described(tree, module)
    for node in tree.body:
        yield from public(node, module)


def public(node: ast.stmt, prefix: str) -> Iterator[Definition]:
    """A definition, and the methods of a class."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return
    name = f"{prefix}.{node.name}"
    yield from described(node, name)
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from public(inner, name)


def described(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Definition]:
    summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    signature = None
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parameters = node.args
        for few in (parameters.posonlyargs, parameters.args):
            if few and few[0].arg in ("self", "cls"):
                del few[0]
                break
        signature = f"{name}({ast.unparse(parameters)})"
    if summary and len(summary) <= LONGEST_ANSWER and len(signature or "") <= LONGEST_ANSWER:
        yield Definition(name, summary, signature)
