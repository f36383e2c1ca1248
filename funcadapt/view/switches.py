"""What a layer of the view says about its adapters: which act, which are trained, how strongly. PEFT's names."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.method import View, method_of
from funcadapt.sites import Site
from funcadapt.view.holding import Address, ByPart, addresses, held_by, present, take


class Held:
    """One adapter at one layer: its method, its config at this site, and what was computed from them.

    Attributes:
        config: the config, patterns resolved.
        method: the method that it selects.
        addresses: where its leaves can be held.
        present: where those are that it has; looked up again in a copy.
        used: where those are that its hooks read here, likewise.
        derived: the 0-d leaves as they were last made: leaf -> (the number, the tensor).
        quiet: the config with another rate of dropout, as it was last made.
    """

    __slots__ = ("addresses", "config", "derived", "method", "present", "quiet", "used")

    def __init__(self, config: AdapterConfig) -> None:
        self.config, self.method = config, method_of(config)
        self.derived: dict[str, tuple[Any, Tensor]] = {}
        self.addresses = addresses(self.method)  # here, as dynamo does not like caches
        self.present: tuple[Address, ...] | None = None
        self.used: tuple[Address, ...] | None = None
        self.quiet: tuple[float, AdapterConfig] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A method is a value of functions, looked up and never copied."""
        return Held, (self.config,)

    def with_dropout(self, field: str, rate: float) -> AdapterConfig:
        """The config with another rate of dropout."""
        if self.quiet is None or self.quiet[0] != rate:
            self.quiet = rate, dataclasses.replace(self.config, **{field: rate})
        return self.quiet[1]


@dataclasses.dataclass
class Kept:
    """A value of a base parameter from before adapters were merged into it.

    Attributes:
        value: the value.
        now: what the parameter was right after merging, to see whether somebody touched it since: (address, version).
        shared: the parameter that other modules have, too, if the layer got one of its own.
    """

    value: Tensor
    now: tuple[int, int]
    shared: nn.Parameter | None = None


class AdapterHolder(nn.Module):
    """What every module has that holds adapters by name: which are active, and whether they are switched off."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    _active_adapter: str | list[str] = "default"
    _disable_adapters: bool = False

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The names as they were set."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The names as a list."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter


class TunerLayer(AdapterHolder):
    """A layer that holds adapters by name, trained rows of an embedding too: PEFT's `BaseTunerLayer`.

    Attributes:
        merged_adapters: the names of those that are in the base weight now.
    """

    merged_adapters: list[str]

    @property
    def merged(self) -> bool:
        """Whether adapters are in the base weight now."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapters."""
        raise NotImplementedError

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._get_available_adapters())

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError

    def _leave(self, adapter_name: str) -> None:
        """Deactivate an adapter that is gone. If it was the only active one, the alphabetically first one left is."""
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name]
        if not left and (left := self._all_available_adapter_names()[:1]):
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=3,
            )
        self.set_adapter(left)


class Switches(TunerLayer):
    """The part of `AdapterLayer` that computes nothing.

    Attributes:
        site: the place, described without wrappers.
        adapters: adapter name -> what is known of it here.
    """

    view: ClassVar[View]
    site: Site
    adapters: dict[str, Held]

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight."""
        raise NotImplementedError

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter."""
        return [value for value in self.tensors_of(name) if isinstance(value, nn.Parameter)]

    def tensors_of(self, name: str) -> list[Tensor]:
        """All tensors of one adapter: parameters and buffers."""
        held = self.adapters.get(name)
        found = [take(held_by(self, c), name, r) for _, c, r in self.addresses_of(name, held)] if held else []
        return [value for value in found if value is not None]

    def addresses_of(self, name: str, held: Held) -> tuple[Address, ...]:
        """Where an adapter has leaves."""
        if held.present is None:
            held.present = present(self, held.addresses, name)
        return held.present

    def used_by(self, name: str, held: Held) -> tuple[Address, ...]:
        """Where the leaves are that the hooks of an adapter read here."""
        if held.used is None or held.present is None:
            found = self.addresses_of(name, held)
            if held.method.uses is not None:
                shared = [a.leaf for a in found if a.leaf in held.method.shared]
                own = [a.leaf for a in found if a.leaf not in held.method.shared]
                names = {*own, *held.method.uses(self.site, own, shared)}
                found = tuple(a for a in found if a.leaf in names)
            held.used = found
        return held.used

    # -- PEFT's switches --------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off, their gradients with them."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self.set_requires_grad(self._get_available_adapters(), False)
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trainable ones (in inference mode none is).

        Args:
            adapter_names: the names. Those that this layer does not have are kept for `active_adapters`.
            inference_mode: whether the parameters stay frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the parameters of adapters."""
        frozen = self.view.frozen
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            held = self.adapters.get(name)
            for leaf, container, rest in self.addresses_of(name, held) if held is not None else ():
                value = take(held_by(self, container), name, rest)
                if isinstance(value, nn.Parameter) and value.is_floating_point():
                    trained = leaf not in frozen and held is not None and not held.method.is_constant(leaf)
                    value.requires_grad_(requires_grad and trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the alphabetically first one left takes its place."""
        if adapter_name not in self.adapters and adapter_name not in self.active_adapters:
            return
        if adapter_name in self.merged_adapters:
            self.unmerge()
        self.adapters.pop(adapter_name, None)
        for attribute in self.adapter_layer_names + self.other_param_names:
            held: Any = getattr(self, attribute)
            if isinstance(held, ByPart):
                held.drop(adapter_name)
            elif adapter_name in held:
                del held[adapter_name]
        self._leave(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def _known(self, name: str) -> Held:
        if name not in self.adapters:
            raise AdapterError(f"{self.site.path!r} has no adapter {name!r}.{did_you_mean(name, self.adapters)}")
        return self.adapters[name]

    # -- scaling ----------------------------------------------------------------------------------------

    def _scalings(self) -> dict[str, Any] | None:
        return getattr(self, "scaling", None) if "scaling" in self.view.derived else None

    def _initial_scaling(self, name: str) -> float:
        held = self.adapters[name]
        alpha, rank = (getattr(self, field, {}).get(name) for field in ("lora_alpha", "r"))
        config: Any = held.config
        if alpha is not None and rank is not None and (alpha, rank) != (config.lora_alpha, config.r):
            config = dataclasses.replace(config, lora_alpha=alpha, r=rank)  # somebody set the layer's own dicts
        return held.method.buffers(config)["scaling"].item()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to a multiple of its initial one. Unknown names are left out, as in PEFT."""
        scalings = self._scalings()
        if scalings is not None and adapter in scalings:
            scalings[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        scalings = self._scalings()
        for name in self.active_adapters if scalings is not None and scale != 1 else ():
            if name in scalings:  # pyright: ignore[reportOperatorIssue]
                scalings[name] = scalings[name] * scale  # pyright: ignore[reportOptionalSubscript]

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it to its initial value."""
        scalings = self._scalings()
        for name in self.active_adapters if scalings is not None and scale != 1 else ():
            if name in scalings:  # pyright: ignore[reportOperatorIssue]
                initial = self._initial_scaling(name)
                scalings[name] = initial if scale is None else scalings[name] / scale  # pyright: ignore
