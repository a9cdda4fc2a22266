"""notebooks/mini.ipynb as somebody runs it, cell by cell, on small settings."""

import re
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from helpers import fork_server
from helpers.programs import ROOT

SMALL = """
minutes, answer_steps = None, 6
settings = {"logging_steps": 1, "max_eval_tokens": 4096, "train_batch_size": 4}
"""
PATH = ROOT / "notebooks" / "mini.ipynb"


def outputs_of(cell: Any) -> dict[str, Any]:
    """What a cell shows, by kind; what it prints under `text`."""
    shown: dict[str, Any] = {
        "text": "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
    }
    for output in cell.outputs:
        shown |= output.get("data", {})
    return shown


@pytest.mark.slow
def test_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "executable", fork_server.python())  # which starts the kernel
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SMALL
        # Steps in the place of minutes, so that a busy machine does not decide how many there are.
        cell.source = cell.source.replace("max_minutes=minutes, eval_steps=50", "max_steps=12, eval_steps=6")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = {re.search(r"^\S.*$", cell.source, re.MULTILINE)[0]: outputs_of(cell) for cell in code}
    training, table, curves, writing, attention, lesson, answer, plain = list(shown.values())[2:]
    assert "step 12 of 12" in training["text/html"] and "data:image/png" in training["text/html"]
    assert "What the model writes after 12 steps" in training["text/html"]
    assert "TrainingResult('runs/notebook', 12 steps in" in training["text/plain"] and training["text"] == ""
    assert "eval_bits_per_byte" in table["text/html"] and curves["image/png"] and attention["image/png"]
    assert writing["text"].startswith("def read_lines(path):") and plain["text"].startswith("import ")
    assert "step 6 of 6" in lesson["text/html"] and (tmp_path / "runs/notebook-chat/merged/model.safetensors").is_file()
    assert len(answer["text"]) > 1


def test_it_is_stored_without_outputs() -> None:
    """What somebody has run is for that person; the settings that the test replaces are where it looks for them."""
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    assert sum("max_minutes=minutes, eval_steps=50" in cell.source for cell in code) == 1
