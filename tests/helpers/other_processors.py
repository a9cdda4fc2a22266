"""What functions in C++ are on processors that have fewer vector extensions than this one."""

from pathlib import Path

import pytest
from modeling_mini import compiled_decoding

BRANCHES = {"avx2": ["__AVX512F__"], "neither": ["__AVX512F__", "__AVX2__"]}


def without_extensions(source: str, extensions: list[str]) -> str:
    """The branches of a text for processors without these extensions, where it has any."""
    for name in extensions:
        source = source.replace(f"if defined({name})", "if 0")
    return source


def compile_without(extensions: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, `compile_decoding` compiles the branches for processors without these extensions, into a folder."""
    source = compiled_decoding.SOURCE
    assert all(f"if defined({name})" in source for name in extensions)
    monkeypatch.setattr(compiled_decoding, "SOURCE", without_extensions(source, extensions))
    monkeypatch.setattr(compiled_decoding, "native_library", compiled_decoding.native_library.__wrapped__)
    monkeypatch.setenv("MINI_CACHE", str(folder))
