"""Super-Tuning: the entries of the weight that are largest (or smallest) are trained; Supra: and a LoRA beside them.

    y = W x + b + S x [+ s * B A drop(x)],      S has v at n places, and 0 elsewhere      s = lora_alpha / r

Leaves: `supertuning_values` (n), n = in out (1 - sparsity); the constant `supertuning_indices` (n) int32, the places in
the flattened weight; with `r` also `supertuning_lora_A` (r, in) and `supertuning_lora_B` (out, r). The places are in
checkpoints, or, with `save_precomputed_indices=False`, follow from the base weight: then loading needs the model.
Init: v zero, A kaiming-uniform, B zero: the identity. Normal v and uniform B with `init_weights=False`.
Cost: n [+ r (in + out)] parameters a layer. Few tokens: 2 n flops each, by gathering inputs and adding to outputs.
Otherwise n, and a matrix of the size of W a call: the layer runs with the dense form, as in `shira`. LoRA's are
2 r (in + out). Twice that backward.
Dense form: W + S [+ s * B A]. Convolutions and embeddings: in is the size of a row of the weight.

Source: arXiv:2607.09287.
Differs from PEFT: the base layer runs in its quantisation. Also on transformers' Conv1D, embeddings, convolutions (in
each group), multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.methods.shira import has_duplicates
from funcadapt.parts import lora_forms
from funcadapt.parts.checks import check_rates
from funcadapt.parts.forms import KINDS, add_entries, add_sparse, add_weight, is_dense, matrix, refuse_dropout
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupertuningConfig(AdapterConfig):
    """Config of Super-Tuning, with PEFT's fields.

    Attributes:
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        modules_to_save: modules that are trained in full and saved with the adapter.
        sparsity: the share of the entries that are not trained.
        select_top: whether the largest entries are trained, or the smallest.
        r: the rank of the LoRA; None for none.
        lora_alpha: its scaling is lora_alpha / r; None for 2 r.
        lora_dropout: dropout on its input, active when the layer is in training mode.
        init_weights: whether the adapter starts as the identity.
        save_precomputed_indices: whether the places are in checkpoints. Otherwise they are computed from the base
            weight, which must be the same one.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "SUPERTUNING"
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        check_rates(self, "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha is set but r is None: it is the scaling of the LoRA, which r asks for.")
        if self.r is not None and self.r <= 0:
            raise ValueError(f"r must be a positive integer or None, got {self.r!r}")
        if self.r is not None and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.r)

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's LoRA, 0 if there is none."""
        return leaves["supertuning_lora_A"].shape[-2] if "supertuning_lora_A" in leaves else 0


def _rate(config: SupertuningConfig) -> float:
    return 0.0 if config.r is None else config.lora_dropout


def _number(site: Site, config: SupertuningConfig) -> int:
    size = math.prod(site.shape)
    n = int(size * (1 - config.sparsity))
    if not 0 < n <= size < 2**31:
        raise SiteError(
            f"sparsity={config.sparsity} trains {n} of the {size} entries of the weight of {site.path!r}: at least one "
            "is needed, and their numbers have 32 bits."
        )
    return n


def _places(site: Site, config: SupertuningConfig, draw: Draw, weight: Callable[[], Tensor]) -> Tensor:
    n = _number(site, config)
    if draw.abstract:
        return torch.zeros(n, dtype=torch.int32, device=draw.device)
    found = torch.topk(weight().detach().abs().flatten(), k=n, largest=config.select_top).indices
    return found.to(dtype=torch.int32, device=draw.device)


def layers(config: SupertuningConfig, draw: Draw, out: int, inputs: int) -> None:
    """PEFT builds A and B as layers, which draw their own init, before it draws A again."""
    draw.uniform(config.r or 0, inputs, bound=1.0)
    draw.uniform(out, config.r or 0, bound=1.0)


def init(site: Site, config: SupertuningConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The places by the weight, zeros there, and a LoRA that does nothing yet."""
    refuse_dropout(site, "lora_dropout", _rate(config))
    n, (out, inputs), zero = _number(site, config), matrix(site), config.init_weights
    params = {"supertuning_values": draw.zeros(n) if zero else draw.normal(n)}
    if draw.generator is None and not zero:  # torch's own: what PEFT's layers draw comes after the values
        layers(config, draw, out, inputs)
    if config.r is not None:
        params["supertuning_lora_A"] = draw.uniform(config.r, inputs, bound=1 / math.sqrt(inputs))
        b = draw.zeros(out, config.r) if zero else draw.uniform(out, config.r, bound=1 / math.sqrt(config.r))
        params["supertuning_lora_B"] = b
    return Fresh(params, {"supertuning_indices": _places(site, config, draw, weight)})


def derive(site: Site, config: SupertuningConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The places, where checkpoints have none."""
    return {} if config.save_precomputed_indices else {"supertuning_indices": _places(site, config, draw, weight)}


def stored(config: SupertuningConfig, path: str, p: Leaf) -> dict[str, Tensor | None]:
    """Without the places, if the config says so."""
    return {} if config.save_precomputed_indices else {"supertuning_indices": None}


def _entries(p: Leaf) -> tuple[Tensor, Tensor]:
    """Places in the flattened weight, and values, (n) each."""
    return p["supertuning_indices"].long(), p["supertuning_values"].reshape(p["supertuning_indices"].shape)


def _low_rank(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the scaling of the LoRA, if there is one."""
    config, (out, inputs) = layer.config, matrix(layer.site)
    assert isinstance(config, SupertuningConfig)
    if config.r is None or config.lora_alpha is None:
        return None
    a, b = p["supertuning_lora_A"], p["supertuning_lora_B"]
    return a.reshape(config.r, inputs), b.reshape(out, config.r), config.lora_alpha / config.r


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether there are many tokens: then one product with the dense form."""
    return is_dense(layer, p["supertuning_values"].shape[-1], x)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + S x [+ s * B A drop(x)], in y's dtype."""
    site, config, (places, values) = layer.site, layer.config, _entries(p)
    assert isinstance(config, SupertuningConfig)
    if folds(layer, p, x):
        out = add_weight(layer, x, y, add_entries(values.new_zeros(site.shape), places, values))
    else:
        out = add_sparse(y, x, torch.stack([places // site.shape[1], places % site.shape[1]]), values).to(y.dtype)
    factors = _low_rank(layer, p)
    if factors is None:
        return out
    a, b, scaling = factors
    x = dropout(layer, x, _rate(config))
    if site.groups > 1:
        return add_weight(layer, x, out, (scaling * b @ a).reshape(site.shape))
    down, up = a.reshape(-1, *site.shape[1:]), b.reshape(*b.shape, *(1,) * (len(site.shape) - 2))
    leaves = {"lora_A": down, "lora_B": up, "scaling": a.new_full((), scaling)}
    return lora_forms.add_delta(layer, leaves, x, out).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + S [+ s * B A]; the bias stays."""
    new, factors = add_entries(weight, *_entries(p)), _low_rank(layer, p)
    if factors is not None:
        a, b, scaling = factors
        new = new + (scaling * b @ a).reshape(weight.shape)
    return new.to(weight.dtype), bias


def check(config: SupertuningConfig, path: str, p: Leaf) -> None:
    """As many values as places, no place twice, and both factors if the config has a rank."""
    names = ["supertuning_values"] + ["supertuning_indices"] * config.save_precomputed_indices
    names += ["supertuning_lora_A", "supertuning_lora_B"] * (config.r is not None)
    shapes = {name: tuple(p[name].shape) for name in p if name.startswith("supertuning_")}
    values, at = shapes.get("supertuning_values"), p.get("supertuning_indices")
    ranks = (shapes[names[-2]][-2:-1] + shapes[names[-1]][-1:]) if config.r is not None and set(names) <= set(p) else ()
    if not set(names) <= set(p) or (set(names[-2:]) <= set(p) and ranks not in ((), (config.r, config.r))):
        raise SiteError(f"The site {path!r} has leaves of shapes {shapes}; its config asks for {names}, r={config.r}.")
    if at is None or at.is_meta:
        return
    if tuple(at.shape) != values or not at.numel() or at.min() < 0 or has_duplicates(at):
        raise SiteError(f"The site {path!r} has supertuning_indices that are not as many as values, below 0, or twice.")


def warm(site: Site, config: SupertuningConfig, draw: Draw) -> None:
    """What comes before all that `init` draws."""
    if config.init_weights:
        layers(config, draw, *matrix(site))


METHOD = register(
    Method(
        name="supertuning",
        config=SupertuningConfig,
        kinds=KINDS,
        keys={
            "supertuning_values": "supertuning_values",
            "supertuning_indices": "supertuning_indices",
            "supertuning_lora_A": "supertuning_lora_A.weight",
            "supertuning_lora_B": "supertuning_lora_B.weight",
        },
        constants=frozenset({"supertuning_indices"}),
        init=init,
        derive=derive,
        stored=stored,
        complete=lambda config: config.save_precomputed_indices,
        after=after,
        folds=folds,
        weight=weight,
        check=check,
        dropout=_rate,
        reads=frozenset({"r", "lora_alpha"}),
        rank_field="",  # the scaling is no leaf, so that adapters of two ranks cannot be one padded stack
        view=View("supertuning", "Supertuning", "supertuning_", buffers=frozenset({"supertuning_indices"}), warm=warm),
    )
)
