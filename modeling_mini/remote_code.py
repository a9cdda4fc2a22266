"""
The copy of the model's code in a checkpoint folder.

A folder that names its classes in `auto_map` loads anywhere with `trust_remote_code=True`, if the code in it imports
only installed libraries and the other files of the folder. In the repository the configuration is one folder above the
model. In a checkpoint all files are in one folder, so imports of `ROOT_FILES` are made relative. This file is copied
too, so a model that was loaded from a checkpoint can save its code again.
"""

import inspect
import os
import re
from pathlib import Path

from configuration_mini import MiniConfig

# Files that are one folder up in the repository.
ROOT_FILES = ("configuration_mini.py", "shape_mini.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mini.MiniConfig",
    "AutoModel": "modeling_mini.MiniModel",
    "AutoModelForCausalLM": "modeling_mini.MiniForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mini.MiniForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mini.MiniForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mini.MiniForQuestionAnswering",
}
# Files of this folder that are copied: modeling_mini.py, and all that it imports.
TRAVELLING = (
    *("modeling_mini.py", "fast_generation.py", "decoding.py", "compiled_decoding.py", "graph_decoding.py"),
    *("native_code.py", "native_step.py", "fast_sampling.py", "quantized_decoding.py", "integrations.py"),
    "remote_code.py",
)
# The name of the module with Mini's own classes: that of the repository, or that of a copy, if this file is one.
MODEL_MODULE = f"{__package__}.modeling_mini"


def remote_code_files() -> dict[str, str]:
    """The files of the copy: name to content."""
    sources = [
        *(Path(inspect.getfile(MiniConfig)).with_name(name) for name in ROOT_FILES),
        *(Path(__file__).parent / name for name in TRAVELLING),
    ]
    absolute = re.compile(rf"^from (?={'|'.join(Path(name).stem for name in ROOT_FILES)} )", re.MULTILINE)
    return {path.name: absolute.sub("from .", path.read_text(encoding="utf-8")) for path in sources}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Writes the copy into a checkpoint folder, over an older one if there is one."""
    for name, content in remote_code_files().items():
        Path(folder, name).write_text(content, encoding="utf-8")
