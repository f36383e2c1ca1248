"""WaveFT: few coefficients of a wavelet transform of the weight's update are trained.

    y = W x + b + D x,      D = scaling * F_out S F_in^T,      S[u, v] = c at n places, and 0 elsewhere

F_out and F_in are one level of an inverse wavelet transform, of the outputs and of the inputs: the first half of the
coefficients times shifts by two of the low-pass filter, the second half times those of the high-pass filter. With
`use_idwt=False` D = scaling * S.

Leaves: `waveft_spectrum` (n), n = n_frequency. The places are in no checkpoint: they follow from `random_loc_seed` and
the shape. Derived: `places` (2, n), in S, which is larger than W by the length L of the filters less 2, made even; and
`filters` (2, L).
Init: zeros, the identity; normal with a deviation of 0.01 with `init_weights=False`.
Cost: n parameters a layer; 2 L (in + out) + 2 n flops a token forward, by a transform of x, a sparse product and a
transform of the result, no matrix of the size of W. For more than 2 (in + out) coefficients and many tokens D is built:
2 in out flops a token and 2 L in out a call. Twice that backward.
Dense form: W + D. Convolutions and embeddings, where in is the size of a row of the weight, build D.

Source: Bilican et al. 2025, arXiv:2505.12532.
Differs from PEFT: no transform of a dense matrix per call; `wavelet_family` "coif5" works, and the families without
filters are refused by the config, not by the first call (see `funcadapt/wavelets.py`). Also on embeddings,
convolutions (in each group), multi-head attention and plain parameters; `torch.func` transforms work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import targets, wavelets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError, did_you_mean
from funcadapt.forms import KINDS, add_sparse, add_weight, is_cheap, matrix, sparse
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.methods.fourierft import FOURIER, places
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    """Config of WaveFT, with PEFT's fields.

    Attributes:
        n_frequency: how many coefficients are trained at each layer.
        scaling: the factor of the update.
        wavelet_family: "db1" to "db10", "sym2" to "sym10", "coif1" to "coif5".
        use_idwt: whether the coefficients are those of a wavelet transform, or entries of the weight.
        random_loc_seed: the seed of the places of the coefficients; equal layers have equal places.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        bias: "none", "all" (train every bias of the model) or "waveft_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        n_frequency_pattern: how many coefficients, by regular expression of the site path.
        proportional_parameters: as many coefficients in all, shared out by the sizes of the layers.
        init_weights: whether they start at zero.

    Raises:
        ValueError: if the values contradict each other.
        NotImplementedError: if `proportional_parameters` is set.
    """

    peft_type: str = "WAVEFT"
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    n_frequency_pattern: Mapping[str, int] | None = dataclasses.field(default_factory=dict[str, int])
    proportional_parameters: bool = False
    init_weights: bool = True

    patterned: ClassVar[Mapping[str, str]] = {"n_frequency": "n_frequency_pattern"}
    target_table: ClassVar[targets.Targets] = {
        name: modules for name, modules in FOURIER.items() if name not in ("btlm", "rwkv", "rwkv7")
    }
    unsupported: ClassVar[frozenset[str]] = frozenset({"proportional_parameters"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, n in {"n_frequency": self.n_frequency, **(self.n_frequency_pattern or {})}.items():
            if n <= 0:
                raise ValueError(f"`n_frequency` should be a positive integer value but the value passed is {n} "
                                 f"({name!r}).")  # fmt: skip
        if self.wavelet_family not in wavelets.NAMES:
            raise ValueError(f"Wavelet family {self.wavelet_family} not supported."
                             f"{did_you_mean(self.wavelet_family, wavelets.NAMES)}")  # fmt: skip
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def init(site: Site, config: WaveFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`waveft_spectrum`: zeros, or small normal numbers if `init_weights` is false."""
    n, (out, inputs) = config.n_frequency, matrix(site)
    if n > out * inputs:
        raise SiteError(f"n_frequency={n} is more than the {out * inputs} entries of the weight of {site.path!r}.")
    return Fresh({"waveft_spectrum": draw.zeros(n) if config.init_weights else draw.normal(n, std=0.01)}, {})


def derive(site: Site, config: WaveFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The places of the coefficients, and the filters."""
    at = places(site, config.n_frequency, config.random_loc_seed, draw)
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


def _spectrum(layer: Layer, p: Leaf) -> Tensor:
    """The numbers, scaled, in 32 bits at least, as many as places."""
    config, c = layer.config, p["waveft_spectrum"]
    assert isinstance(config, WaveFTConfig)
    return c.reshape(p["places"].shape[1:]).to(torch.promote_types(c.dtype, torch.float32)) * config.scaling


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """D as a weight of the layer's shape."""
    c, (out, inputs) = _spectrum(layer, p), matrix(layer.site)
    if "filters" not in p:
        delta = sparse((out, inputs), p["places"], c)
    else:
        filters = p["filters"].to(c.dtype)
        length = filters.shape[-1]
        delta = sparse((_padded(out, length), _padded(inputs, length)), p["places"], c)
        delta = synthesis(synthesis(delta, filters, inputs).t(), filters, out).t()
    return delta.reshape(layer.site.shape).to(p["waveft_spectrum"].dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + D x, in y's dtype."""
    site, c = layer.site, _spectrum(layer, p)
    out, inputs = matrix(site)
    if site.kind == "embedding" or len(site.shape) > 2 or not is_cheap((out, inputs), len(c), x):
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
    """As many numbers as the config says."""
    shape, n = tuple(p["waveft_spectrum"].shape) if "waveft_spectrum" in p else (), config.at(path).n_frequency
    if len(shape) not in (1, 2) or shape[-1:] != (n,):
        raise SiteError(f"The site {path!r} has waveft_spectrum of shape {shape}, its config says ({n},).")


METHOD = register(
    Method(
        name="waveft",
        config=WaveFTConfig,
        kinds=KINDS,
        keys={"waveft_spectrum": "waveft_spectrum"},
        init=init,
        derive=derive,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"scaling", "use_idwt"}),
        view=View(
            "waveft",
            "WaveFT",
            "waveft_",
            classes={"linear": "WaveFTLinear", "hf_conv1d": "WaveFTLinear"},
            label="waveft.",
            attributes={
                "waveft_n_frequency": "n_frequency",
                "waveft_scaling": "scaling",
                "waveft_random_loc_seed": "random_loc_seed",
                "waveft_wavelet_family": "wavelet_family",
                "waveft_use_idwt": "use_idwt",
            },
        ),
    )
)
