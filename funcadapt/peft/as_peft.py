"""`as_peft()`: `import peft` means `funcadapt.peft` in this process, for libraries that import peft."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from funcadapt.peft.types import PEFT_VERSION

_OURS = "funcadapt.peft"

# libraries that look for peft when they are imported, and remember what they found
_USERS = ("accelerate", "diffusers", "transformers", "trl")
_FUNCTIONS = frozenset({"is_peft_available", "_is_package_available"})
_FLAGS = frozenset({"USE_PEFT_BACKEND", "_peft_available", "_required_peft_version"})


def as_peft() -> ModuleType:
    """Make `peft` a second name of `funcadapt.peft`, with its modules, its version and its metadata.

    Both names give the same modules and classes, so `isinstance` and pickle work across them. An installed peft is
    hidden, not changed. It holds for this process: call it in worker processes, too, before they unpickle anything.
    transformers, diffusers, trl and accelerate may be imported before or after; if they looked for peft in vain before,
    they look again.

    Returns:
        `funcadapt.peft`.

    Raises:
        ImportError: if the real peft was imported in this process already.

    Example:
        >>> import subprocess, sys
        >>> code = "import funcadapt.peft as p; p.as_peft(); import peft; print(peft.LoraConfig is p.LoraConfig)"
        >>> subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        'True'
    """
    package = importlib.import_module(_OURS)
    real = [name for name, module in sys.modules.items() if _is_peft(name) and not _is_ours(module)]
    if real:
        where = getattr(sys.modules[real[0]], "__file__", None)
        raise ImportError(
            f"The real peft is imported already ({where}), and what uses it keeps it. Call funcadapt.peft.as_peft() "
            "first thing in the program, before anything imports peft."
        )
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return package
    try:
        known = metadata.version("peft")
    except metadata.PackageNotFoundError:
        known = None
    sys.meta_path.insert(0, _Finder())
    sys.modules["peft"] = package
    if known != PEFT_VERSION:
        _look_again()
    return package


def _is_peft(name: str) -> bool:
    return name == "peft" or name.startswith("peft.")


def _is_ours(module: ModuleType) -> bool:
    return f"{module.__name__}.".startswith(f"{_OURS}.")


class _Finder(MetaPathFinder):
    """Finds `peft.x` as `funcadapt.peft.x`, and the distribution "peft"."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _is_peft(fullname):
            return None
        original = importlib.util.find_spec(f"funcadapt.{fullname}")
        if original is None:
            return None
        return ModuleSpec(fullname, _Loader(original.name), is_package=original.submodule_search_locations is not None)

    def find_distributions(self, context: metadata.DistributionFinder.Context) -> Iterator[metadata.Distribution]:
        if context.name is None or context.name.lower() == "peft":
            yield _Distribution()


class _Loader(Loader):
    """Gives the module that is known under another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import of the second name has put its own there


class _Distribution(metadata.Distribution):
    """What `importlib.metadata` says about peft."""

    def read_text(self, filename: str) -> str | None:
        about = f"Metadata-Version: 2.1\nName: peft\nVersion: {PEFT_VERSION}\nSummary: PEFT's names over funcadapt\n"
        return {"METADATA": about, "top_level.txt": "peft\n"}.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def _look_again() -> None:
    """Have libraries that looked for peft, and did not find it, look again.

    They keep what they found in caches of functions, in flags, and in imports under `if is_peft_available()` at the top
    of modules. The caches are cleared, and those statements are run again.
    """
    found = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in _USERS]
    again: list[tuple[ModuleType, ast.stmt]] = []
    for module in found:
        for name, value in list(vars(module).items()):
            if name.startswith("is_peft") and hasattr(value, "cache_clear"):
                value.cache_clear()
        again += [(module, statement) for statement in _statements(module)]
    for _ in range(3):  # a flag goes from the module that computes it to the package, and from there to users
        for module, statement in again:
            exec(compile(ast.Module([statement], []), str(module.__file__), "exec"), vars(module))


def _statements(module: ModuleType) -> Iterator[ast.stmt]:
    """The statements at the top of a module that depend on whether peft is there."""
    file = module.__dict__.get("__file__")
    if not isinstance(file, str) or not file.endswith(".py"):
        return
    source = Path(file).read_text(encoding="utf-8")
    if not any(name in source for name in (*_FUNCTIONS, *_FLAGS)):
        return
    flags = set(_FLAGS)
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom) and any(alias.name in _FLAGS for alias in statement.names):
            yield ast.ImportFrom(
                statement.module,
                [a for a in statement.names if a.name in _FLAGS],
                statement.level,
                lineno=1,
                col_offset=0,
            )
        elif isinstance(statement, ast.If) and _depends(statement.test, flags):
            yield statement
        elif isinstance(statement, ast.Assign) and _depends(statement.value, flags):
            flags |= {
                node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)
            }
            yield statement


def _depends(expression: ast.expr, flags: Iterable[str]) -> bool:
    """Whether an expression asks for peft, or uses a flag that says whether it is there."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Name) and node.id in flags:
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            about = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if not node.args or about == ["peft"]:
                return True
    return False
