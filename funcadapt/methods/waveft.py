"""WaveFT: few coefficients of a wavelet transform of the weight's update are trained.

    y = W x + b + D x,      D = scaling * F_out S F_in^T,      S[u, v] = c at n places, and 0 elsewhere

F_out and F_in are one level of an inverse wavelet transform, of the outputs and of the inputs: the first half of the
coefficients times shifts by two of the low-pass filter, the second half times those of the high-pass filter. With
`use_idwt=False` D = scaling * S.

Leaves: `waveft_spectrum` (n), n = n_frequency; with `proportional_parameters` n = max(1, round(N n_frequency a / A))
for N layers whose weights have A entries together, a of them at the layer, and every expert is a layer. The places are
in no checkpoint: they follow from `random_loc_seed` and the shapes. Derived: `places` (2, n), in S, which is larger
than W by the length L of the filters less 2, made even; and `filters` (2, L).
Init: zeros, the identity; normal with a deviation of 0.01 with `init_weights=False`.
Cost: n parameters a layer; 2 L (in + out) + 2 n flops a token forward, by a transform of x, a sparse product and a
transform of the result, no matrix of the size of W. For more than 2 (in + out) coefficients and many tokens D is built:
2 in out flops a token and 2 L in out a call. Twice that backward.
Dense form: W + D. Convolutions and embeddings, where in is the size of a row of the weight, build D.

Source: Bilican et al. 2025, arXiv:2505.12532.
Differs from PEFT: no transform of a dense matrix per call; `wavelet_family` "coif5" works, and the families without
filters are refused by the config, not by the first call (see `funcadapt/parts/wavelets.py`). Also on embeddings,
convolutions (in each group), multi-head attention and plain parameters; `torch.func` transforms work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import targets
from funcadapt.errors import did_you_mean
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts import wavelets
from funcadapt.parts.forms import KINDS, add_sparse, add_weight, is_dense, matrix, sparse
from funcadapt.parts.spectra import (
    FOURIER,
    SpectralConfig,
    check_number,
    check_spectrum,
    places,
    proportional,
    scaled,
)
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFTConfig(SpectralConfig):
    """Config of WaveFT, with PEFT's fields: those of `SpectralConfig`, and some more.

    Attributes:
        n_frequency: how many coefficients are trained at each layer.
        scaling: the factor of the update.
        wavelet_family: "db1" to "db10", "sym2" to "sym10", "coif1" to "coif5".
        use_idwt: whether the coefficients are those of a wavelet transform, or entries of the weight.
        random_loc_seed: the seed of the places of the coefficients; equal layers have equal places.
        proportional_parameters: as many coefficients in all, shared out by the sizes of the layers: `n_frequency` is
            then their mean, and `n_frequency_pattern` has no effect.
        init_weights: whether they start at zero.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "WAVEFT"
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    proportional_parameters: bool = False
    init_weights: bool = True

    target_table: ClassVar[targets.Targets] = {
        name: modules for name, modules in FOURIER.items() if name not in ("btlm", "rwkv", "rwkv7")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in wavelets.NAMES:
            raise ValueError(f"Wavelet family {self.wavelet_family} not supported."
                             f"{did_you_mean(self.wavelet_family, wavelets.NAMES)}")  # fmt: skip


def init(site: Site, config: WaveFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`waveft_spectrum`: zeros, or normal numbers if `init_weights` is false; see `share` for proportional ones."""
    return Fresh({} if config.proportional_parameters else _start(site, config, draw, config.n_frequency), {})


def _start(site: Site, config: WaveFTConfig, draw: Draw, *shape: int) -> dict[str, Tensor]:
    check_number(site, shape[-1])
    # not the draw's own `normal`: PEFT multiplies here, which rounds the last bit differently
    return {"waveft_spectrum": draw.zeros(*shape) if config.init_weights else Draw.normal(draw, *shape, std=0.01)}


def derive(site: Site, config: WaveFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The places of the coefficients, and the filters; see `share` for proportional ones."""
    return {} if config.proportional_parameters else _where(site, config, draw, config.n_frequency)


def share(sites: Sequence[Site], config: WaveFTConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """All that each site has, where the number of its coefficients depends on the others."""
    at: dict[str, dict[str, Tensor]] = {}
    for site, n in proportional(sites, config.n_frequency) if config.proportional_parameters else ():
        lead = site.stack if site.experts > 1 else ()
        frozen = {k: v.expand(*lead, *v.shape).clone() for k, v in _where(site, config, draw, n).items()}
        at[site.path] = {**_start(site, config, draw, *lead, n), **frozen}
    return Shared({}, {}, at)


def _where(site: Site, config: WaveFTConfig, draw: Draw, n: int) -> dict[str, Tensor]:
    at = places(site, n, config.random_loc_seed, draw)
    if not config.use_idwt:
        return {"places": at}
    both = wavelets.filters(config.wavelet_family)
    padded = [_padded(size, len(both[0])) for size in matrix(site)]
    # in the middle of S; PEFT's order of the details takes the inputs' half for the outputs and the other way round
    half_out, half_in = (size // 2 for size in padded)
    u, v = (at[i] + (padded[i] - size) // 2 for i, size in enumerate(matrix(site)))
    at = torch.stack([u % half_out + v // half_in * half_out, v % half_in + u // half_out * half_in])
    return {"places": at, "filters": draw.cast(torch.tensor(both, dtype=torch.float64, device="cpu"))}


def _padded(size: int, length: int) -> int:
    """How many coefficients there are for so many values."""
    return (size + length - 1) // 2 * 2


def synthesis(h: Tensor, filters: Tensor, size: int) -> Tensor:
    """F h: values (*batch, size) of coefficients (*batch, 2 k)."""
    pairs = h.reshape(-1, 2, h.shape[-1] // 2)
    values = F.conv_transpose1d(pairs, filters.unsqueeze(1), stride=2).squeeze(1)
    return values.narrow(-1, filters.shape[-1] - 2, size).reshape(*h.shape[:-1], size)


def analysis(x: Tensor, filters: Tensor) -> Tensor:
    """F^T x: (*batch, 2 k) of values (*batch, size)."""
    size, length = x.shape[-1], filters.shape[-1]
    even = F.pad(x, (0, 1)) if size % 2 else x
    pairs = F.conv1d(even.reshape(-1, 1, even.shape[-1]), filters.unsqueeze(1), stride=2, padding=length - 2)
    return pairs.reshape(*x.shape[:-1], _padded(size, length))


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """D as a weight of the layer's shape."""
    c, (out, inputs) = scaled(layer, p, "waveft_spectrum"), matrix(layer.site)
    if "filters" not in p:
        delta = sparse((out, inputs), p["places"], c)
    else:
        filters = p["filters"].to(c.dtype)
        length = filters.shape[-1]
        delta = sparse((_padded(out, length), _padded(inputs, length)), p["places"], c)
        delta = synthesis(synthesis(delta, filters, inputs).t(), filters, out).t()
    return delta.reshape(layer.site.shape).to(p["waveft_spectrum"].dtype)


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether D is made as a matrix for an input."""
    return is_dense(layer, p["waveft_spectrum"].shape[-1], x)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + D x, in y's dtype."""
    site, c = layer.site, scaled(layer, p, "waveft_spectrum")
    out = site.out_features
    if folds(layer, p, x):
        return add_weight(layer, x, y, delta_weight(layer, p))
    if "filters" not in p:
        return add_sparse(y, x, p["places"], c).to(y.dtype)
    wide = torch.promote_types(x.dtype, c.dtype)
    filters = p["filters"].to(wide)
    none = c.new_zeros(*x.shape[:-1], _padded(out, filters.shape[-1]))
    h = add_sparse(none, analysis(x.to(wide), filters), p["places"], c)
    return (y + synthesis(h, filters, out)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + D; the bias stays."""
    return (weight + delta_weight(layer, p)).to(weight.dtype), bias


def check(config: WaveFTConfig, path: str, p: Leaf) -> None:
    """As many numbers as the config says, if it does: the model says how many are proportional, see `shapes`."""
    n = None if config.proportional_parameters else config.at(path).n_frequency
    check_spectrum(path, p, "waveft_spectrum", n)


def shapes(site: Site, config: WaveFTConfig, p: Leaf) -> dict[str, tuple[int, ...]]:
    """As many numbers as places."""
    n = p["places"].shape[-1] if config.proportional_parameters and "places" in p else config.n_frequency
    return {"waveft_spectrum": (*site.stack, n)}


METHOD = register(
    Method(
        name="waveft",
        config=WaveFTConfig,
        kinds=KINDS,
        keys={"waveft_spectrum": "waveft_spectrum"},
        init=init,
        derive=derive,
        share=share,
        after=after,
        folds=folds,
        weight=weight,
        check=check,
        shapes=shapes,
        reads=frozenset({"scaling", "use_idwt"}),
        view=View(
            "waveft",
            "WaveFT",
            "waveft_",
            classes={"linear": "WaveFTLinear", "hf_conv1d": "WaveFTLinear"},
            label="waveft.",
            attributes={
                "waveft_n_frequency": lambda config, p: p["waveft_spectrum"].shape[-1],
                "waveft_scaling": "scaling",
                "waveft_random_loc_seed": "random_loc_seed",
                "waveft_wavelet_family": "wavelet_family",
                "waveft_use_idwt": "use_idwt",
            },
        ),
    )
)
