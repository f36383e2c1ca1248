"""The modules of PEFT that have no file here: `funcadapt.peft.tuners.lora.layer` and so on, generated on import.

A finder at the end of `sys.meta_path` makes them, so a file of the same name would win. Their contents are the tables
of `funcadapt.peft.tables`, looked up at every access: no class per method is written by hand, and a method that is
registered later has its modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from funcadapt.errors import did_you_mean

ROOT = "funcadapt.peft"

# modules in the packages of methods; each has the names of its whole package
_IN_EVERY_PACKAGE = ("config", "layer", "model")
_IN_PACKAGES = {
    "adalora": ("gptq",),
    "cartridge": ("utils",),
    "lora": ("arrow", "conversion", "corda", "eva", "gptq", "intruders", "loraga", "monteclora", "variants", "velora"),
}


def _tables() -> Any:
    # late: it imports the modules of all methods and of the view
    return importlib.import_module(f"{ROOT}.tables")


def table_of(name: str) -> Callable[[], dict[str, Callable[[], Any]]] | None:
    """What a generated module has.

    Args:
        name: its name, relative to this package: "tuners.lora.layer".

    Returns:
        A function that returns names and how to get each object; None if there is no such module.
    """
    tables = _tables()
    if name in ("peft_model", "mapping_func"):
        return tables.in_peft_model
    if name == "import_utils":
        return tables.in_import_utils
    if name == "tuners":
        return tables.tuners
    top, _, rest = name.partition(".")
    if top != "tuners":
        return None
    if rest == "tuners_utils":
        return tables.in_tuners_utils
    if rest == "_buffer_dict":
        return partial(tables.at, "funcadapt.view.buffer_dict", "BufferDict")
    if rest == "mixed":
        return partial(tables.at, ".mixed_model", "MixedModel", "COMPATIBLE_TUNER_TYPES")
    package, _, module = rest.partition(".")
    known = package in tables.packages() and module in ("", *_IN_EVERY_PACKAGE, *_IN_PACKAGES.get(package, ()))
    return partial(tables.of_package, package) if known else None


def submodule(package: str, name: str) -> ModuleType | None:
    """A module of a package as an attribute, imported if it was not: `peft.tuners.lora` after `import peft`.

    Args:
        package: the package's full name.
        name: the module's name in it.

    Returns:
        The module, or None if there is none.
    """
    if not name.isidentifier() or name[:1].isupper() or name.startswith("__"):
        return None
    if importlib.util.find_spec(f"{package}.{name}") is None:
        return None
    return importlib.import_module(f"{package}.{name}")


def missing(module: str, name: str, known: Sequence[str]) -> AttributeError:
    """The error for a name that a module does not have."""
    return AttributeError(f"module {module!r} has no attribute {name!r}.{did_you_mean(name, known)}", name=name)


class Facade(ModuleType):
    """A generated module.

    Args:
        name: its full name.
        table: what it has.
    """

    def __init__(self, name: str, table: Callable[[], dict[str, Callable[[], Any]]]) -> None:
        super().__init__(name, f"PEFT's module `{name.removeprefix('funcadapt.')}`, generated.")
        self.__dict__["_table"] = table

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return sorted(self._table())
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        table = self._table()
        if name in table:
            return table[name]()
        if (module := submodule(self.__name__, name)) is not None:
            return module
        raise missing(self.__name__, name, sorted(table))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._table()})


class _Loader(Loader):
    """Makes one facade."""

    def __init__(self, table: Callable[[], dict[str, Callable[[], Any]]]) -> None:
        self.table = table

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Facade(spec.name, self.table)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(MetaPathFinder):
    """Finds the facades, and tells who imports a name that a module lacks which names are near."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if not fullname.startswith(f"{ROOT}."):
            return None
        if name[:1].isupper():
            # no module: it is `from parent import Name`, for which Python tries a submodule at last
            known = dir(sys.modules[parent])
            raise ImportError(f"cannot import name {name!r} from {parent!r}.{did_you_mean(name, known)}", name=parent)
        table = table_of(fullname.removeprefix(f"{ROOT}."))
        return None if table is None else ModuleSpec(fullname, _Loader(table), is_package=True)


def install() -> None:
    """Put the finder at the end of `sys.meta_path`, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
