"""`Layer`: a site bound to the live module, as the hooks of a method see it.

One layer kind differs from another in three ways only: how its weight is stored, how it applies a weight, and
which dimension of its output is the channel. This file knows all three, so that a method is written once, on
canonical weights of shape (out, in, *kernel), and holds on every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.quantised import check_writable, dequantised, is_quantised
from funcadapt.sites import Site

Dense = tuple[Tensor, Tensor | None]

_CONV: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


# The forwards of layers that apply their weight and do nothing else, as `Layer.apply` does.
_PLAIN = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_HF_CONV1D = "transformers.pytorch_utils.Conv1D.forward"


class Layer:
    """A site together with its module, for the duration of one call.

    Attributes:
        site: the static description: path, kind, shapes.
        module: the live module (the owner, where the site is a plain parameter).
        config: the adapter's config.
        below: gives the canonical weight and bias of what this adapter wraps; it differs from the module's own
            where several adapters nest, or for one expert of a stack.
        mask: the dropout of this call, zeros and 1 / (1 - rate), where it was drawn already; else None.
    """

    __slots__ = ("below", "config", "mask", "module", "site")

    def __init__(
        self,
        site: Site,
        module: nn.Module,
        config: AdapterConfig,
        below: Callable[[], Dense] | None = None,
    ) -> None:
        self.site, self.module, self.config, self.below = site, module, config, below
        self.mask: Tensor | None = None

    @property
    def training(self) -> bool:
        """Whether the module is in training mode: dropout acts exactly then."""
        return self.module.training

    @property
    def weight(self) -> Tensor:
        """The weight that this adapter wraps, canonical: (out, in, *kernel), experts first if there are any.

        Of a quantised layer it is dequantised on every access, and no constant that is kept.

        Raises:
            SiteError: if it is quantised and cannot be dequantised.
        """
        if self.below is not None:
            return self.below()[0]
        stored: Any = getattr(self.module, self.site.parameter, None)
        if is_quantised(stored):
            try:
                stored = dequantised(self.module, self.site.parameter)
            except (TypeError, NotImplementedError, RuntimeError) as error:
                kind = "packed" if stored is None else str(stored.dtype)
                raise SiteError(
                    f"The weight at {self.site.path!r} is quantised ({kind}), {self.config.peft_type} or its init "
                    f"reads it, and it cannot be dequantised: {error}\nMethods that do not read it, such as LoRA, work."
                ) from error
        return self.canonical(stored)

    @property
    def bias(self) -> Tensor | None:
        """The bias that this adapter wraps, shape (out,), or None."""
        if self.below is not None:
            return self.below()[1]
        return getattr(self.module, self.site.bias) if self.site.bias else None

    def canonical(self, stored: Tensor) -> Tensor:
        """The stored weight as (out, in, *kernel)."""
        return stored.transpose(-2, -1) if self.site.transposed else stored

    stored = canonical  # a transposition is its own inverse

    @property
    def is_plain(self) -> bool:
        """Whether the module's class computes `apply` of its weight and bias."""
        forward = type(self.module).forward
        return forward in _PLAIN or f"{forward.__module__}.{forward.__qualname__}" == _HF_CONV1D

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a plain linear layer or convolution computes, with another weight and bias.

        Args:
            x: the layer's input.
            weight: canonical, (out, in / groups, *kernel).
            bias: (out), or None.

        Returns:
            The layer's output.
        """
        if self.site.kind in _CONV:
            module: Any = self.module
            return module._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a weight to an input the way that this layer applies its own, without the bias.

        Args:
            x: the layer's input: (*batch, in), token ids (*batch), or (batch, in, *spatial).
            weight: canonical, with any number of outputs: (n, in, *kernel). For a convolution it sees all input
                channels, whatever the layer's groups.

        Returns:
            (*batch, n) or (batch, n, *spatial).
        """
        kind, module = self.site.kind, self.module
        if kind == "embedding":
            # padding_idx and scale_grad_by_freq only matter to gradients, and must be the same there. vmap over the
            # weight loses torch's own padding_idx, without a word.
            y = F.embedding(x, weight.t(), None, None, 2.0, module.scale_grad_by_freq)  # pyright: ignore
            padding: Any = module.padding_idx
            if padding is not None:
                y = torch.where(torch.eq(x, padding).unsqueeze(-1), y.detach(), y)
            scale: Any = getattr(module, "embed_scale", None)  # Gemma and friends scale what they look up
            return y if scale is None else y * scale
        if kind not in _CONV:
            return F.linear(x, weight)
        conv: Any = module
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        return _CONV[kind](x, weight, None, conv.stride, padding, conv.dilation)

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        """Map the channels of an intermediate, without looking at neighbours.

        Args:
            h: (*batch, r) or (batch, r, *spatial).
            weight: (n, r), for a convolution (n, r / groups, 1, ...).

        Returns:
            (*batch, n) or (batch, n, *spatial).
        """
        if self.site.kind in _CONV:
            return _CONV[self.site.kind](h, weight, groups=self.site.groups)
        return F.linear(h, weight)

    def per_output(self, vector: Tensor) -> Tensor:
        """A leaf of one number per output, shaped to multiply the output. Any other size raises."""
        return vector.reshape(self.site.out_features, *(1,) * self._spatial)

    def per_input(self, vector: Tensor) -> Tensor:
        """A leaf of one number per input, shaped to multiply the input. Any other size raises."""
        return vector.reshape(self.site.in_features, *(1,) * self._spatial)

    def rows(self, vector: Tensor) -> Tensor:
        """A leaf of one number per output, shaped to multiply the rows of a canonical weight."""
        return vector.reshape(self.site.out_features, *(1,) * (len(self.site.shape) - 1))

    def columns(self, vector: Tensor) -> Tensor:
        """A leaf of one number per input, shaped to multiply the columns of a canonical weight."""
        site = self.site
        ones = (1,) * self._spatial
        if site.groups == 1:
            return vector.reshape(1, site.in_features, *ones)
        # output o of group g reads the inputs of group g only
        grouped = vector.reshape(site.groups, 1, site.in_features // site.groups)
        per_row = grouped.expand(-1, site.out_features // site.groups, -1)
        return per_row.reshape(site.out_features, site.in_features // site.groups, *ones)

    @property
    def _spatial(self) -> int:
        return len(self.site.shape) - 2


def dropout(layer: Layer, x: Tensor, p: float) -> Tensor:
    """Dropout on a layer's input, active exactly when the layer's module is in training mode.

    Args:
        layer: the layer.
        x: its input. Token ids (an embedding's input) are returned as they are.
        p: the probability of zeroing an element.

    Returns:
        The input with dropout.
    """
    if layer.mask is not None:  # many adapters, each with a rate of its own
        return (x * layer.mask).to(x.dtype)
    if p == 0.0 or not layer.training or layer.site.kind == "embedding":
        return x
    return torch.dropout(x, p, True)


class Given:
    """The base weight of a layer, for inits: called, the canonical weight; `bias` is the bias, or None."""

    def __init__(self, layer: Layer, *, changes: bool = False) -> None:
        self._layer, self._changes = layer, changes

    def __call__(self) -> Tensor:
        """The weight. Raises SiteError if the init changes it, and it is quantised."""
        if self._changes:
            check_writable(self._layer.module, self._layer.site.parameter, self._layer.site.path)
        return self._layer.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        bias = self._layer.bias
        return None if bias is None else bias.detach()
