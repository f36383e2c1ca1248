"""`AdapterLayer`: the one wrapper of the in-place view, for every method and every layer kind.

It has the layout and the surface of PEFT's layers, and no formula: its forward calls the pure functions of the
methods, with the tensors that its dicts hold at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from funcadapt._torch import is_recording
from funcadapt.binding import with_experts
from funcadapt.compose import Level, dense_levels, nest
from funcadapt.config import AdapterConfig
from funcadapt.layer import Dense, Layer
from funcadapt.sites import Site
from funcadapt.view.holding import (
    DERIVED,
    dropout_module,
    is_hidden,
    new_containers,
    put,
    scalar,
    set_buffer,
    take,
    unsaved,
)
from funcadapt.view.switches import Held, Kept, Switches


class AdapterLayer(Switches):
    """A base layer with adapters around it, held by name in PEFT's dicts.

    Several active adapters nest, the first innermost, so that the forward equals the merged layer for every method.
    (PEFT adds the updates of several DoRA adapters, each relative to the base weight, and merges them one after the
    other: its forward and its merged weight differ.)

    Attributes:
        base_layer: what is wrapped: the bare layer, or a layer of another tuner.
        site: the place, described without wrappers.
        adapters: adapter name -> what is known of it here.
        merged_adapters: the names of those that are in the base weight now.
        inputs: what the methods need of the current call, see `Method.inputs`.
        kept: base parameter -> its value before they were merged.
        tied: the base parameters that another module has, too.
        cast_input_dtype_enabled: whether the input is cast to the adapter's dtype; otherwise the leaves are cast to
            the input's.
    """

    base_layer: nn.Module
    inputs: ClassVar[Mapping[str, Tensor]] = {}  # set on the layers for the time of a call
    weights: ClassVar[Mapping[str, Tensor]] = {}  # likewise: how much of each adapter acts, see `fa.functional_call`

    def __init__(
        self,
        base_layer: nn.Module,
        site: Site,
        *,
        read_by_parent: bool = False,
        shared: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.adapters: dict[str, Held] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # the parent uses this layer's weight without calling it: then `weight` is the adapted one
        self._read_by_parent = read_by_parent
        self.kept: dict[str, Kept] = {}
        self.tied: frozenset[str] = frozenset()
        self.training = base_layer.training
        view = self.view
        for name in (*view.attributes, *view.derived):
            setattr(self, name, {})
        if view.dropout:
            self._modules[view.dropout] = nn.ModuleDict()
        for name, held in {**new_containers(view), **(shared or {})}.items():
            (self.__dict__ if is_hidden(view, name) else self._modules)[name] = held
        self.in_features, self.out_features = site.in_features, site.out_features
        self.fan_in_fan_out = site.kind == "hf_conv1d"
        self.kwargs: dict[str, Any] = {}

    def __repr__(self) -> str:
        """PEFT's form, "lora.Linear(...)"."""
        return self.view.label + super().__repr__()

    # -- what is wrapped --------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The bare layer, under every wrapper."""
        base = self.base_layer
        while isinstance(base, AdapterLayer):
            base = base.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        """The base weight, as in PEFT; the adapted weight where the parent multiplies with it itself."""
        return self._parts()[0] if self._read_by_parent else self._base_parts()[0]

    @property
    def bias(self) -> Tensor | None:
        """The base bias, or the adapted one, likewise."""
        return self._parts()[1] if self._read_by_parent else self._base_parts()[1]

    def _base_parts(self) -> tuple[Any, Any]:
        base: Any = self.get_base_layer()
        return getattr(base, "qweight", None) if hasattr(base, "qweight") else base.weight, getattr(base, "bias", None)

    def _parts(self) -> tuple[Any, Any]:
        weight, bias = self.dense()
        return Layer(self.site, self.get_base_layer(), self._first().config).stored(weight), bias

    def _first(self) -> Held:
        return next(iter(self.adapters.values()))

    # -- the adapters -----------------------------------------------------------------------------------

    def add(self, name: str, config: AdapterConfig, leaves: Mapping[str, Tensor]) -> None:
        """Hold one more adapter.

        Args:
            name: its name.
            config: its config at this site.
            leaves: its leaves in the shapes of a checkpoint; they become parameters without a copy. A 0-d one that is
                a number of the layer wins over the config, where they differ.
        """
        held = Held(config)
        put(self, held.method, self.site, self.get_base_layer(), name, leaves)
        unsaved(self, held.method, config, self.site.path, name, leaves)
        self.adapters[name] = held
        self.used_by(name, held)  # now, and not while something is compiled
        view = self.view
        for attribute, field in view.attributes.items():
            getattr(self, attribute)[name] = getattr(config, field) if isinstance(field, str) else field(config, leaves)
        if view.derived:
            values = held.method.buffers(config)
            for leaf in view.derived:
                number, given = values[leaf], leaves.get(leaf)
                if given is not None and not given.is_meta and not torch.equal(number.to(given.dtype), given.cpu()):
                    number = given
                getattr(self, leaf)[name] = number.item()
        if view.dropout:
            self._modules[view.dropout]._modules[name] = dropout_module(getattr(config, view.dropout))  # pyright: ignore

    def leaves(self, name: str) -> dict[str, Tensor]:
        """The live tensors of an adapter by leaf, with the 0-d ones, in the shapes that the pure functions read.

        Args:
            name: the adapter's name.

        Returns:
            The leaves.
        """
        held = self.adapters[name]
        p = self._tensors(name, held)
        if self.site.kind in ("parameter", "experts"):
            shared = {leaf: p.pop(leaf) for leaf in list(p) if leaf in held.method.shared}
            p = {**held.method.unpack(held.config, p)}
            if self.site.experts == 1:  # without an expert axis in a checkpoint, see binding.bind
                p = {leaf: value.unsqueeze(0) for leaf, value in p.items()}
            if shared:
                p |= with_experts(shared, self.site.experts, 0) if self.site.experts else shared
        for leaf in self.view.frozen:
            if leaf in p:
                p[leaf] = p[leaf].reshape(())  # held with one axis, as in PEFT
        if self.inputs:
            p |= {leaf: value for leaf, value in self.inputs.items() if leaf in held.method.inputs}
        derived = self.view.derived
        if derived and p:
            like = next(value for value in p.values() if value.is_floating_point())
            for leaf in derived:
                p[leaf] = self._derived(held, leaf, self.__dict__[leaf][name], like)
        return p

    def _tensors(self, name: str, held: Held) -> dict[str, Tensor]:
        modules: Any = self._modules
        p: dict[str, Tensor] = {}
        for leaf, container, rest in self.used_by(name, held):
            held_in = modules.get(container)
            if held_in is None:
                p[leaf] = self._hidden(container, name, rest, p)
                continue
            # what `take` does, without a call: a layer runs for every token
            value = held_in._modules[name]._parameters.get(rest) if rest else held_in._parameters.get(name)
            p[leaf] = take(held_in, name, rest) if value is None else value  # pyright: ignore
        return p

    def _hidden(self, container: str, name: str, rest: str, others: Mapping[str, Tensor]) -> Tensor:
        """A leaf of a hidden dict, where the other leaves are: FSDP moves what it finds in the lists of names."""
        held = self.__dict__[container]
        value = take(held, name, rest)
        assert value is not None
        device = next(iter(others.values()), value).device
        if value.device != device and "meta" not in (value.device.type, device.type):
            value = value.to(device)
            if not is_recording():
                set_buffer(held, name, rest, value)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the hidden dicts with the others. Not to the meta device: no state dict would bring them back."""
        super()._apply(fn, recurse)  # pyright: ignore

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return tensor if made.is_meta else made

        for name in (DERIVED, *self.view.hidden):
            held: Any = self.__dict__.get(name)
            if held is not None:
                held._apply(moved, recurse)
        return self

    def _derived(self, held: Held, leaf: str, number: Any, like: Tensor) -> Tensor:
        known = held.derived.get(leaf)
        if known is not None and known[0] is number and known[1].dtype == like.dtype and known[1].device == like.device:
            return known[1]
        made = scalar(number, like)
        if not is_recording():  # a graph must not keep what it made
            held.derived[leaf] = number, made
        return made

    def _config(self, name: str, held: Held) -> AdapterConfig:
        """The config with the rate of dropout that the dropout module has now."""
        field = self.view.dropout
        if not self.training or not field:
            return held.config
        module: Any = self._modules[field]._modules[name]  # pyright: ignore[reportOptionalMemberAccess]
        rate = module.p if isinstance(module, nn.Dropout) and module.training else 0.0
        if not self._drops():
            rate = 0.0
        return held.config if rate == getattr(held.config, field) else held.with_dropout(field, rate)

    def _drops(self) -> bool:
        """Whether dropout can act here. Not in attention, as in PEFT."""
        return self.site.kind != "mha" and not self._read_by_parent

    def levels(self, names: Iterable[str] | None = None) -> list[Level]:
        """The adapters that act, innermost first.

        Args:
            names: which; None for the active ones.

        Returns:
            The levels. Names that this layer does not have are left out.
        """
        found: list[Level] = []
        for name in self.active_adapters if names is None else names:
            held = self.adapters.get(name)
            if held is not None:
                found.append(Level(held.method, self._config(name, held), self.leaves(name), self.weights.get(name)))
        return found

    # -- the forward ------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the active adapters around it."""
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        levels = () if self.merged_adapters else self.levels()
        return self._run(levels, *args, **kwargs) if levels else self.base_layer(*args, **kwargs)

    def _run(self, levels: Sequence[Level], *args: Any, **kwargs: Any) -> Any:
        base: Any = self._modules["base_layer"]  # nn.Module's own lookup takes its time
        if not self.cast_input_dtype_enabled:
            self._cast_leaves(levels, args[0] if args else next(iter(kwargs.values())))
        if isinstance(base, AdapterLayer):
            return nest(base, levels, self.site, self.get_base_layer(), base.dense)(*args, **kwargs)
        if len(levels) > 1 or not args or levels[0].w is not None or levels[0].method.folds is not None:
            return nest(base, levels, self.site, base, None)(*args, **kwargs)
        # the usual case without a detour
        (level,), x = levels, args[0]
        method, p, layer = level.method, level.p, Layer(self.site, base, level.config)
        y = base(x if method.before is None else method.before(layer, p, x), *args[1:], **kwargs)
        return y if method.after is None else method.after(layer, p, x, y)

    def _cast_leaves(self, levels: Sequence[Level], x: Any) -> None:
        for level in levels if isinstance(x, Tensor) and x.is_floating_point() else ():
            level.p = {k: v.to(x.dtype) if v.is_floating_point() else v for k, v in level.p.items()}

    def dense(self) -> Dense:
        """The canonical weight and bias with everything that acts here now, layers of other tuners included."""
        inner = self.base_layer
        bare = Layer(self.site, self.get_base_layer(), self._first().config if self.adapters else AdapterConfig())
        weight, bias = inner.dense() if isinstance(inner, AdapterLayer) else (bare.weight, bare.bias)
        if self._disable_adapters or self.merged_adapters:
            return weight, bias
        return dense_levels(self.levels(), self.site, bare.module, weight, bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the base weight, as the layer stores it.

        Args:
            adapter: its name.

        Returns:
            The difference of the adapted and the base weight.
        """
        held = self._known(adapter)
        layer = Layer(self.site, self.get_base_layer(), held.config)
        weight = layer.weight.detach()
        new, _ = dense_levels(self.levels([adapter]), self.site, layer.module, weight, layer.bias)
        return layer.stored(new - weight)

    # -- merging ----------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters into the base weight, see `view.merging`."""
        from funcadapt.view.merging import merge_layer

        merge_layer(self, adapter_names, safe_merge)

    def unmerge(self) -> None:
        """Take them out again, bit for bit where nobody touched the weight in between."""
        from funcadapt.view.merging import unmerge_layer

        unmerge_layer(self)
