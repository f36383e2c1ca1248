"""FourierFT: few frequencies of the weight's update are trained.

    y = W x + b + D x,      D = scaling * Re(ifft2(S)),      S[u, v] = c at n places, and 0 elsewhere

that is D[o, i] = scaling / (out in) * sum_j c[j] cos(2 pi (u[j] o / out + v[j] i / in)).

Leaves: `fourierft_spectrum` (n), n = n_frequency. The places are in no checkpoint: they follow from `random_loc_seed`
and the shape. Derived: `places` (2, n), u and v; and for the form below `waves` (2, n) and `parts` (2, n).
Init: normal numbers, which is no identity, as in PEFT; zeros with `init_weights=True`.
Cost: n parameters a layer. The cosine of a sum is one of products, so D x needs a value at v[j] of the transform of x,
and gives one at u[j] of the transform of the output: 5/2 (in log2(in) + out log2(out)) + 8 n flops a token forward, no
matrix of the size of W. For more than 2 (in + out) frequencies and many tokens D is built: 2 in out flops a token and
5 in out log2(in out) a call. Twice that backward.
Dense form: W + D. Convolutions and embeddings, where in is the size of a row of the weight, build D.

Source: Gao et al. 2024, arXiv:2405.03003.
Differs from PEFT: no transform of a dense matrix per call; float64 stays float64; also on embeddings, convolutions (in
each group), multi-head attention and plain parameters; `torch.func` transforms work.
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
from funcadapt.forms import KINDS, add_weight, is_cheap, matrix, sparse
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site

fft: Any = torch.fft  # a C extension without types

FOURIER: targets.Targets = {**targets.LORA, "gpt2": ("mlp.c_proj",), "gpt_bigcode": ("mlp.c_proj",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """Config of FourierFT, with PEFT's fields.

    Attributes:
        n_frequency: how many frequencies are trained at each layer.
        scaling: the factor of the update.
        random_loc_seed: the seed of the places of the frequencies; equal layers have equal places.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        bias: "none", "all" (train every bias of the model) or "fourier_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        n_frequency_pattern: how many frequencies, by regular expression of the site path.
        init_weights: whether they start at zero.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    n_frequency_pattern: Mapping[str, int] | None = dataclasses.field(default_factory=dict[str, int])
    init_weights: bool = False

    patterned: ClassVar[Mapping[str, str]] = {"n_frequency": "n_frequency_pattern"}
    target_table: ClassVar[targets.Targets] = FOURIER

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ValueError("`random_loc_seed` must be a number: the places of the frequencies follow from it.")
        for name, n in {"n_frequency": self.n_frequency, **(self.n_frequency_pattern or {})}.items():
            if n <= 0:
                raise ValueError(f"`n_frequency` should be a positive integer value but the value passed is {n} "
                                 f"({name!r}).")  # fmt: skip
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def places(site: Site, n: int, seed: int, draw: Draw) -> Tensor:
    """Rows and columns (2, n) of a random subset of the weight's entries, as PEFT draws it.

    Args:
        site: the site.
        n: how many.
        seed: the seed.
        draw: says the device.

    Returns:
        The places.

    Raises:
        SiteError: if the weight has not so many.
    """
    out, inputs = matrix(site)
    if n > out * inputs:
        raise SiteError(f"n_frequency={n} is more than the {out * inputs} entries of the weight of {site.path!r}.")
    if draw.abstract:
        return torch.zeros(2, n, dtype=torch.long, device=draw.device)
    flat = torch.randperm(out * inputs, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([flat // inputs, flat % inputs]).to(draw.device)


def init(site: Site, config: FourierFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`fourierft_spectrum`: normal numbers, or zeros if `init_weights`."""
    n, size = config.n_frequency, math.prod(site.shape)
    if n > size:
        raise SiteError(f"n_frequency={n} is more than the {size} entries of the weight of {site.path!r}.")
    return Fresh({"fourierft_spectrum": draw.zeros(n) if config.init_weights else draw.normal(n)}, {})


def derive(site: Site, config: FourierFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The places of the frequencies, and where they are in transforms of real numbers, which have half the places.

    A wave and the one with both frequencies negated are the same. So v is made at most in / 2 with u negated along; and
    where u is more than out / 2 then, the conjugate value is added at -u. `irfft` counts all but the first and the last
    place twice.

    Args:
        site: the site.
        config: the config at it.
        draw: says the device.
        weight: not used.

    Returns:
        `places`, `waves` and `parts`: twice the factors of the real and of the imaginary part.
    """
    out, inputs = matrix(site)
    assert config.random_loc_seed is not None
    both = places(site, config.n_frequency, config.random_loc_seed, draw)
    u, v = both
    far = 2 * v > inputs
    u, v = torch.where(far, (out - u) % out, u), torch.where(far, inputs - v, v)
    over = 2 * u > out
    u = torch.where(over, out - u, u)
    real = torch.where((u == 0) | (2 * u == out), 2, 1)
    # the value of x at +v is the conjugate of the one that `rfft` gives, at -v
    parts = torch.stack([real, torch.where(over, real, -real)]).to(torch.int8)
    return {"places": both, "waves": torch.stack([u, v]), "parts": parts}


def _spectrum(layer: Layer, p: Leaf) -> Tensor:
    """The numbers, scaled, in 32 bits at least, as many as places."""
    config, c = layer.config, p["fourierft_spectrum"]
    assert isinstance(config, FourierFTConfig)
    return c.reshape(p["places"].shape[1:]).to(torch.promote_types(c.dtype, torch.float32)) * config.scaling


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """D as a weight of the layer's shape."""
    dense = sparse(matrix(layer.site), p["places"], _spectrum(layer, p))
    return fft.ifft2(dense).real.reshape(layer.site.shape).to(p["fourierft_spectrum"].dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + D x, in y's dtype."""
    site = layer.site
    out, inputs = matrix(site)
    c = _spectrum(layer, p)
    if site.kind == "embedding" or len(site.shape) > 2 or not is_cheap((out, inputs), len(c), x):
        return add_weight(layer, x, y, delta_weight(layer, p))
    u, v = p["waves"]
    spectrum = torch.view_as_real(fft.rfft(x.to(torch.promote_types(x.dtype, c.dtype))))
    values = spectrum.index_select(-2, v) * (c / (2 * inputs) * p["parts"]).t()
    waves = values.new_zeros(*x.shape[:-1], out // 2 + 1, 2).index_add(-2, u, values)
    return (y + fft.irfft(torch.view_as_complex(waves), n=out)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + D; the bias stays."""
    return (weight + delta_weight(layer, p)).to(weight.dtype), bias


def check(config: FourierFTConfig, path: str, p: Leaf) -> None:
    """As many numbers as the config says."""
    shape, n = tuple(p["fourierft_spectrum"].shape) if "fourierft_spectrum" in p else (), config.at(path).n_frequency
    if len(shape) not in (1, 2) or shape[-1:] != (n,):
        raise SiteError(f"The site {path!r} has fourierft_spectrum of shape {shape}, its config says ({n},).")


def warm(site: Site, config: FourierFTConfig, draw: Draw) -> None:
    """PEFT draws the numbers before it sets them to zero."""
    if config.init_weights:
        draw.normal(config.n_frequency)


METHOD = register(
    Method(
        name="fourierft",
        config=FourierFTConfig,
        kinds=KINDS,
        keys={"fourierft_spectrum": "fourierft_spectrum"},
        init=init,
        derive=derive,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"scaling"}),
        view=View(
            "fourierft",
            "FourierFT",
            "fourierft_",
            classes={"linear": "FourierFTLinear", "hf_conv1d": "FourierFTLinear"},
            label="fourierft.",
            attributes={
                "fourierft_n_frequency": "n_frequency",
                "fourierft_scaling": "scaling",
                "fourierft_random_loc_seed": "random_loc_seed",
            },
            warm=warm,
        ),
    )
)
