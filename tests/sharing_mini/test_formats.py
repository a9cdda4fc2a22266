"""Exports are pushed as models are: `--format`, or the folder that was exported before."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import HubServer
from huggingface_hub import ModelCard, constants
from modeling_mini.export import FORMATS, export
from sharing_mini import arguments
from sharing_mini.arguments import SharingArguments
from sharing_mini.pushing import Result, push


def share(folder: Path, **settings: object) -> Result:
    return push(str(folder), "user/name", SharingArguments(**{"license": "mit", **settings}), lambda sentence: None)


@pytest.mark.slow
def test_native(hub: HubServer, model: Path) -> None:
    """It loads without any code, in the clean processes before and after; the second needs the token."""
    result = share(model, format="native", private=True)
    files = hub.model("user/name").files()
    assert result.verified and hub.model("user/name").private
    assert not any(name.endswith(".py") for name in files)
    card = ModelCard(files["README.md"].decode())
    assert 'pipeline("text-generation", model="user/name")' in card.text and "trust_remote_code" not in card.text
    assert "computes what Mini does" in card.text and "## A sample" in card.text
    assert card.data.license == "mit" and {"mini", "stablelm"} <= set(card.data.tags)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_other_runtimes(
    hub: HubServer, quick_run: Path, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"gguf": "gguf", "onnx": "onnxruntime"}[format])
    share(quick_run, format=format)
    files = hub.model("user/name").files()
    assert any(re.search(rf"\.{format}$", name) for name in files) and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert "PATH_OR_REPOSITORY" not in card.text and format in card.data.tags
    assert card.data.license == "mit" and len(card.data.eval_results) == 3
    assert "max_steps: 40" in card.text and "![Bits per byte" in card.text and "curves.png" in files
    assert card.text.count("# ") >= 4 and "## License\n\nmit" in card.text
    if format == "gguf":
        assert "`hf download\nuser/name --local-dir .`" in card.text
    else:  # a reader of the card has none of the files yet
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        variables: dict[str, Any] = {}
        exec(compile(snippet, "README.md", "exec"), variables)
        assert len(variables["written"]) == 100 and hub.count("GET", "/cdn/") > 0


def test_folder_that_was_exported_before(hub: HubServer, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = export("gguf", model, tmp_path / "gguf")
    share(folder)
    files = hub.model("user/name").files()
    assert {name: files[name] for name in files if name.endswith(".gguf")} == {
        path.name: path.read_bytes() for path in folder.glob("*.gguf")
    }
    weights = next(folder.glob("*.gguf"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        share(folder)


def test_the_formats_are_some_of_those_of_an_export() -> None:
    assert set(arguments.FORMATS) < set(FORMATS) and set(FORMATS) - set(arguments.FORMATS) == {"mini", "lm_eval"}


def test_format_that_there_is_not(model: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of native, gguf, onnx, got 'ggml'"):
        share(model, format="ggml", dry_run=True)
