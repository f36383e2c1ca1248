"""Arrow: several LoRAs, and for every token the few of them that its direction fits best. Nothing is trained for it.

    y = W x + b + s * sum_e c_e(x) g_e B_e A_e x
    c(x) = softmax over the top k of |v_e . x| / temperature, 0 elsewhere

v_e, the prototype of expert e, is the top right singular vector of B_e A_e: the direction that the expert amplifies
most. g_e is the expert's scaling over s, the first one's. GenKnowSub, `arrow_leaves.without_general`, takes what
general adapters have in common out of the experts before.

`arrow` makes an Arrow adapter of LoRAs, and `experts` gives them back. Its leaves, for E experts: `lora_arrow_A`
(E, r, in), `lora_arrow_B` (E, out, r); the constants `lora_arrow_gains` (E) and `lora_arrow_prototypes` (E, in). They
do not follow A and B where these are trained, as in PEFT. `fa.init` makes as many new LoRAs as `arrow_config` has
`task_adapter_names`.
Cost: E (r (in + out) + in) numbers a layer; 2 E r (in + out) flops a token, in two products, and nothing of E times the
output's size.
There is no dense form, as each token has its own.

Prototypes are exact, by QRs of the factors and an SVD of (r, r). With a `rng_seed` they are PEFT's: 15 steps of the
power iteration from a random vector of that seed, which may be far from the limit where two singular values are close.

Source: Ostapenko et al. 2024, arXiv:2405.11157; GenKnowSub: Bagherifard et al. 2025, arXiv:2505.10939. Differs from
PEFT: experts may have different ranks; those with a bias in B are refused (PEFT leaves the bias out); checkpoints hold
the experts (PEFT's hold an A and a B that nothing reads), and the experts themselves stay as they are (PEFT's
GenKnowSub changes them in place).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.errors import AdapterError, SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, method_of, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms
from funcadapt.parts.arrow_leaves import (
    GAINS,
    LEAVES,
    PROTOTYPES,
    A,
    B,
    Settings,
    check,
    describe,
    prototypes,
    settings_of,
    stacked,
    without_general,
)
from funcadapt.parts.lora_variants import asks, check_init
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.adapter import Adapter


def _check_config(config: lora.LoraConfig) -> None:
    settings_of(config)
    check_init(config)
    for field in ("lora_bias", "lora_dropout"):
        if getattr(config, field):
            raise ValueError(f"Arrow does not go with {field}={getattr(config, field)}.")


def arrow(
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    *,
    general: Sequence[Adapter] = (),
    top_k: int = 3,
    router_temperature: float = 1.0,
    rng_seed: int | None = None,
) -> Adapter:
    """One adapter that routes every token among several LoRAs.

    Args:
        adapters: the experts, by name if they are to have other names than "task_0" and so on.
        general: adapters that know what all of the experts know: their mean is subtracted (GenKnowSub).
        top_k: how many experts a token uses, at most as many as there are.
        router_temperature: of the softmax over their fits.
        rng_seed: if given, the prototypes are PEFT's, see above.

    Returns:
        The adapter.

    Raises:
        AdapterError: if an adapter is no plain LoRA, or they are at different layers.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.methods.arrow import arrow
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> both = arrow([fa.init(model, config, seed=i) for i in range(2)], top_k=1)
        >>> {name: tuple(leaf.shape) for name, leaf in both.params["0"].items()}
        {'lora_arrow_A': (2, 2, 4), 'lora_arrow_B': (2, 3, 2)}
        >>> fa.functional_call(model, both, (torch.randn(5, 4),)).shape
        torch.Size([5, 3])
    """
    from funcadapt.stacking import stack  # it builds on the methods

    named = dict(adapters) if isinstance(adapters, Mapping) else {f"task_{i}": a for i, a in enumerate(adapters)}
    if not named:
        raise AdapterError("arrow needs at least one adapter.")
    rest = {f"gks_{i}": a for i, a in enumerate(general)}
    first = next(iter(named.values()))
    for name, adapter in {**named, **rest}.items():
        _check_expert(name, adapter, first)
    together = stack([*named.values(), *rest.values()])
    n = len(named)
    params: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    for path in together.params:
        every = together.leaves(path)  # padded to one rank
        found: list[Leaf] = [{name: leaf[i] for name, leaf in every.items()} for i in range(n + len(rest))]
        if general:
            found[:n] = [without_general(p, found[n:]) for p in found[:n]]
        scaling = found[0]["scaling"]
        made = stacked(found[:n], float(scaling), rng_seed)
        params[path] = {name: made.pop(name) for name in (A, B)}
        buffers[path] = {"scaling": scaling, **made}
    given = Settings(top_k, router_temperature, bool(general), list(named), list(rest), rng_seed)
    new: dict[str, Any] = {"arrow_config": dataclasses.asdict(given), "r": max(p[A].shape[1] for p in params.values())}
    config = dataclasses.replace(first.config, **new, lora_dropout=0.0, init_lora_weights=True)
    adapter = first.replace(params=params, buffers=buffers, config=config)
    return adapter.replace(config=describe(adapter.config, {path: adapter.leaves(path) for path in params}))


def _check_expert(name: str, adapter: Adapter, first: Adapter) -> None:
    if method_of(adapter.config) is not lora.METHOD or adapter.config.lora_bias:  # pyright: ignore
        raise AdapterError(f"arrow: {name!r} is no plain LoRA without a bias.")
    if adapter.params.keys() != first.params.keys():
        other = sorted(adapter.params.keys() ^ first.params.keys())[0]
        raise AdapterError(f"arrow: the experts must be at the same layers, but {name!r} differs at {other!r}.")
    for path, p in adapter.params.items():
        if set(p) != {"lora_A", "lora_B"} or p["lora_A"].ndim != 2:
            raise AdapterError(f"arrow: {name!r} is at {path!r}, which is no linear layer.")


def experts(adapter: Adapter) -> dict[str, Adapter]:
    """The LoRAs of an Arrow adapter, less what GenKnowSub took away.

    Args:
        adapter: an Arrow adapter.

    Returns:
        The LoRAs by name.
    """
    config: Any = dataclasses.replace(adapter.config, arrow_config=None)  # pyright: ignore
    found: dict[str, Adapter] = {}
    for i, name in enumerate(settings_of(adapter.config).task_adapter_names or ()):
        params = {path: {"lora_A": p[A][i], "lora_B": p[B][i]} for path, p in adapter.params.items()}
        buffers = {path: {"scaling": p["scaling"] * p[GAINS][i]} for path, p in adapter.buffers.items()}
        one = adapter.replace(params=params, buffers=buffers, config=config)
        found[name] = one.replace(config=lora.describe(config, {path: one.leaves(path) for path in params}))
    return found


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """As many new LoRAs as there are names."""
    n = len(settings_of(config).task_adapter_names or ())
    if not n:
        raise SiteError(
            f"Arrow at {site.path!r} needs experts: make it of trained LoRAs by funcadapt.methods.arrow.arrow, or name "
            "new ones, arrow_config={'task_adapter_names': [...]}."
        )
    made = [lora.init(site, config, draw, weight) for _ in range(n)]
    a, b = (torch.stack([p.params[name] for p in made]) for name in ("lora_A", "lora_B"))
    vectors = draw.zeros(n, site.in_features) if draw.abstract else prototypes(a, b, settings_of(config).rng_seed)
    return Fresh({A: a, B: b}, {**made[0].buffers, GAINS: draw.ones(n), PROTOTYPES: vectors})


def routing(x: Tensor, vectors: Tensor, top_k: int, temperature: float) -> Tensor:
    """How much each token uses each expert.

    Args:
        x: (..., in).
        vectors: the prototypes, (E, in).
        top_k: how many experts a token uses.
        temperature: of the softmax.

    Returns:
        (..., E): sums to 1, with `top_k` numbers that are not 0.
    """
    fit = F.linear(x, vectors).abs()
    best, index = fit.topk(top_k, -1)
    return torch.softmax(torch.full_like(fit, float("-inf")).scatter(-1, index, best) / temperature, -1)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * sum_e c_e(x) g_e B_e A_e x."""
    config: Any = layer.config
    given, site = config.arrow_config, layer.site  # the dict itself, which torch.compile can look into
    top_k, temperature = given.get("top_k", 3), given.get("router_temperature", 1.0)
    n, r = p[A].shape[:2]
    a = p[A].reshape(n * r, site.in_features)
    b = p[B].reshape(n, site.out_features, r).transpose(0, 1).reshape(site.out_features, n * r)
    if top_k > n:
        raise SiteError(f"Arrow at {site.path!r} has {n} experts, fewer than top_k={top_k}.")
    x = x.to(a.dtype)
    c = routing(x, p[PROTOTYPES].reshape(n, site.in_features), top_k, temperature)
    c = c * (p[GAINS] * p["scaling"])
    h = F.linear(x, a)
    h = (h.reshape(*c.shape, r) * c.unsqueeze(-1)).reshape(h.shape)
    return (y + F.linear(h, b)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """There is none.

    Args:
        layer: the layer.
        p: the leaves.
        weight: its weight.
        bias: its bias.

    Raises:
        SiteError: always.
    """
    raise SiteError(f"Arrow at {layer.site.path!r} has a weight for every token, so it cannot be merged.")


METHOD = register(
    Method(
        name="arrow",
        config=lora.LoraConfig,
        when=asks("arrow_config", check=_check_config),
        kinds=lora_forms.PRODUCTS,
        keys={name: name for name in LEAVES},
        init=init,
        constants=frozenset({GAINS, PROTOTYPES}),
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=describe,
        check=check,
        reads=frozenset({"arrow_config"}),
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
