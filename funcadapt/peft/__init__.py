"""PEFT's names over funcadapt: replace `from peft import` by `from funcadapt.peft import`, and nothing else.

The names are those of `peft` 0.21.2, the modules too (`funcadapt.peft.tuners.lora.layer`, `funcadapt.peft.utils`, ...).
`as_peft()` makes `import peft` itself mean this package, for libraries that import it. Prompt learning is out of scope:
its names can be imported, and raise when they are used.

    >>> from funcadapt.peft import LoraConfig, TaskType
    >>> LoraConfig(r=4, task_type=TaskType.CAUSAL_LM).to_dict()["r"]
    4
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

# the function has the name of its module, and is to win
from funcadapt.peft.as_peft import as_peft as as_peft
from funcadapt.peft.facade import install, missing, submodule, table_of
from funcadapt.peft.homes import HOME_OF
from funcadapt.peft.types import PEFT_VERSION

__version__ = PEFT_VERSION
install()


def _methods() -> dict[str, Callable[[], Any]]:
    """The names of methods and how to get each object: they are computed, as methods can be registered at any time."""
    table = table_of("tuners")
    return table() if table else {}


def _names() -> list[str]:
    return sorted({*HOME_OF, *_methods()})


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _names()
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in HOME_OF:
        found = getattr(import_module(f"{__name__}.{HOME_OF[name]}"), name)
        globals()[name] = found
        return found
    if (module := submodule(__name__, name)) is not None:
        return module
    if (get := _methods().get(name)) is not None:
        return get()
    raise missing(__name__, name, _names())


def __dir__() -> list[str]:
    return sorted({*globals(), *_names()})
