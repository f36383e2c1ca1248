"""MonteCLoRA: LoRA whose A is drawn anew in every call of the training, from a distribution that is learned with it.

    y = W x + b + s * B A' drop(x)       A' = A + sum_n w_n e_n in training, A otherwise

    e_n = c diag(v)^(1/2) z_n,   v_i = max(exp(2 t_i) q_i, 1e-3),   q_i chi-squared with r degrees of freedom
    w = softmax(m + d^(1/2) z),   a = exp(u),   m = log a - mean(log a),   d = (1 - 2/N) / a + sum(1 / a) / N^2

Each z is normal; c is `sample_scaler`, N is `num_samples`. (q is the diagonal of a Wishart matrix, w that of Dirichlet
up to Laplace's approximation.) Given w, the sum over n is a normal number of deviation |w|: it is drawn as one.
Leaves: LoRA's; trained `std_prior` (r), which is t, and `expert_weights_prior` (N), which is u; the constants
`gaussian_var_prior` (r, r) and `expert_weights` (N), which PEFT writes in training and nothing here reads.
Init: A and B as in LoRA, t and u uniform: the identity.
Cost: LoRA's; in training the draws, r in numbers a layer.
Dense form: LoRA's. `penalty` is what is added to the loss: the divergences from the priors.

Source: Sengupta et al. 2024, arXiv:2411.04358. Differs from PEFT: also on embeddings and convolutions; numbers are
drawn in the call, not in a pool of 150 for each layer, which PEFT fills when it is made (so that a seed gives PEFT's
numbers at the first layer only); `penalty` draws its own sample
(its expectation is the same) and has the Dirichlet divergence right (PEFT adds the log-gammas that are to be
subtracted, and has infinity for numbers beyond 171).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lora_inits, lora_view, lowrank
from funcadapt.parts.lora_variants import asks, setting, settings
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.adapter import Adapter

STD, EXPERTS = "std_prior", "expert_weights_prior"
_CONSTANTS = ("gaussian_var_prior", "expert_weights")
_OWN = (STD, EXPERTS, *_CONSTANTS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `monteclora_config` holds. `buffer_size` is PEFT's, and of no use here."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")


class Sample(NamedTuple):
    """What a call draws: v (r), the variances of the rows of A, and w (N), the weights."""

    variances: Tensor
    weights: Tensor


def _settings(config: Any) -> Settings:
    return settings(Settings, config.monteclora_config or {}, "monteclora_config")


def _check_config(config: lora.LoraConfig) -> None:
    _settings(config)


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves, and the two priors, uniform in (0, 1)."""
    n, r = _settings(config).num_samples, config.r
    params, buffers = lora.init(site, config, draw, weight)
    for name, size in ((STD, r), (EXPERTS, n)):
        params[name] = lora_inits.like_base(site, draw, size, bound=0.5) + 0.5
    constants = {"gaussian_var_prior": draw.cast(torch.eye(r)), "expert_weights": draw.ones(n) / n}
    return Fresh(params, {**buffers, **constants})


def sample(p: Leaf) -> Sample:
    """Draw the variances and the weights.

    Args:
        p: the leaves of a site.

    Returns:
        The sample, which depends on the leaves differentiably.
    """
    t, u = p[STD], p[EXPERTS]
    r, n = t.shape[-1], u.shape[-1]
    q = torch.randn(r, r, dtype=t.dtype, device=t.device).square().sum(-1)
    alpha = u.exp().clamp(min=1e-6)
    log = alpha.log()
    inverse = 1 / alpha
    d = (inverse * (1 - 2 / n) + inverse.sum(-1, keepdim=True) / n**2).clamp(min=1e-6) + 1e-6
    z = torch.randn(n, dtype=u.dtype, device=u.device)
    weights = torch.softmax(log - log.mean(-1, keepdim=True) + d.sqrt() * z, -1)
    return Sample(((2 * t).exp() * q).clamp(min=1e-3), weights)


def drawn(config: Any, p: Leaf) -> Leaf:
    """The leaves of LoRA with an A of the distribution."""
    name = lowrank.factor_names(p)[0]
    a, found = p[name], sample(p)
    scale = setting(Settings, config.monteclora_config, "sample_scaler")
    deviation = found.variances.sqrt() * (found.weights.square().sum().sqrt() * scale)
    noise = torch.randn(a.shape, dtype=a.dtype, device=a.device)
    return {**p, name: a + noise * deviation.reshape(a.shape[0], *(1,) * (a.ndim - 1))}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A' drop(x)."""
    config: Any = layer.config
    x = dropout(layer, x, config.lora_dropout)
    return lora_forms.add_delta(layer, drawn(config, p) if layer.training else p, x, y).to(y.dtype)


def divergence(config: Any, p: Leaf, found: Sample) -> Tensor:
    """The penalty of one site for a sample.

    With D the divergence of Dirichlet(exp(u)) from Dirichlet(`dirichlet_prior`),

        k (D + r/2 sum_i (exp(2 t_i) - 2 t_i - 1) + N/2 sum_i (v_i - log v_i - 1)) + |w|^2 with `use_entropy`

    Args:
        config: the config; k is its `kl_loss_weight`.
        p: the leaves.
        found: the sample.

    Returns:
        0-d.
    """
    given = _settings(config)
    t, alpha = p[STD], p[EXPERTS].exp()
    prior = torch.full_like(alpha, given.dirichlet_prior)
    total = alpha.sum()
    dirichlet = total.lgamma() - prior.sum().lgamma() + (prior.lgamma() - alpha.lgamma()).sum()
    dirichlet = dirichlet + ((alpha - prior) * (alpha.digamma() - total.digamma())).sum()
    wishart = 0.5 * t.shape[-1] * ((2 * t).exp() - 2 * t - 1).sum()
    v = found.variances
    normal = 0.5 * given.num_samples * (v - v.log() - 1).sum()
    loss = given.kl_loss_weight * (dirichlet + wishart + normal)
    return loss + found.weights.square().sum() if given.use_entropy else loss


def penalty(adapter: Adapter) -> Tensor:
    """What MonteCLoRA adds to the loss of a model in training: the mean over its layers, each with a new sample.

    Args:
        adapter: the adapter.

    Returns:
        0-d.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.methods.monteclora import penalty
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], monteclora_config={"num_samples": 4})
        >>> penalty(fa.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)) > 0
        tensor(True)
    """
    every = [adapter.leaves(path) for path, p in adapter.params.items() if STD in p]
    found = [divergence(adapter.config, p, sample(p)) for p in every]
    return torch.stack(found).mean() if found else torch.zeros(())


def _get_monteclora_loss(tuner: Any, adapter_names: str | Sequence[str] | None = None) -> Any:
    """PEFT's name for `penalty`, of the live layers in training mode; 0.0 if there are none."""
    from funcadapt.view.walking import layers  # it builds on this file

    names = tuner.active_adapters if adapter_names is None else adapter_names
    found: list[Any] = []
    for _, layer in layers(tuner.model):
        for name in (names,) if isinstance(names, str) else names:
            held = layer.adapters.get(name)
            if held is not None and held.method is METHOD:
                p = layer.leaves(name)
                found.append(divergence(held.config, p, sample(p)) if layer.training else 0.0)
    return sum(found) / len(found) if found else 0.0


def check(config: lora.LoraConfig, path: str, p: Leaf) -> None:
    """LoRA's leaves, two priors and two constants."""
    lora.check(config, path, {name: leaf for name, leaf in p.items() if name not in _OWN})
    n, r = _settings(config).num_samples, config.r
    for name, shape in zip(_OWN, ((r,), (n,), (r, r), (n,)), strict=True):
        if name not in p or p[name].shape != shape:
            found = tuple(p[name].shape) if name in p else None
            raise SiteError(f"The site {path!r} has {name!r} of shape {found}, expected {shape}.")


lora_view.TUNER["_get_monteclora_loss"] = _get_monteclora_loss

METHOD = register(
    Method(
        name="monteclora",
        config=lora.LoraConfig,
        when=asks("monteclora_config", check=_check_config),
        kinds=frozenset({"linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv3d"}),
        keys={**lora.METHOD.keys, **{name: f"lora_monteclora_sampler.{name}" for name in _OWN}},
        init=init,
        constants=frozenset(_CONSTANTS),
        after=after,
        weight=lora.weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=check,
        layout=lora.layout,
        residual=lora.residual,
        dropout=lora.METHOD.dropout,
        reads=frozenset({"monteclora_config"}),
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
