"""What the laws must know of each method: one file a method, and nothing else in `tests/` changes to add one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site

# -- kinds, by name ---------------------------------------------------------------------------------------

EMBEDDINGS = frozenset({"embedding", "embedding_padding"})
EXPERTS = frozenset({"experts_linear", "experts_transposed", "experts_bmm", "experts_grouped"})
PARAMETERS = EXPERTS | {"parameter"}
CONVS = frozenset({"conv1d", "conv2d", "conv2d_grouped", "conv3d"})
GROUPED = frozenset({"conv2d_grouped"})
MHA = frozenset({"mha", "mha_no_bias"})
WITHOUT_BIAS = PARAMETERS | {"linear_no_bias", "conv3d", "mha_no_bias", *EMBEDDINGS}
LINEAR = frozenset({"linear", "linear_no_bias", "hf_conv1d"})
EVERY = LINEAR | EMBEDDINGS | CONVS | MHA | PARAMETERS
NONE: frozenset[str] = frozenset()

Dense = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config of a method, and what it cannot do by its mathematics: there the laws want the error.

    Attributes:
        name: its name in the ids of the tests.
        config: keyword arguments that say the targets -> a config.
        refused: kinds on which `fa.init` must raise SiteError.
        no_dense: kinds where there is no dense form, so that `fa.merge` must raise SiteError.
        unusable: kinds where the dense form is the only one, and there is none: calls must raise SiteError.
        identity: whether a new adapter changes nothing.
        training: whether the laws run in training mode; not with dropout, which has no dense form.
        idle: leaves that do nothing in the mode in which the laws run.
        inputs: what the method needs of every call, the same for all rows: without their axis. An adapter under the
            laws holds it as a leaf.
    """

    name: str
    config: Callable[..., fa.AdapterConfig]
    refused: frozenset[str] = NONE
    no_dense: frozenset[str] = NONE
    unusable: frozenset[str] = NONE
    identity: bool = True
    training: bool = True
    idle: frozenset[str] = NONE
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])


def config(cls: type[fa.AdapterConfig], **fields: Any) -> Callable[..., fa.AdapterConfig]:
    """A config with the given fields, which takes the targets."""
    return lambda **targets: cls(**targets, **fields)


@dataclasses.dataclass(frozen=True)
class Parity:
    """A config that PEFT has too, on layers or models on which PEFT can use it.

    Attributes:
        config: the fields of both configs, targets left out where `kinds` are layers.
        kinds: kinds of `peft_tools.layer_model`, or names of `peft_tools.tiny` (then `config` has the targets).
        gradients: whether PEFT's gradients are right.
        merged: whether PEFT merges, and rightly.
        tolerance: relative to the largest number; wider only where PEFT computes in float32.
        training: fields that switch on what is random in training mode, where equal seeds give equal numbers.
        peft: the name of PEFT's config class where it is not ours.
    """

    config: Mapping[str, Any]
    kinds: Sequence[str] = ("linear",)
    gradients: bool = True
    merged: bool = True
    tolerance: float = 1e-9
    training: Mapping[str, Any] | None = None
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about one method.

    Attributes:
        variants: the first is under every law on every kind; the others under those of `laws/test_dense.py` on every
            kind, and under the others on some.
        dense: a naive second implementation of the dense form, by autograd alone: (site, leaves, weight, bias) ->
            (weight, bias), for one expert.
        parity: name -> what is compared with PEFT.
        reference: whether the laws that test the engine rather than the method run on every kind.
    """

    variants: Sequence[Variant]
    dense: Callable[[Site, Mapping[str, Tensor], Tensor, Tensor | None], Dense] | None = None
    parity: Mapping[str, Parity] = dataclasses.field(default_factory=dict[str, Parity])
    reference: bool = False


SPECS: dict[str, Spec] = {}


def load() -> dict[str, Spec]:
    """The specs of all methods, by name."""
    if not SPECS:
        for module in iter_modules(__path__):
            SPECS.update(import_module(f"{__name__}.{module.name}").SPECS)
    return SPECS
