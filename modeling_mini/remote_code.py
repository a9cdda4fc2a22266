"""
The code that a checkpoint folder carries.

A folder that names its classes in `auto_map` loads anywhere with `trust_remote_code=True`, if the files beside the
weights import nothing but installed libraries and each other. In the repository the configuration lives one folder up
from the model; in a checkpoint all files lie side by side, so the one import between the two is made relative.
This file travels with them: a model loaded from a checkpoint saves itself the same way again.
"""

import inspect
import os
from pathlib import Path

from configuration_mini import MiniConfig

AUTO_MAP = {
    "AutoConfig": "configuration_mini.MiniConfig",
    "AutoModel": "modeling_mini.MiniModel",
    "AutoModelForCausalLM": "modeling_mini.MiniForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mini.MiniForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mini.MiniForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mini.MiniForQuestionAnswering",
}


def remote_code_files() -> dict[str, str]:
    """The files of the flat copy, name to content."""
    here = Path(__file__).parent
    sources = {
        "configuration_mini.py": Path(inspect.getfile(MiniConfig)),
        "modeling_mini.py": here / "modeling_mini.py",
        "decoding.py": here / "decoding.py",
        "compiled_decoding.py": here / "compiled_decoding.py",
        "graph_decoding.py": here / "graph_decoding.py",
        "integrations.py": here / "integrations.py",
        "remote_code.py": here / "remote_code.py",
    }
    absolute, relative = "\nfrom configuration_mini import", "\nfrom .configuration_mini import"
    return {name: path.read_text(encoding="utf-8").replace(absolute, relative) for name, path in sources.items()}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Writes the flat copy into a checkpoint folder, over whatever older copy is there."""
    for name, content in remote_code_files().items():
        Path(folder, name).write_text(content, encoding="utf-8")
