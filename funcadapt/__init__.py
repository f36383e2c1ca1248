"""funcadapt: adapters for PyTorch models as values.

An adapter is an immutable pytree of named tensors; a model is called with it and never changed.
"""

from importlib.metadata import version
from typing import Any

from funcadapt import methods as methods
from funcadapt import optim as optim
from funcadapt import per_sample as per_sample
from funcadapt import sweep as sweep
from funcadapt.adapter import Adapter as Adapter
from funcadapt.algebra import add as add
from funcadapt.algebra import combine as combine
from funcadapt.algebra import scale as scale
from funcadapt.bank import AdapterBank as AdapterBank
from funcadapt.call import applied as applied
from funcadapt.call import functional_call as functional_call
from funcadapt.call import math_attention as math_attention
from funcadapt.checkpoint import load as load
from funcadapt.checkpoint import save as save
from funcadapt.config import AdapterConfig as AdapterConfig
from funcadapt.convert import convert as convert
from funcadapt.convert import extract as extract
from funcadapt.copying import structural_copy as structural_copy
from funcadapt.errors import AdapterError as AdapterError
from funcadapt.errors import AdapterFileError as AdapterFileError
from funcadapt.errors import BypassWarning as BypassWarning
from funcadapt.errors import SiteError as SiteError
from funcadapt.errors import TargetError as TargetError
from funcadapt.init import init as init
from funcadapt.init import init_with_base as init_with_base
from funcadapt.many import grouped as grouped
from funcadapt.many import routed as routed
from funcadapt.merge import merge as merge
from funcadapt.merge import merge_ as merge_
from funcadapt.method import Method as Method
from funcadapt.method import method_of as method_of
from funcadapt.method import methods as registered
from funcadapt.method import register as register
from funcadapt.recompute import checkpoint_context as checkpoint_context
from funcadapt.sites import Site as Site
from funcadapt.sites import SiteTable as SiteTable
from funcadapt.stacking import select as select
from funcadapt.stacking import stack as stack
from funcadapt.stacking import unstack as unstack
from funcadapt.targeting import sites as sites
from funcadapt.view import dematerialize as dematerialize
from funcadapt.view import materialize as materialize

__version__ = version("funcadapt")


def __getattr__(name: str) -> Any:
    """The config of every method, `fa.LoraConfig` and so on: a method is one file, so its config is not listed here."""
    for method in registered():
        if method.config.__name__ == name:
            return method.config
    raise AttributeError(f"module 'funcadapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name."""
    return sorted({*globals(), *(method.config.__name__ for method in registered())})
