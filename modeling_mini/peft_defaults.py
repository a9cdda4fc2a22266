"""
The modules of a Mini model that peft adapts by default.

For each of its methods peft has a table of default modules by model type, and no function to add to it. To import peft
takes a second, because it imports bitsandbytes. So this module does not import it: it fills the tables when somebody
else imports peft, or at once if that has happened already.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from configuration_mini import MiniConfig

TABLES = "peft.utils.constants"
TABLE_PREFIX = "TRANSFORMERS_MODELS_TO_"


def fill_tables(constants: ModuleType) -> None:
    """Gives Mini the defaults of Llama, because the modules have the same names."""
    for name, table in vars(constants).items():
        if name.startswith(TABLE_PREFIX) and "llama" in table:
            table.setdefault(MiniConfig.model_type, table["llama"])


class FillingLoader(importlib.abc.Loader):
    """Loads the module of the tables with its own loader, and then fills the tables."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        fill_tables(module)


class TableFinder(importlib.abc.MetaPathFinder):
    """Finds only the module of the tables, in the usual way, and has it loaded by a `FillingLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = FillingLoader(spec.loader)
        return spec


def register_peft_defaults() -> None:
    """Makes `get_peft_model(model, LoraConfig())` work for Mini without a list of modules; other methods too."""
    if TABLES in sys.modules:
        fill_tables(sys.modules[TABLES])
    elif not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
