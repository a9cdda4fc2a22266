"""
The code that a checkpoint folder carries.

A folder that names its classes in `auto_map` loads anywhere with `trust_remote_code=True`, if the files beside the
weights import only installed libraries and each other. In the repository the configuration lies one folder above the
model; in a checkpoint all files lie side by side, so imports of the files of `ROOT_FILES` are made relative.
This file travels with them: a model loaded from a checkpoint saves its code in the same way again.
"""

import inspect
import os
import re
from pathlib import Path

from configuration_mini import MiniConfig

# What lies one folder up in the repository.
ROOT_FILES = ("configuration_mini.py", "shape_mini.py")
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
    sources = [
        *(Path(inspect.getfile(MiniConfig)).with_name(name) for name in ROOT_FILES),
        *(Path(__file__).parent / name for name in TRAVELLING),
    ]
    absolute = re.compile(rf"^from (?={'|'.join(Path(name).stem for name in ROOT_FILES)} )", re.MULTILINE)
    return {path.name: absolute.sub("from .", path.read_text(encoding="utf-8")) for path in sources}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Writes the flat copy into a checkpoint folder, over whatever older copy is there."""
    for name, content in remote_code_files().items():
        Path(folder, name).write_text(content, encoding="utf-8")
