"""The contract of an adapter method, and the registry of methods.

A method is a frozen value of pure functions around an untouched base layer:

    y = after(layer, p, x, base(before(layer, p, x)))

and a dense form of the same thing, for merging and for places where a weight is used without a call of its module:

    W', b' = weight(layer, p, W, b)

That is all. vmap, many adapters at once, merging, checkpoints and the module view are derived from it, once, for
every method. To add a method, add one file to `funcadapt/methods/` that defines a config and registers a
`Method`; nothing else changes. A third party calls `register` from its own package.

The functions must be functorch-clean: no in-place operation, no Python branch on a tensor's value. They must be
strict about shapes: reshape a leaf to the size that the site has, so that a wrong size raises and never broadcasts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    from funcadapt.combining import Algebra
    from funcadapt.layer import Layer
    from funcadapt.sites import Site

Leaf = Mapping[str, Tensor]


class StarredKeys(dict[str, str]):
    """Names of leaves -> names in a checkpoint, where a last part that is a star stands for a number or a word."""

    def __contains__(self, name: object) -> bool:
        """Whether a leaf has a name."""
        return isinstance(name, str) and (super().__contains__(name) or self._pattern(name) is not None)

    def __missing__(self, name: str) -> str:
        """The name of a numbered leaf."""
        pattern = self._pattern(name)
        if pattern is None:
            raise KeyError(name)
        return self[pattern].replace("*", name.rpartition(".")[2], 1)

    def _pattern(self, name: str) -> str | None:
        stem, _, number = name.rpartition(".")
        return f"{stem}.*" if number and super().__contains__(f"{stem}.*") else None


class Fresh(NamedTuple):
    """What `init` returns for one site."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Shared(NamedTuple):
    """What `share` returns for all sites of one adapter together.

    Attributes:
        params: trained leaves that all sites have in common.
        buffers: frozen ones.
        at: path -> leaves of single sites that depend on the other sites: frozen ones, and trained ones that are among
            the method's keys.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    at: dict[str, dict[str, Tensor]]


class InitFn(Protocol):
    """Draws the leaves of one site."""

    def __call__(self, site: Site, config: Any, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
        """Return the leaves.

        Args:
            site: the place, with its shapes.
            config: the config, patterns resolved for this site.
            draw: makes tensors of the right dtype and device from the site's own random stream.
            weight: gives the base weight in canonical form, (out, in, *kernel), for inits that depend on it.
        """
        ...


class DeriveFn(Protocol):
    """Computes the frozen leaves of one site that no checkpoint holds."""

    def __call__(self, site: Site, config: Any, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return the leaves. Nothing is drawn but from generators that the config seeds. Arguments as in `InitFn`."""
        ...


class ShareFn(Protocol):
    """Draws what the sites of one adapter have in common."""

    def __call__(self, sites: Sequence[Site], config: Any, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
        """Return the leaves.

        Args:
            sites: all sites, in model order.
            config: the config, patterns not resolved.
            draw: makes tensors of the dtype and device of the first site.
            weight: gives the base weight of a site in canonical form.
        """
        ...


class HookFn(Protocol):
    """`before`: the input of the layer -> what the base layer gets."""

    def __call__(self, layer: Layer, p: Leaf, x: Tensor) -> Tensor:
        """Return the new input. `x` has shape (*batch, in) or (batch, channels, *spatial)."""
        ...


class AfterFn(Protocol):
    """`after`: the output of the base layer -> the output of the adapted layer."""

    def __call__(self, layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output. `x` is the input before `before`, `y` the base layer's output."""
        ...


class WeightFn(Protocol):
    """`weight`: the dense form."""

    def __call__(self, layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted weight and bias. `weight` is canonical, (out, in, *kernel)."""
        ...


class FoldsFn(Protocol):
    """`folds`: whether the dense form is the faster one."""

    def __call__(self, layer: Layer, p: Leaf, x: Tensor) -> bool:
        """Return whether the weight should change rather than the output, for an input x."""
        ...


class MaskedFn(Protocol):
    """`masked`: the output of the base layer -> the output of rows that choose among N adapters."""

    def __call__(self, layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Tensor:
        """Return the new output. `choice` is (groups, N)."""
        ...


def _always(config: AdapterConfig) -> bool:
    return True


def _no_buffers(config: Any) -> dict[str, Tensor]:
    return {}


def _keep(config: Any, leaves: Mapping[str, Leaf]) -> Any:
    return config


def _accept(config: Any, path: str, leaves: Leaf) -> None:
    pass


def _identity(leaves: Leaf) -> Leaf:
    return leaves


def _second(config: Any, leaves: Leaf) -> Leaf:
    return leaves


def _third(config: Any, path: str, leaves: Leaf) -> Leaf:
    return leaves


def _nothing(*_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """How a method looks as PEFT's in-place module (`fa.materialize`): names, and nothing that computes.

    Methods that share a config class share a view. Every leaf is held under the key that it has in a checkpoint, with
    the adapter's name after the first part: "lora_A.weight" is `lora_A.default.weight`, an entry of a ModuleDict;
    "ia3_l" is `ia3_l.default`, an entry of a ParameterDict, or of a BufferDict if the leaf is a buffer.

    Attributes:
        package: the package under `peft.tuners`, "lora".
        name: what its classes are called after: "Lora" for LoraLayer, LoraModel, LoraConfig.
        prefix: what the names of its parts begin with, "lora_".
        containers: the names of the dicts in the order in which they print.
        classes: layer kind -> class name; by default "Linear", "Embedding", "Conv2d" and so on.
        label: what a layer prints before its class name.
        held: leaf -> name in a module, where it is another than in a checkpoint.
        frozen: leaves that are held as frozen parameters.
        buffers: leaves that are held as buffers.
        hidden: dicts whose buffers are in none of a layer's lists of names. Of what layers share, the tuner has them
            in its lists, the adapter's name last: `frod_V.<category>.default`.
        derived: the 0-d leaves that follow from the config and are a dict of numbers on the layer: "scaling".
        dropout: the config field with the rate of dropout, also the name of the dict of dropout modules.
        attributes: dicts by adapter name that a layer has -> the config fields in them: "r", "lora_alpha"; or
            (config, the layer's leaves) -> the value.
        extends: the package whose layer and model classes this one's derive from.
        empty: dicts that a layer has although nothing is ever in them.
        entries: dict -> what its entries print, where they are no layers; "dict:kind" for a kind of layer.
        holder: (site, base layer, container, leaves by the rest of their names) -> the entry of a ModuleDict; None for
            a plain Linear.
        warm: (site, config, draw): draws what PEFT's constructors draw from torch's generator before the init does, so
            that a seed gives the numbers that it gives in PEFT. What it returns, if anything, are the trained leaves
            that sites share, as the last site has them.
        tuner: functions that the tuner model has in addition, by name: (tuner, ...) -> anything.
        loss: (model, adapter name) -> what PEFT adds to the loss of a model's output, or None.
    """

    package: str
    name: str
    prefix: str
    containers: tuple[str, ...] = ()
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    label: str = ""
    held: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    frozen: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    derived: tuple[str, ...] = ()
    dropout: str = ""
    attributes: Mapping[str, str | Callable[[Any, Leaf], Any]] = dataclasses.field(default_factory=dict[str, Any])
    extends: str = ""
    empty: Mapping[str, type[nn.Module]] = dataclasses.field(default_factory=dict[str, type[nn.Module]])
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    holder: Callable[[Site, nn.Module, str, Mapping[str, Tensor]], nn.Module | None] = _nothing
    warm: Callable[[Site, Any, Draw], Mapping[str, Tensor] | None] = _nothing
    tuner: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict[str, Callable[..., Any]])
    loss: Callable[[nn.Module, str], Tensor | None] = _nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An adapter method: pure functions and the names of its leaves.

    Attributes:
        name: its name for people.
        config: the config class that selects it.
        kinds: the layer kinds that it supports.
        keys: leaf name -> name in a PEFT checkpoint, after the module's path. A star in both stands for a number:
            "peanut_encoders.*" are the leaves "peanut_encoders.0" and so on.
        init: draws the leaves of a site.
        weight: the dense form.
        before: the hook on the input, if the method has one.
        after: the hook on the output, if the method has one.
        folds: (layer, leaves, input) -> whether the dense form is faster than the hooks for that input. The base layer
            then runs with it, once, where that is as exact: a single adapter, on a plain weight of the same dtype, of
            32 bits or more, without dropout. None: never.
        when: whether it is this method that a config of that class selects. The first registered one that says
            yes wins, the ones registered with a `when` before the ones without.
        buffers: the 0-d leaves that follow from the config (LoRA's scaling). They are not in checkpoints.
        describe: the config that the leaves say, e.g. after a sweep changed a scaling. Used when saving.
        stored: (config, path, leaves of one site) -> those that a checkpoint of that config holds in another form, such
            as less the rows that AdaLoRA pruned; None for a leaf that it does not hold. None if it holds all as they
            are. The path is "" for the leaves that sites share.
        restore: the inverse of `stored` for one site of a file; a leaf that the site lacks may be there, or not.
        written: the names of leaves that only `stored` makes, and `restore` reads -> their names in a PEFT checkpoint.
        constants: leaves that are never trained: `init` returns them as buffers. Those in `keys` are in checkpoints.
        derive: the frozen leaves that are in no checkpoint, as they follow from the config, the site and the base
            weight. `fa.load` needs the model then.
        complete: whether a checkpoint of a config holds all that the hooks need, so that it can be read without the
            model although something is derived or shared.
        share: draws what all sites have in common: trained and frozen leaves at the path "" of the adapter's trees,
            which the hooks see among those of each site.
        shared: the names of those leaves -> their names in a PEFT checkpoint, after "base_model.".
        repeated: whether a PEFT checkpoint holds what sites share once more under the path of each.
        inputs: what the hooks need of every call, beside the input of the layer: names of tensors with an axis of rows
            first, such as Poly's "task_ids", which `functional_call` takes as `inputs`. The hooks see them among the
            leaves.
        uses: (site, names of its own leaves, names of the shared ones) -> those of the shared ones that the hooks read
            there. None: all of them. Of a leaf for each layer, a layer should get its own: leaves cost time under vmap.
        tied: the leaves that a site may have in common with another one: they are at the first of them, see
            `funcadapt.tying`. `share` says which, and checkpoints repeat them.
        couples: whether the rows of a call act on each other through the adapter, such as by a mean over all of them.
            Then each adapter of many sees its own rows together: `routed` takes `masked`, and nothing else.
        whole: for a method without sites (`kinds` is empty) that trains its target modules in full: what stands between
            the module's path and its parameters' names in a checkpoint, "ln_tuning_layers". The in-place model has the
            copies in a dict of that name.
        rows: for a method without sites that trains rows of embeddings, `trainable_token_indices` of the config: what
            stands after the embedding's path in a checkpoint. Other methods hold them in a `token_adapter` below it.
        check: raises SiteError if the leaves of one site, read from a file, are incomplete or do not fit the config
            or each other.
        shapes: (site, config, leaves) -> the shapes that the leaves must have, where `init` cannot say them without the
            values of the weight. None if it can.
        layout: the same leaves in the memory layout in which the hooks are fastest. Applied when they are made or read.
        pack: the leaves of experts in the shapes that PEFT stores, where they differ.
        unpack: the inverse, given the site's config.
        dropout: the probability of dropout in the hooks; the dense form cannot have any.
        residual: (config, leaves, what gives the base weight) -> for an init that takes a part out of it (PiSSA): the
            corrected weight. None otherwise; then the weight is not read, which may be quantised.
        reads: the config fields that the hooks read (dropout left out), which must agree among stacked adapters; None
            for all but the patterned ones.
        rank_field: the config field that says the rank, if there is one.
        with_rank: (leaves of one site, their rank, another one) -> the leaves padded with zeros to a larger rank, or
            cut to a smaller one, for stacking: a padded adapter acts exactly as it did. None if that cannot be.
        neutral: leaves of the shapes of given ones that change nothing, for stacking adapters on different sites. None
            if the leaves alone cannot say that.
        grouped: a faster `after` for N adapters at once: leaves (N, ...), and the rows of `x` and `y` in N equal
            consecutive groups. It may return NotImplemented, and must equal `torch.func.vmap` of `after`.
        masked: `after` for groups of rows that each choose among N adapters, in one product over all of them: leaves
            (N, ...), `choice` (groups, N) of x's dtype, how much of each adapter acts on a group: 0 for all, or for
            all but one. What is added to y is proportional to it, unless the method couples rows. May return
            NotImplemented.
        constant_in_gradient: leaves whose gradient leaves out a term by the method's design (DoRA's norm).
        algebra: how adapters of the method are scaled and combined (`fa.combine`); None if they cannot be.
        view: how it looks as PEFT's in-place module; by default as its keys say.
        inits_experts: whether `init` makes the leaves of all experts at once (then they come first in each, see
            `Site.stack`); otherwise it is called once for each, with a plain 2-D parameter.
    """

    name: str
    config: type[AdapterConfig]
    kinds: frozenset[str]
    keys: Mapping[str, str]
    init: InitFn
    weight: WeightFn
    before: HookFn | None = None
    after: AfterFn | None = None
    folds: FoldsFn | None = None
    when: Callable[[Any], bool] = _always
    buffers: Callable[[Any], dict[str, Tensor]] = _no_buffers
    describe: Callable[[Any, Mapping[str, Leaf]], Any] = _keep
    stored: Callable[[Any, str, Leaf], Mapping[str, Tensor | None]] | None = None
    restore: Callable[[Any, str, Leaf], Leaf] = _third
    written: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    constants: frozenset[str] = frozenset()
    derive: DeriveFn | None = None
    complete: Callable[[Any], bool] = lambda config: False
    share: ShareFn | None = None
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    repeated: bool = False
    inputs: frozenset[str] = frozenset()
    uses: Callable[[Site, Iterable[str], Iterable[str]], Iterable[str]] | None = None
    tied: frozenset[str] = frozenset()
    couples: bool = False
    whole: str = ""
    rows: str = ""
    check: Callable[[Any, str, Leaf], None] = _accept
    shapes: Callable[[Site, Any, Leaf], dict[str, tuple[int, ...]]] | None = None
    layout: Callable[[Leaf], Leaf] = _identity
    pack: Callable[[Leaf], Leaf] = _identity
    unpack: Callable[[Any, Leaf], Leaf] = _second
    dropout: Callable[[Any], float] = lambda config: 0.0
    residual: Callable[[Any, Leaf, Callable[[], Tensor]], Tensor | None] = lambda config, p, weight: None
    reads: frozenset[str] | None = None
    rank_field: str = "r"
    with_rank: Callable[[Leaf, int, int], Leaf] | None = None
    neutral: Callable[[Leaf], Leaf] | None = None
    grouped: AfterFn | None = None
    masked: MaskedFn | None = None
    constant_in_gradient: frozenset[str] = frozenset()
    algebra: Algebra | None = None
    view: View | None = None
    inits_experts: bool = False

    def is_constant(self, leaf: str) -> bool:
        """Whether a leaf is never trained."""
        return leaf in self.constants or f"{leaf.rpartition('.')[0]}.*" in self.constants

    def __post_init__(self) -> None:
        for name in ("keys", "shared"):
            if any("*" in key for key in getattr(self, name)):
                object.__setattr__(self, name, StarredKeys(getattr(self, name)))


class Draw:
    """Makes the leaves of one site: dtype and device of the site, numbers from the site's own stream.

    Numbers are drawn in float32 on the CPU and then moved, so that the same seed gives the same adapter on every
    device, and the stream of a site depends on (seed, path) alone, so that the order and the subset of sites do
    not change the draw. On the meta device nothing is drawn.
    """

    def __init__(self, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> None:
        self.generator, self.dtype, self.device = generator, dtype, device
        self.known: Mapping[str, Tensor] = {}
        """For `share`: the leaves that sites share and that are there already, as they came from a file."""

    @property
    def abstract(self) -> bool:
        """Whether only shapes are wanted: the device is meta."""
        return self.device.type == "meta"

    def cast(self, value: Tensor) -> Tensor:
        """`value` with the dtype and device of the leaves."""
        return value.to(dtype=self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Tensor:
        """Ones."""
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Uniform in (-bound, bound)."""
        if self.abstract:
            return self.zeros(*shape)
        return self.cast((torch.rand(shape, generator=self.generator) * 2 - 1) * bound)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Normal with mean 0."""
        if self.abstract:
            return self.zeros(*shape)
        return self.cast(torch.randn(shape, generator=self.generator) * std)


_methods: list[Method] = []


def register(method: Method) -> Method:
    """Make a method known, so that its config selects it.

    Args:
        method: the method.

    Returns:
        The same method, so that a file can end in `METHOD = register(Method(...))`.

    Raises:
        AdapterError: if another method has the name already.
    """
    if any(known.name == method.name for known in _methods):
        raise AdapterError(f"A method {method.name!r} is registered already.")
    # A method with a condition is a variant of the plain one, so it is asked first.
    _methods.insert(0 if method.when is not _always else len(_methods), method)
    return method


def unregister(name: str) -> None:
    """Forget a method (for tests and for replacing one)."""
    _methods.remove(method_named(name))


def methods() -> tuple[Method, ...]:
    """Every registered method."""
    return tuple(_methods)


def method_named(name: str) -> Method:
    """The method with a name.

    Args:
        name: e.g. "lora".

    Returns:
        The method.

    Raises:
        AdapterError: if there is none; near matches are listed.
    """
    for method in _methods:
        if method.name == name:
            return method
    raise AdapterError(f"No method {name!r}.{did_you_mean(name, (m.name for m in _methods))}")


def method_of(config: AdapterConfig) -> Method:
    """The method that a config selects.

    Args:
        config: a config.

    Returns:
        The method.

    Raises:
        TypeError: if `config` is no config.
        AdapterError: if no method is registered for its class.
    """
    for method in _methods:
        if type(config) is method.config and method.when(config):
            return method
    if not isinstance(config, AdapterConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Expected a config such as fa.LoraConfig(...), got {config!r}.")
    raise AdapterError(
        f"No method is registered for {type(config).__name__}. If it is no single adapter, such as X-LoRA, see "
        f"{type(config).__module__}."
    )
