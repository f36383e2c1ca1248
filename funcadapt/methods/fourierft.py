"""FourierFT: few frequencies of the weight's update are trained.

    y = W x + b + D x,      D = scaling * Re(ifft2(S)),      S[u, v] = c at n places, and 0 elsewhere

that is D[o, i] = scaling / (out in) * sum_j c[j] cos(2 pi (u[j] o / out + v[j] i / in)).

Leaves: `fourierft_spectrum` (n), n = n_frequency. The places are in no checkpoint: they follow from `random_loc_seed`
and the shape. Derived: `places` (2, n), u and v; and for the form below `waves` (2, n) and `parts` (2, n).
Init: normal numbers, which is no identity, as in PEFT; zeros with `init_weights=True`.
Cost: n parameters a layer. The cosine of a sum is one of products, so D x needs a value at v[j] of the transform of x,
and gives one at u[j] of the transform of the output: 5/2 (in log2(in) + out log2(out)) + 8 n flops a token forward, no
matrix of the size of W. For more than 2 in out / n tokens D is built, and the layer runs with W + D: no flops a
token, and 5 in out log2(in out) a call. Twice that backward.
Dense form: W + D. Convolutions and embeddings, where in is the size of a row of the weight, build D.

Source: Gao et al. 2024, arXiv:2405.03003.
Differs from PEFT: no transform of a dense matrix per call; float64 stays float64; also on embeddings, convolutions (in
each group), multi-head attention and plain parameters; `torch.func` transforms work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_weight, certain, is_dense, matrix, sparse
from funcadapt.parts.spectra import FOURIER, SpectralConfig, check_number, check_spectrum, places, scaled
from funcadapt.sites import Site

fft: Any = torch.fft  # a C extension without types


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTConfig(SpectralConfig):
    """Config of FourierFT, with PEFT's fields: those of `SpectralConfig`, and some more.

    Attributes:
        n_frequency: how many frequencies are trained at each layer.
        scaling: the factor of the update.
        random_loc_seed: the seed of the places of the frequencies; equal layers have equal places.
        init_weights: whether they start at zero.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    init_weights: bool = False

    target_table: ClassVar[targets.Targets] = FOURIER

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ValueError("`random_loc_seed` must be a number: the places of the frequencies follow from it.")


def init(site: Site, config: FourierFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`fourierft_spectrum`: normal numbers, or zeros if `init_weights`."""
    n = config.n_frequency
    check_number(site, n)
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


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """D as a weight of the layer's shape."""
    dense = sparse(matrix(layer.site), p["places"], scaled(layer, p, "fourierft_spectrum"))
    return fft.ifft2(dense).real.reshape(layer.site.shape).to(p["fourierft_spectrum"].dtype)


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether there are so many tokens that the inverse transform of S pays."""
    return is_dense(layer, p["fourierft_spectrum"].shape[-1], x, gain=4)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + D x, in y's dtype."""
    (out, inputs), c = matrix(layer.site), scaled(layer, p, "fourierft_spectrum")
    if certain(x.numel() == 0) or folds(layer, p, x):  # MKL has no transform of no row
        return add_weight(layer, x, y, delta_weight(layer, p))
    u, v = p["waves"]
    spectrum = torch.view_as_real(fft.rfft(x.to(torch.promote_types(x.dtype, c.dtype)))).mT
    values = spectrum.index_select(-1, v) * (c / (2 * inputs) * p["parts"])
    waves = values.new_zeros(*x.shape[:-1], 2, out // 2 + 1).scatter_add(-1, u.expand(values.shape), values)
    return (y + fft.irfft(torch.view_as_complex(waves.mT.contiguous()), n=out)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + D; the bias stays."""
    return (weight + delta_weight(layer, p)).to(weight.dtype), bias


def check(config: FourierFTConfig, path: str, p: Leaf) -> None:
    """As many numbers as the config says."""
    check_spectrum(path, p, "fourierft_spectrum", config.at(path).n_frequency)


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
        folds=folds,
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
