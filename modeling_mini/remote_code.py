"""
The code that a checkpoint folder carries.

A folder that names its classes in `auto_map` loads anywhere with `trust_remote_code=True`, if the files beside the
weights import only installed libraries and each other. In the repository the configuration lies one folder above the
model; in a checkpoint all files lie side by side, so imports of the configuration are made relative.
This file travels with them: a model loaded from a checkpoint saves its code in the same way again.
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
# The files beside this one that travel: modeling_mini.py, and all that it imports.
TRAVELLING = (
    *("modeling_mini.py", "fast_generation.py", "decoding.py", "compiled_decoding.py", "graph_decoding.py"),
    *("integrations.py", "remote_code.py"),
)
# The module of Mini's own classes: in the repository, or in the folder that this copy was loaded from.
MODEL_MODULE = f"{__package__}.modeling_mini"


def remote_code_files() -> dict[str, str]:
    """The files of the flat copy, name to content."""
    sources = [Path(inspect.getfile(MiniConfig)), *(Path(__file__).parent / name for name in TRAVELLING)]
    absolute, relative = "\nfrom configuration_mini import", "\nfrom .configuration_mini import"
    return {path.name: path.read_text(encoding="utf-8").replace(absolute, relative) for path in sources}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Writes the flat copy into a checkpoint folder, over whatever older copy is there."""
    for name, content in remote_code_files().items():
        Path(folder, name).write_text(content, encoding="utf-8")
