"""What each adapter has in a live model, read off the modules: its keys in a state dict and in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.keys import PREFIX, ROOT
from funcadapt.method import Leaf
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper
from funcadapt.view.holding import Address, ByPart, held_by, is_saved, take
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import view_state

# names that torch's wrappers put into the paths of modules, but not into the keys of a state dict
_SHARDING = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def state_path(path: str) -> str:
    """The path of a module as the keys of a state dict have it."""
    return ".".join(part for part in path.split(".") if part not in _SHARDING)


def join(*parts: str) -> str:
    """Parts of a key as one; empty ones are left out."""
    return ".".join(part for part in parts if part)


@dataclasses.dataclass
class Own:
    """The leaves of one adapter at one layer.

    Attributes:
        layer: the layer.
        path: its path in the state dict.
        keys: leaf -> (key in a checkpoint, key in the state dict).
    """

    layer: AdapterLayer
    path: str
    keys: dict[str, tuple[str, str]]


class Entries:
    """What the modules of a model say about its keys, from one walk over them.

    Args:
        model: the model.
        name: the adapter of interest.

    Attributes:
        layers: every adapter layer and its path in the state dict.
        wrappers: every auxiliary wrapper likewise.
        own: what the adapter has at each layer. Layers in auxiliary wrappers are theirs.
        shared: what its layers share: leaf -> (key in a checkpoint, key in the state dict).
        unsaved: keys that the state dict would have, but has not -> where those leaves are.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.unsaved: dict[str, tuple[AdapterLayer, Address]] = {}
        self._of_tuner: dict[int, str] = {}
        self.layers: list[tuple[str, AdapterLayer]] = []
        self.wrappers: list[tuple[str, AuxiliaryTrainingWrapper]] = []
        for live, module in named_modules(model):
            if isinstance(module, AdapterLayer):
                self.layers.append((state_path(live), module))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                self.wrappers.append((state_path(live), module))
            elif isinstance(module, ByPart):
                self._of_tuner[id(module)] = state_path(live)
        within = tuple(f"{path}." for path, _ in self.wrappers)
        self.own: list[Own] = []
        self.shared: dict[str, tuple[str, str]] = {}
        for path, layer in self.layers:
            if name in layer.adapters and not path.startswith(within):
                held = layer.adapters[name]
                method, every = held.method, layer.addresses_of(name, held)
                own = [a for a in every if a.leaf in method.keys]
                in_common = [a for a in every if a.leaf in method.shared and (method.repeated or not self.shared)]
                keys = {a.leaf: (method.keys[a.leaf], self._key(path, layer, a)) for a in own}
                shared = {a.leaf: (method.shared[a.leaf], self._key(path, layer, a)) for a in in_common}
                keys |= shared if method.repeated else {}
                self.own.append(Own(layer, path, {k: (join(path, saved), at) for k, (saved, at) in keys.items()}))
                if shared and not self.shared:
                    root = ROOT if path.startswith(PREFIX) else ""
                    self.shared = {leaf: (root + saved, at) for leaf, (saved, at) in shared.items()}

    def _key(self, path: str, layer: AdapterLayer, address: Address) -> str:
        """The key of a leaf in the state dict, or the one that it would have there."""
        held = held_by(layer, address.container)
        key = join(path, address.container, self.name, address.rest)
        saved = is_saved(layer, address, self.name)
        if isinstance(held, ByPart) and id(held) in self._of_tuner:
            key = join(self._of_tuner[id(held)], address.rest, self.name)
            saved = self.name not in held[address.rest]._non_persistent_buffers_set
        if not saved:
            self.unsaved[key] = layer, address
        return key

    def live(self, key: str) -> Tensor:
        """The tensor of a key that the state dict lacks."""
        layer, address = self.unsaved[key]
        found = take(held_by(layer, address.container), self.name, address.rest)
        assert found is not None
        return found

    def with_unsaved(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the model with the leaves that it lacks."""
        return {**{key: self.live(key) for key in self.unsaved}, **state_dict}

    def layer_places(self) -> Iterator[tuple[str, str]]:
        """Every place where a layer holds something of an adapter: (prefix of its keys, the adapter's name)."""
        yield from _places((path, layer, layer.adapters) for path, layer in self.layers)

    def places(self) -> Iterator[tuple[str, str]]:
        """Every place where the model holds something of an adapter, auxiliary wrappers included."""
        yield from self.layer_places()
        yield from _places((path, wrapper, wrapper.available_adapters) for path, wrapper in self.wrappers)


def _places(found: Iterable[tuple[str, Any, Iterable[str]]]) -> Iterator[tuple[str, str]]:
    for path, module, names in found:
        for container in module.adapter_layer_names:
            for name in names:
                yield f"{path}.{container}.{name}", name


def own_leaves(model: nn.Module, name: str) -> list[Own]:
    """What an adapter has at each layer."""
    return Entries(model, name).own


def above(key: str) -> Iterator[str]:
    """A key and everything that it is below of."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def config_of(model: nn.Module, name: str) -> AdapterConfig:
    """The config of an adapter of a model.

    Args:
        model: the model.
        name: the adapter's name.

    Returns:
        The config.

    Raises:
        AdapterError: if there is no such adapter; near matches are listed.
    """
    configs = view_state(model).configs
    if name not in configs:
        raise AdapterError(f"Adapter {name} not found.{did_you_mean(name, configs)}")
    return configs[name]


def reduced(layer: AdapterLayer, name: str, config: AdapterConfig, leaves: Leaf) -> Leaf:
    """Leaves of one layer in the form that a checkpoint of that config has: AdaLoRA leaves out what it pruned."""
    method, path = layer.adapters[name].method, layer.site.path
    if method.stored is None or not leaves:
        return leaves
    if layer.site.kind not in ("parameter", "experts"):
        return _kept({**leaves, **method.stored(config, path, leaves)})
    inner = method.unpack(config.at(path), leaves)
    return method.pack(_kept({**inner, **method.stored(config, path, inner)}))


def _kept(leaves: Mapping[str, Tensor | None]) -> Leaf:
    return {leaf: value for leaf, value in leaves.items() if value is not None}


def without_name(key: str, name: str, places: Mapping[str, str]) -> str:
    """A key without the adapter's name, where it stands for the adapter and is PEFT's to strip."""
    last, parent = key, key.rpartition(".")[0]
    if last in places:
        return parent
    if parent in places:  # PEFT looks no deeper
        return f"{parent.rpartition('.')[0]}.{key.rpartition('.')[2]}"
    return key
