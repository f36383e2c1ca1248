"""Putting one adapter into a live model, all of it or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.binding import TOKENS, Bound, Place, Tokens
from funcadapt.errors import AdapterError
from funcadapt.method import Method, method_of
from funcadapt.sharing import shared_of
from funcadapt.sites import Site
from funcadapt.swapping import heads_of
from funcadapt.targeting import held_in
from funcadapt.tying import tie, ties
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from funcadapt.view.classes import layer_class, own_class
from funcadapt.view.holding import address_of, held_by, shared_containers, view_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.through import is_read_by_parent
from funcadapt.view.walking import ViewState

_UNSET: Any = object()


class Transaction:
    """Changes that are undone, the last first, if the block raises."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, slot: dict[str, Any], name: str, value: Any) -> None:
        """Change an entry of a dict."""
        old = slot.get(name, _UNSET)
        self._undo.append(lambda: slot.pop(name, None) if old is _UNSET else slot.__setitem__(name, old))
        slot[name] = value

    def on_failure(self, undo: Callable[[], object]) -> None:
        """Note how to undo a change that was just made."""
        self._undo.append(undo)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while kind is not None and self._undo:
            self._undo.pop()()


class Bare:
    """What must be looked up while the model is without its wrappers.

    Args:
        model: the bare model.
        bound: what acts where in it.
    """

    def __init__(self, model: nn.Module, bound: Bound) -> None:
        self.modules = dict(named_modules(model, remove_duplicate=False))
        self.paths = {id(module): path for path, module in reversed(self.modules.items())}
        self.heads = {tokens.path: heads_of(model, tokens.path, tokens.module) for tokens in bound.tokens}
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        self._owners: Counter[int] = Counter()
        for parent in model.modules():
            self._owners.update(map(id, parent._parameters.values()))
            for name, child in parent._modules.items():
                self._parents.setdefault(id(child), []).append((parent, name))

    def tied(self, module: nn.Module) -> frozenset[str]:
        """The names of those of a module's parameters that another module has, too."""
        own = module._parameters.items()
        return frozenset(name for name, p in own if p is not None and self._owners[id(p)] > 1)

    def places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where a module is held: (its parent, its name there), more than once if it is shared.

        Args:
            module: a bare module.

        Returns:
            The places.

        Raises:
            AdapterError: if it is the model itself, which nothing can be wrapped around.
        """
        if id(module) not in self._parents:
            raise AdapterError(
                "The top-level module cannot be wrapped in place, nor can a parameter of its own. Put the model into "
                "another module, or use fa.functional_call, which wraps nothing."
            )
        return self._parents[id(module)]


class Placing:
    """One adapter on its way into a live model.

    Args:
        name: the adapter's name.
        adapter: its value.
        bound: what acts where in the bare model.
        bare: the rest of what is known of the bare model.
        state: the model's view state.
        change: the transaction.
        copy: whether the adapter's tensors are copied, as they belong to a value.
        root: the model.
    """

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        bound: Bound,
        bare: Bare,
        state: ViewState,
        change: Transaction,
        copy: bool,
        root: nn.Module,
    ) -> None:
        self.name, self.adapter, self.bound, self.bare = name, adapter, bound, bare
        self.state, self.change, self.copy, self.root = state, change, copy, root
        self._of_all: dict[str, Tensor] | None = None
        self._placed: dict[str, AdapterLayer] = {}
        self._first: AdapterLayer | None = None

    def place(self) -> None:
        """Put everything in place."""
        method = method_of(self.adapter.config)
        for path in self.bound.levels:
            self._layer(method, self.bound.places[path])
        saved: dict[str, dict[str, Tensor]] = {}
        for whole in self.bound.replaced:
            owner = self._saved_module(whole.path)
            if owner is None:
                self._bias(whole.module, whole.path, whole.name, whole.tensor)
            else:
                below = f"{whole.path}.{whole.name}".removeprefix(f"{owner}.")
                saved.setdefault(owner, {})[below] = self._own(whole.tensor)
        for path, values in saved.items():
            self._save_module(path, values)
        for tokens in self.bound.tokens:
            self._tokens(tokens)

    # -- layers -----------------------------------------------------------------------------------------

    def _layer(self, method: Method, found: Place) -> None:
        site = found.site
        assert site is not None
        cls, config = layer_class(method, site.kind), self.adapter.config.at(found.path)
        (parent, name), *others = self.bare.places(found.module)
        top: Any = parent._modules[name]
        layer: Any = top
        while isinstance(layer, AdapterLayer) and (type(layer) is not cls or layer.site.parameter != site.parameter):
            layer = layer.base_layer
        if isinstance(layer, AdapterLayer):
            layer.add(self.name, config, self._leaves(method, site))
            self._tie(method, layer)
            self.change.on_failure(lambda: layer.delete_adapter(self.name))
            return
        if isinstance(top, AuxiliaryTrainingWrapper):
            raise AdapterError(
                f"{found.path!r} is trained by another adapter through a {type(top).__name__}, so it cannot be adapted "
                "as well. Drop it from target_modules, or delete that adapter."
            )
        layer = cls(top, site, read_by_parent=is_read_by_parent(parent), shared=self._shared_modules(method))
        self._first = layer if self._first is None else self._first
        layer.tied = self.bare.tied(found.module)
        layer.add(self.name, config, self._leaves(method, site))
        self._tie(method, layer)
        for holder, place in ((parent, name), *others):
            self.change.set(holder._modules, place, layer)
            self._no_fast_path(holder)

    def _leaves(self, method: Method, site: Site) -> dict[str, Tensor]:
        """The leaves at a site in the shapes of a checkpoint."""
        given, frozen = self.adapter.params.get(site.path, {}), self.adapter.buffers.get(site.path, {})
        own: Mapping[str, Tensor] = {leaf: given[leaf] for leaf in given if leaf in method.keys}
        if site.kind in ("parameter", "experts"):
            own = method.pack(own)
        view = view_of(method)
        # a new adapter's numbers are what its config says
        numbers = method.buffers(self.adapter.config).keys() - view.frozen - set(view.derived if self.copy else ())
        tied = {name for name, _, _ in ties(frozen)} if method.tied else set[str]()
        own = {**own, **{leaf: tensor for leaf, tensor in frozen.items() if leaf not in numbers | tied}}
        return {**{leaf: self._own(t) for leaf, t in own.items()}, **self._shared(method)}

    def _tie(self, method: Method, layer: AdapterLayer) -> None:
        """Hold the leaves of another layer that this one uses, as the same parameters."""
        self._placed[layer.site.path] = layer
        for _, leaf, path in ties(self.adapter.buffers.get(layer.site.path, {})) if method.tied else ():
            address = address_of(method, leaf)
            assert address is not None
            here, there = (held_by(each, address.container) for each in (layer, self._placed[path]))
            slot = "_modules" if address.rest else "_parameters"
            getattr(here, slot)[self.name] = getattr(there, slot)[self.name]
            layer.adapters[self.name].present = None
            layer.used_by(self.name, layer.adapters[self.name])  # looked up anew

    def _shared(self, method: Method) -> dict[str, Tensor]:
        """What all sites share: copied once."""
        if self._of_all is None:
            found = shared_of(method, self.adapter.params, self.adapter.buffers)
            self._of_all = {leaf: self._own(t) for leaf, t in found.items()}
        return self._of_all

    def _shared_modules(self, method: Method) -> dict[str, nn.Module]:
        """The dicts that all layers of a kind have in common, if there is such a layer already."""
        view = view_of(method)
        containers = shared_containers(view)
        if containers and self._first is None:
            every = (m for m in self.root.modules() if isinstance(m, AdapterLayer) and m.view is view)
            self._first = next(every, None)
        if self._first is None:
            return {}
        return {container: held_by(self._first, container) for container in containers}

    def _own(self, tensor: Tensor) -> Tensor:
        return (tensor.detach().clone() if self.copy else tensor.detach()).contiguous()

    def _no_fast_path(self, parent: nn.Module) -> None:
        # in eval mode it reads its children's weights without calling them; this is the switch that torch asks
        if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
            self.change.set(self.state.fast_paths, self.bare.paths[id(parent)], parent.activation_relu_or_gelu)
            self.change.set(parent.__dict__, "activation_relu_or_gelu", 0)

    # -- what an adapter holds in full ------------------------------------------------------------------

    def is_trained_in_place(self, path: str) -> bool:
        """Whether what the adapter holds in full of a module is in the module itself, as biases are."""
        return self._saved_module(path) is None

    def _saved_module(self, path: str) -> str | None:
        """The module of `modules_to_save` that a path is in or below, the outermost one."""
        names: Any = getattr(self.adapter.config, "modules_to_save", None) or ()
        target = held_in(self.adapter.config, path) if method_of(self.adapter.config).whole else ""
        if target:
            return target
        parts = path.split(".")
        heads = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((head for head in heads if any(head.endswith(name) for name in names)), None)

    def _bias(self, module: nn.Module, path: str, name: str, value: Tensor) -> None:
        full = f"{path}.{name}" if path else name
        parameter = module._parameters[name]
        assert parameter is not None
        old = parameter.detach().clone()
        if full not in self.state.biases:
            self.change.set(self.state.biases, full, old)
        if not value.is_meta:
            parameter.data.copy_(value)
            self.change.on_failure(lambda: parameter.data.copy_(old))

    def _save_module(self, path: str, values: dict[str, Tensor]) -> None:
        module = self.bare.modules[path]
        places = self.bare.places(module)
        top: Any = places[0][0]._modules[places[0][1]]
        own = held_in(self.adapter.config, path) == path
        cls = own_class(method_of(self.adapter.config)) if own else ModulesToSaveWrapper
        if type(top) is cls:
            top.update(self.name, values=values)
            self.change.on_failure(lambda: top.delete_adapter(self.name, None))
            return
        self._refuse_wrapped(top, path, "target_modules" if own else "modules_to_save")
        wrapper = cls(module, self.name, values=values)
        for parent, name in places:
            self.change.set(parent._modules, name, wrapper)  # pyright: ignore[reportArgumentType]

    def _tokens(self, tokens: Tokens) -> None:
        method, first = method_of(self.adapter.config), None
        cls: Any = own_class(method) if method.rows else TrainableTokensWrapper
        given: dict[str, Any] = {
            "token_indices": tokens.indices.tolist(),  # pyright: ignore[reportUnknownMemberType]
            "values": {TOKENS: self._own(tokens.rows_of)},
        }
        for module, _ in self.bare.heads[tokens.path]:
            if first is not None:
                given["tied_adapter"] = first.token_adapter
            places = self.bare.places(module)
            top: Any = places[0][0]._modules[places[0][1]]
            if type(top) is cls:
                top.update(self.name, **given)
                self.change.on_failure(lambda top=top: top.delete_adapter(self.name, None))
            else:
                self._refuse_wrapped(top, tokens.path, "target_modules" if method.rows else "trainable_token_indices")
                top = cls(module, self.name, **given)
                ties_of = self.adapter.buffers.get(self.bare.paths[id(module)], {})
                if first is None or tie(TOKENS, tokens.path) in ties_of:
                    top.kept_as = method.rows
                for parent, name in places:
                    self.change.set(parent._modules, name, top)
            first = top if first is None else first

    def _refuse_wrapped(self, top: Any, path: str, field: str) -> None:
        if isinstance(top, AdapterLayer | AuxiliaryTrainingWrapper):
            raise TypeError(
                f"{field} cannot be applied to {path!r}, which is a {type(top).__name__} of another adapter. Drop it "
                f"from {field}, or delete that adapter."
            )
