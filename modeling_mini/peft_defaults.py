"""
What peft adapts of a Mini model when its user names no modules.

peft has a table of default modules by model type for each of its methods, and no function to add to them. Importing it
takes a second (it imports bitsandbytes), so the tables are filled when somebody else imports it, or at once if that has
happened.
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
    """Gives Mini the defaults that Llama has, whose modules have the same names."""
    for name, table in vars(constants).items():
        if name.startswith(TABLE_PREFIX) and "llama" in table:
            table.setdefault(MiniConfig.model_type, table["llama"])


class FillingLoader(importlib.abc.Loader):
    """Loads the module of the tables as its own loader does, and fills them."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        fill_tables(module)


class TableFinder(importlib.abc.MetaPathFinder):
    """Finds the one module where the other finders do, and lets it be loaded by a `FillingLoader`."""

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
    """Makes `get_peft_model(model, LoraConfig())`, and the same of other methods, work for Mini."""
    if TABLES in sys.modules:
        fill_tables(sys.modules[TABLES])
    elif not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
