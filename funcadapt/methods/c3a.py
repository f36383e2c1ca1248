"""C3A: circular convolution. The weight's update is made of circulant blocks.

    y = W x + b + C x / in,      C[m d + i, n d + j] = c[m, n, (j - i) mod d]        d = block_size

Leaves: `c3a_kernel` (out / d, in / d, d); d divides in and out.
Init: xavier-uniform (of fan in and out), which is no identity, as in PEFT. `init_weights`: "kaiming_uniform",
"gaussian", or True for zeros.
Cost: in out / d parameters a layer. A block acts through the Fourier transform of d numbers, where it is a product:
5 (in + out) log2(d) + 4 in out / d flops a token forward, no matrix of the size of W; twice that backward.
Dense form: W + C / in. Convolutions and embeddings, where in is the size of a row of the weight, build C.

Source: Chen et al. 2024, arXiv:2407.19342.
Differs from PEFT: the gradient to the input is right (PEFT multiplies it with the blocks reversed, so that whatever
is below an adapted layer trains on a wrong gradient); several adapters sum, where PEFT feeds one's output to the next
(B7); float64 stays float64; the transforms are real ones, of half the size; `torch.func` transforms work. Also on
transformers' Conv1D, embeddings, convolutions (in each group), multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_weight, certain
from funcadapt.sites import Site

fft: Any = torch.fft  # a C extension without types


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """Config of C3A, with PEFT's fields.

    Attributes:
        block_size: the size of a circulant block. It divides the inputs and the outputs.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        bias: "none", "all" (train every bias of the model) or "c3a_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        block_size_pattern: block size by regular expression of the site path.
        init_weights: "xavier_uniform" or False, "kaiming_uniform", "gaussian", or True for zeros.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "C3A"
    block_size: int = 256
    target_modules: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    block_size_pattern: Mapping[str, int] | None = dataclasses.field(default_factory=dict[str, int])
    init_weights: bool | str | None = "xavier_uniform"

    patterned: ClassVar[Mapping[str, str]] = {"block_size": "block_size_pattern"}
    target_table: ClassVar[targets.Targets] = {
        **targets.LORA,
        "gpt2": ("mlp.c_proj",),
        "gpt_bigcode": ("mlp.c_proj",),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in {"block_size": self.block_size, **(self.block_size_pattern or {})}.items():
            if size <= 0:
                raise ValueError(f"`block_size` should be a positive integer value but the value passed is {size} "
                                 f"({name!r}).")  # fmt: skip
        if self.init_weights not in (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"):
            raise ValueError(f"Unknown init_weights: {self.init_weights!r}. It is 'xavier_uniform', 'kaiming_uniform', "
                             "'gaussian', True or False.")  # fmt: skip
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")


def init(site: Site, config: C3AConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`c3a_kernel` by `init_weights`."""
    out, inputs, d, how = site.out_features, math.prod(site.shape[1:]), config.block_size, config.init_weights
    if inputs % d or out % d:
        raise SiteError(
            f"block_size={d} must divide the {inputs} inputs and the {out} outputs of {site.path!r}. Their greatest "
            f"common divisor is {math.gcd(inputs, out)}."
        )
    shape = (out // d, inputs // d, d)
    if how is True:
        kernel = draw.zeros(*shape)
    elif how == "gaussian":
        kernel = draw.normal(*shape)
    else:
        bound = math.sqrt(1 / inputs if how == "kaiming_uniform" else 6 / (inputs + out))
        kernel = draw.uniform(*shape, bound=bound)
    return Fresh({"c3a_kernel": kernel}, {})


def _kernel(layer: Layer, p: Leaf) -> Tensor:
    """The kernel over the number of inputs, in 32 bits at least. Any other size than the site's raises."""
    out, inputs = layer.site.out_features, math.prod(layer.site.shape[1:])
    kernel = p["c3a_kernel"]
    d = kernel.shape[-1]
    wide = torch.promote_types(kernel.dtype, torch.float32)  # there are no transforms of fewer bits
    return kernel.reshape(out // d, inputs // d, d).to(wide) / inputs


def circulant(layer: Layer, p: Leaf) -> Tensor:
    """C / in as a weight of the layer's shape."""
    kernel = _kernel(layer, p)
    d = kernel.shape[-1]
    place = torch.arange(d, device=kernel.device)
    blocks = kernel[..., (place - place.unsqueeze(1)) % d]  # (m, n, i, j)
    return blocks.transpose(1, 2).reshape(layer.site.shape).to(p["c3a_kernel"].dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + C x / in, in y's dtype."""
    site = layer.site
    if site.kind == "embedding" or len(site.shape) > 2 or certain(x.numel() == 0):  # MKL has no transform of no row
        return add_weight(layer, x, y, circulant(layer, p))
    kernel = _kernel(layer, p)
    d = kernel.shape[-1]
    blocks = x.reshape(*x.shape[:-1], kernel.shape[1], d).to(torch.promote_types(x.dtype, kernel.dtype))
    product = torch.einsum("...nk,mnk->...mk", fft.rfft(blocks), fft.rfft(kernel).conj())
    return (y + fft.irfft(product, n=d).reshape(*x.shape[:-1], site.out_features)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + C / in; the bias stays."""
    return (weight + circulant(layer, p)).to(weight.dtype), bias


def check(config: C3AConfig, path: str, p: Leaf) -> None:
    """One kernel, of the config's block size."""
    shape, d = tuple(p["c3a_kernel"].shape) if "c3a_kernel" in p else (), config.at(path).block_size
    if len(shape) not in (3, 4) or shape[-1:] != (d,):
        raise SiteError(f"The site {path!r} has c3a_kernel of shape {shape}, expected (out / {d}, in / {d}, {d}).")


METHOD = register(
    Method(
        name="c3a",
        config=C3AConfig,
        kinds=KINDS,
        keys={"c3a_kernel": "c3a_kernel"},
        init=init,
        after=after,
        folds=lambda layer, p, x: len(layer.site.shape) > 2,
        weight=weight,
        check=check,
        reads=frozenset(),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            "c3a",
            "C3A",
            "c3a_",
            classes={"linear": "C3ALinear", "hf_conv1d": "C3ALinear"},
            label="c3a.",
            attributes={"block_size": "block_size"},
        ),
    )
)
