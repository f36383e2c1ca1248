"""Trained rows of an embedding, in place: PEFT's `TrainableTokensLayer`.

    W' = W with the rows `indices` replaced by the trained ones

An embedding and a head tied to it share the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcadapt._torch import is_recording
from funcadapt.binding import TOKENS
from funcadapt.view.buffer_dict import BufferDict
from funcadapt.view.switches import TunerLayer
from funcadapt.view.token_rows import look_up, project, replaced

ORIGINAL = "trainable_tokens_original"
_MESSAGE = "TrainableTokensLayer wraps an unknown layer type, maybe you are targeting the wrong layer?"


class TrainableTokensLayer(TunerLayer):
    """An embedding, or a head tied to one, of which some rows are trained.

    Where PEFT's differs: a tied head keeps its bias (PEFT drops it), subclasses of `nn.Embedding` keep their own
    forward, and merging remembers the rows that it replaces, so that unmerging also restores a base that was loaded
    after the adapter was made.

    Args:
        base_layer: the embedding, or the head.
        adapter_name: the first adapter.
        token_indices: the rows.
        tied_adapter: the layer whose rows this one shares.
        values: the rows' values, `{"trainable_tokens_delta": (tokens, width)}`; by default those of the base.

    Raises:
        ValueError: if the layer is neither an embedding nor linear, or an index is out of range or given twice.

    Example:
        >>> import torch
        >>> layer = TrainableTokensLayer(torch.nn.Embedding(6, 2), "default", [1, 4])
        >>> layer.trainable_tokens_delta["default"].data += 1
        >>> x = torch.arange(6)
        >>> (layer(x) - layer.base_layer(x))[:, 0].round().tolist()
        [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = (TOKENS,)
    other_param_names: ClassVar[tuple[str, ...]] = ("token_indices", ORIGINAL)

    trainable_tokens_delta: Any
    trainable_tokens_original: BufferDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int] = (),
        tied_adapter: TrainableTokensLayer | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # there is a subclass that is a wrapper, too
        if not isinstance(base_layer, nn.Embedding | nn.Linear):
            raise ValueError(f"{_MESSAGE} It is a {type(base_layer).__name__}, and has to be an Embedding or Linear.")
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        # in a list, so that it is no submodule
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        owner = self if tied_adapter is None else tied_adapter
        self.token_indices: dict[str, list[int]] = {} if owner is self else owner.token_indices
        self.trainable_tokens_delta = nn.ParameterDict() if owner is self else owner.trainable_tokens_delta
        self.trainable_tokens_original = BufferDict() if owner is self else owner.trainable_tokens_original
        self.merged_adapters = []
        self._cached: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.out_features, self.in_features = self._base_weight.shape
        if isinstance(base_layer, nn.Embedding):
            self.in_features, self.out_features = self._base_weight.shape
        self.update_layer(adapter_name, token_indices=token_indices, values=values)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows this one shares, or None."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def get_base_layer(self) -> nn.Module:
        """The embedding, or the head."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base weight."""
        return self._base_weight

    @property
    def _base_weight(self) -> Tensor:
        found = self.base_layer.weight
        assert isinstance(found, Tensor)
        return found

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        found = getattr(self.base_layer, "bias", None)
        assert found is None or isinstance(found, Tensor)
        return found

    def update_layer(
        self,
        adapter_name: str,
        *,
        token_indices: Sequence[int] = (),
        init_weights: bool = True,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter; a layer that is tied has those of the other one.

        Args:
            adapter_name: its name.
            token_indices: its rows.
            init_weights: whether they begin as those of the base; else they are normal.
            values: their values, if there are any.

        Raises:
            ValueError: if an index is out of range or given twice, or the values do not fit.
        """
        if self.tied_adapter is not None:
            return
        indices, weight = list(token_indices), self._base_weight
        size, width = weight.shape
        bad = [i for i in indices if not 0 <= i < size]
        if bad or len(set(indices)) != len(indices):
            raise ValueError(f"token_indices must be distinct and in [0, {size}), got {bad or indices}.")
        originals = weight.detach()[self._index(indices)].clone()
        rows = None if values is None else values.get(TOKENS)
        if rows is None:
            rows = originals.clone() if init_weights else torch.randn_like(originals)
        elif rows.shape != (len(indices), width):
            raise ValueError(f"{TOKENS} has shape {tuple(rows.shape)}, expected {(len(indices), width)}.")
        self.token_indices[adapter_name] = indices
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows)
        self.trainable_tokens_original[adapter_name] = originals

    def _index(self, indices: Iterable[int]) -> Tensor:
        """Indices as a tensor where the weight is. Made once: a copy to a GPU would wait for it in every call."""
        known = tuple(indices)
        device = self._base_weight.device
        if is_recording():
            return torch.tensor(known, device=device, dtype=torch.long)
        if (known, device) not in self._cached:
            self._cached[known, device] = torch.tensor(known, device=device, dtype=torch.long)
        return self._cached[known, device]

    def _check_overlap(self, names: Sequence[str]) -> None:
        """Two adapters that replace one row contradict each other. The merged ones are in the weight already."""
        seen: set[int] = set()
        for name in dict.fromkeys([*self.merged_adapters, *names]):
            rows = set(self.token_indices[name])
            if seen & rows:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    f"behavior. Only disjunct token indices are currently supported; shared: {sorted(seen & rows)}."
                )
            seen |= rows

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """The weight with the rows of some adapters in it."""
        weight = self._base_weight
        for name in active_adapters:
            weight = replaced(weight, self._index(self.token_indices[name]), self.trainable_tokens_delta[name])
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write rows into the base weight.

        Args:
            safe_merge: whether to refuse rows that are not finite.
            adapter_names: whose rows; by default those of the active adapters.

        Raises:
            TypeError: if `adapter_names` is a string.
            ValueError: if two adapters replace one row, or a row is not finite; nothing is merged then.
        """
        names = self._unmerged(self.active_adapters if adapter_names is None else adapter_names)
        if not names:
            return
        self._check_overlap(names)
        for name in names:
            if safe_merge and not torch.isfinite(self.trainable_tokens_delta[name]).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its trained token "
                    "rows are not all finite."
                )
        with torch.no_grad():
            merged = self._base_weight.detach()
            for name in names:
                index = self._index(self.token_indices[name])
                self.trainable_tokens_original[name] = merged[index].clone()
                merged = replaced(merged, index, self.trainable_tokens_delta[name])
            self._base_weight.data = merged
        self.merged_adapters.extend(names)

    def _unmerged(self, wanted: list[str]) -> list[str]:
        """Those that are not in the weight yet, with PEFT's warnings."""
        if isinstance(wanted, str):
            raise TypeError(f"adapter_names should be a list of strings, got {wanted!r}.")
        names = [name for name in wanted if name not in self.merged_adapters]
        if self.merged and names:
            message = f"Already following adapters were merged {','.join(self.merged_adapters)}. "
            warnings.warn(f"{message}You are now additionally merging {','.join(names)}.", stacklevel=3)
        elif self.merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return [name for name in names if name in self.trainable_tokens_delta]

    def unmerge(self) -> None:
        """Put back the rows that merging replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            originals = self.trainable_tokens_original[name]
            self._base_weight.data.index_copy_(
                0, self._index(self.token_indices[name]), originals.to(self._base_weight)
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with the rows of the active adapters."""
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The layer with the rows of some adapters.

        Args:
            x: its input.
            active_adapters: the adapters.
            *args: further arguments of the layer.
            **kwargs: further arguments of the layer.

        Returns:
            Its output.

        Raises:
            ValueError: if two adapters replace one row.
        """
        names = [name for name in active_adapters if name in self.trainable_tokens_delta]
        if self._disable_adapters or not names:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if len(names) > 1:
            self._check_overlap(names)
        if not self._is_plain(names):
            new = {"weight": self.get_merged_weights(names)}
            return functional_call(self.base_layer, new, (x, *args), kwargs)  # pyright: ignore
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            index, rows = self._index(self.token_indices[name]), self.trainable_tokens_delta[name]
            if isinstance(self.base_layer, nn.Embedding):
                y = look_up(x, y, index, rows)
            else:
                y = project(x, y, index, rows.to(self._base_weight), self.bias)
        return y

    def _is_plain(self, names: Sequence[str]) -> bool:
        """Whether the layer computes no more than its type says: then rows can be replaced in its output."""
        base = self.base_layer
        if type(base) is nn.Linear:
            return True
        if type(base) is not nn.Embedding or base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return False
        # the padding row gets no gradient
        return not any(base.padding_idx in self.token_indices[name] for name in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off, and with them their gradients."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for rows in self.trainable_tokens_delta.values():
                rows.requires_grad_(False)
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, the only ones that are trained.

        Args:
            adapter_names: their names.
            inference_mode: whether they are frozen, too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, rows in self.trainable_tokens_delta.items():
            rows.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train, or freeze, the rows of some adapters."""
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            if name in self.trainable_tokens_delta:
                self.trainable_tokens_delta[name].requires_grad_(requires_grad)

    def _get_available_adapters(self) -> set[str]:
        return set(self.trainable_tokens_delta.keys())

    def _all_available_adapter_names(self) -> list[str]:
        return sorted({*self.trainable_tokens_delta.keys(), *self.token_indices})

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; if it was the only active one, the first of the others is active."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        for held in (self.trainable_tokens_delta, self.trainable_tokens_original, self.token_indices):
            if adapter_name in held:
                del held[adapter_name]
        self._leave(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self._base_weight
        for held in (self.trainable_tokens_delta, self.trainable_tokens_original):
            if adapter_name in held and not held[adapter_name].is_meta:
                value = held[adapter_name]
                moved = value.to(device=device or weight.device, dtype=weight.dtype)
                if isinstance(value, nn.Parameter):
                    moved = nn.Parameter(moved.detach(), requires_grad=value.requires_grad)
                held[adapter_name] = moved
