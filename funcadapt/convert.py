"""Any adapter, and any fine-tuned model, as a LoRA.

At each site the change of the dense weight, D = W' - W seen as a matrix (out, in * kernel), is replaced by the best
approximation of a rank (Eckart and Young):

    D = U S V^T        s B A = U_r S_r V_r^T,    A = V_r^T (r, in),    B = U_r S_r / s (out, r)

with the singular values in order, so that |D - s B A|^2 is the sum of the squares of those that are cut. With
`energy=e` the rank is the smallest one whose singular values hold that share: sum_{i <= r} S_i^2 >= e sum_i S_i^2.
Experts and the groups of a convolution are matrices of their own, of one rank; their energies are added.

A LoRA has its factors already: they are kept where the rank allows, and cut by two QRs of (in, r) and (out, r) and an
SVD of (r, r) where not. Otherwise the cost of a site is that of the SVD of its weight.
D is computed in float64, as it is small beside W, and decomposed in at least float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.approximation import Change, blocks_of, change_of, new_leaves, shift_of, widened
from funcadapt.binding import TOKEN_INDICES, TOKENS, Bound, bind, check_shapes, state_of
from funcadapt.call import entries_of
from funcadapt.errors import AdapterError, SiteError, did_you_mean
from funcadapt.init import Trees, _token_rows, _whole_parameters
from funcadapt.layer import Layer
from funcadapt.merge import _join, merge
from funcadapt.method import method_of
from funcadapt.methods import lora
from funcadapt.methods.lora import LoraConfig
from funcadapt.parts import lora_leaves, lowrank
from funcadapt.retargeting import aimed_at, carried, named, selected, without
from funcadapt.sites import Site, tied_names
from funcadapt.targeting import sites


def convert(model: nn.Module, adapter: Adapter, config: LoraConfig, *, energy: float | None = None) -> Adapter:
    """The LoRA that does what an adapter of any method does, as nearly as its rank allows.

    Exact, up to roundings, where the rank holds the adapter's change; see the module's docstring for the formula.
    Neither the model nor the adapter is changed. What the adapter holds in full (`modules_to_save`, trained biases,
    token rows) is carried over. Dropout is a matter of training: the adapter's is left behind, the config's is kept.

    Args:
        model: the model that the adapter is for.
        adapter: the adapter; no stack.
        config: the new adapter's config. Without `target_modules` and `target_parameters` it takes those of the
            adapter; else it must select all that the adapter changes. Its scaling, alpha / r, is kept at every site,
            and the factors make up for it. A change of the bias needs `lora_bias=True`, or a `bias` that is trained in
            full.
        energy: the share in (0, 1] of the squared singular values that the rank of each site is to hold, instead of
            the config's rank. A site without any change goes to `exclude_modules`.

    Returns:
        The adapter. With `energy` its config has the ranks that came out, in `r` and `rank_pattern`.

    Raises:
        TypeError: if `adapter` is no adapter or `config` no LoraConfig.
        AdapterError: if the config is for a variant of LoRA, its scaling is 0, or something does not go together.
        TargetError: if the config leaves out a layer that the adapter changes.
        SiteError: if an adapter has no dense form at its layer, LoRA cannot adapt the layer, or a changed bias has no
            place.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        >>> adapter = fa.init(model, fa.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False))
        >>> convert(model, adapter, fa.LoraConfig(r=2))
        Adapter(lora, 1 site, r=2, 20 parameters, float32)
        >>> x, exact = torch.randn(3, 6), convert(model, adapter, fa.LoraConfig(), energy=1.0)
        >>> y = fa.functional_call(model, exact, x)
        >>> torch.allclose(y, fa.functional_call(model, adapter, x), atol=1e-5)
        True
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"convert: expected an Adapter, got {type(adapter).__name__}.")
    if adapter.members is not None:
        raise AdapterError("convert: a stack has many weights. Convert its members: fa.unstack(stack).")
    config = _checked(config, energy, "convert")
    with torch.no_grad():
        bound = bind(model, entries_of(adapter, None), state_of(model))
        config = carried(config, adapter.config)
        config, table = aimed_at(model, config, adapter.config, {path: _site(bound, path) for path in bound.levels})
        below, held = _held(model, config, table, _whole_of(adapter, bound))

        def change(site: Site) -> Change | None:
            levels = bound.levels.get(site.path)
            if levels is None:
                return None
            return change_of(levels[0], site, bound.places[site.path].module, below, with_bias=config.lora_bias)

        with _explained(bound):
            return _assembled(model, config, table, change, held, energy)


@contextlib.contextmanager
def _explained(bound: Bound) -> Generator[None, None, None]:
    """An error of torch becomes one that names the leaf, if one does not fit its layer."""
    try:
        yield
    except RuntimeError:
        check_shapes(bound)
        raise


def extract(
    base: nn.Module, tuned: nn.Module | Mapping[str, Tensor], config: LoraConfig, *, energy: float | None = None
) -> Adapter:
    """The LoRA of a fine-tuning: of the difference between a tuned and a base model, at the sites of a config.

    Args:
        base: the base model. It is not changed.
        tuned: the tuned model, or its state dict. Names of tied weights may be missing.
        config: what to adapt, and with which ranks. `modules_to_save`, `bias` and `trainable_token_indices` say what
            is taken over in full, `lora_bias` holds the biases of the sites.
        energy: as in `convert`.

    Returns:
        The adapter for the base model. It is exact, up to roundings, where the rank allows.

    Raises:
        AdapterError: if the models do not have the same parameters, or others differ than the config covers: the
            message names them.
        TargetError: as in `fa.init`.
        SiteError: if a weight is quantised.

    Example:
        >>> import copy
        >>> import torch
        >>> import funcadapt as fa
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 4))
        >>> tuned = copy.deepcopy(base)
        >>> _ = tuned[0].weight.data.add_(torch.outer(torch.randn(4), torch.randn(6)))
        >>> adapter = extract(base, tuned, fa.LoraConfig(target_modules=["0"]), energy=0.999)
        >>> adapter
        Adapter(lora, 1 site, r=1, 10 parameters, float32)
        >>> x = torch.randn(3, 6)
        >>> torch.allclose(fa.functional_call(base, adapter, x), tuned(x), atol=1e-5)
        True
    """
    config = _checked(config, energy, "extract")
    with torch.no_grad():
        table = sites(base, config)
        config = named(base, config)
        old = _tensors(base.state_dict())
        new = _tuned(base, old, tuned)
        params, buffers = trees = _whole(base, config, table, strict=True)
        for path, leaves in (*params.items(), *buffers.items()):
            for name in leaves:
                if (value := new.get(_join(path, name))) is not None:
                    leaves[name] = value.to(leaves[name])
        for path in (path for path, leaves in params.items() if TOKENS in leaves):
            rows = new[f"{path}.weight"][buffers[path][TOKEN_INDICES]]
            params[path][TOKENS] = rows.to(params[path][TOKENS])
        below, held = _held(base, config, table, trees)
        now = {**old, **below}
        _check_rest(config, table, now, new, tied_names(base))

        def change(site: Site) -> Change:
            layer, name = Layer(site, base.get_submodule(site.owner), config), site.weight_name
            delta = layer.canonical(widened(new[name], site) - widened(now[name], site))
            bias = _join(site.owner, site.bias)
            shift = shift_of(now[bias].double(), new[bias].double()) if site.bias else None
            return Change(blocks_of(site, delta), None, 1.0, shift, 0.0, site.dtype)

        return _assembled(base, config, table, change, held, energy)


# -- the adapter ------------------------------------------------------------------------------------------


def _checked(config: LoraConfig, energy: float | None, who: str) -> LoraConfig:
    if type(config) is not LoraConfig:
        raise TypeError(f"{who}: expected a LoraConfig, got {config!r}.")
    if (method := method_of(config)) is not lora.METHOD:
        raise AdapterError(f"{who}: the config is for {method.name}, and only a plain LoRA can be made.")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"{who}: energy is the share that is held, in (0, 1], got {energy}.")
    return lowrank.config([config], config)  # nothing is taken out of the base weights


def _site(bound: Bound, path: str) -> Site:
    site = bound.places[path].site
    assert site is not None  # `bind` says so
    return site


def _whole_of(adapter: Adapter, bound: Bound) -> Trees:
    """What an adapter holds in full."""
    trees: Trees = ({}, {})
    for whole in bound.replaced:
        tree = trees[whole.name not in adapter.params.get(whole.path, {})]
        tree.setdefault(whole.path, {})[whole.name] = whole.tensor
    for tokens in bound.tokens:
        trees[0].setdefault(tokens.path, {})[TOKENS] = tokens.rows_of
        trees[1].setdefault(tokens.path, {})[TOKEN_INDICES] = tokens.indices
    return trees


def _whole(model: nn.Module, config: LoraConfig, table: Sequence[Site], *, strict: bool = False) -> Trees:
    """What the config holds in full, with the model's values."""
    trees: Trees = ({}, {})
    _whole_parameters(model, config, table, trees, None, strict)
    _token_rows(model, config, trees, None)
    return trees


def _held(model: nn.Module, config: LoraConfig, table: Sequence[Site], given: Trees) -> tuple[dict[str, Tensor], Trees]:
    """What is held in full, given values before the model's; and what the model's parameters become by it."""
    held = _whole(model, config, table)
    for tree, values in zip(held, given, strict=True):
        for path, leaves in values.items():
            tree.setdefault(path, {}).update({name: leaf.detach() for name, leaf in leaves.items()})
    below = merge(model, Adapter(held[0], held[1], config)) if held[0] or held[1] else {}
    return below, held


def _assembled(
    model: nn.Module,
    config: LoraConfig,
    table: Sequence[Site],
    change: Callable[[Site], Change | None],
    held: Trees,
    energy: float | None,
) -> Adapter:
    """The adapter, site by site: one change is in memory at a time."""
    params: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    empty: list[Site] = []

    def put(site: Site, leaves: dict[str, Tensor]) -> None:
        if site.experts == 1:  # see binding.bind
            leaves = {name: leaf.squeeze(0) if leaf.ndim else leaf for name, leaf in leaves.items()}
        buffers[site.path] = {"scaling": leaves.pop("scaling")}
        params[site.path] = dict(lora_leaves.layout({name: leaf.clone() for name, leaf in leaves.items()}))

    for site in table:
        found = change(site)
        leaves = new_leaves(site, found, config.at(site.path), energy)
        shift = _shift_left(site, found, config, held[0])
        if leaves is None and shift is None and site.owner not in held[0]:
            empty.append(site)
            continue
        leaves = leaves or _nothing(site, config)
        if shift is not None:
            leaves[lowrank.BIAS] = (shift / leaves["scaling"].double()).to(leaves["scaling"].dtype)
        put(site, leaves)
    gone = empty if params else ()  # a config must select something
    if gone:
        left = {site.path for site in selected(model, without(model, config, gone)) or ()}
        gone = [site for site in gone if site.path not in left]  # half of an attention cannot be excluded
        config = without(model, config, gone)
    for site in empty:
        if site not in gone:
            put(site, _nothing(site, config))
    order = [site.path for site in table if site.path in params]
    params = {path: params[path] for path in order}
    config = lora_leaves.describe(config, {path: {**params[path], **buffers[path]} for path in order})
    for tree, whole in zip((params, buffers), held, strict=True):
        for path, leaves in whole.items():
            tree.setdefault(path, {}).update(leaves)
    return Adapter(params, buffers, config)


def _shift_left(
    site: Site, change: Change | None, config: LoraConfig, held: dict[str, dict[str, Tensor]]
) -> Tensor | None:
    """The change of the bias that LoRA's own bias must hold, after one that is held in full got it."""
    if change is None or change.bias is None:
        return None
    whole = held.get(site.owner, {})
    if site.bias and site.bias in whole:
        bias = whole[site.bias]
        whole[site.bias] = (bias.double() + change.bias).to(bias.dtype)
        return None
    if not config.lora_bias:
        raise SiteError(
            f"The bias at {site.path!r} changes, too, and LoRA has no place for it. Set lora_bias=True, or "
            "bias='lora_only'."
        )
    return change.bias


def _nothing(site: Site, config: LoraConfig) -> dict[str, Tensor]:
    """A new LoRA of the smallest rank, for a site that the config must select."""
    at = dataclasses.replace(config.at(site.path), r=site.groups, rank_pattern={}, alpha_pattern={})
    scaling = lora_leaves.buffers(config.at(site.path))["scaling"].to(dtype=site.dtype, device=site.device)
    leaves = new_leaves(site, None, at, None)
    assert leaves is not None
    return {**leaves, "scaling": scaling}


# -- two models -------------------------------------------------------------------------------------------


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _tuned(base: nn.Module, old: Mapping[str, Tensor], tuned: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tuned values under all names of the base model, on its devices."""
    given = _tensors(tuned.state_dict() if isinstance(tuned, nn.Module) else tuned)
    unknown = [name for name in given if name not in old]
    if unknown:
        raise AdapterError(
            f"extract: the tuned model has {unknown[0]!r} ({len(unknown)} such names), which the base model does not "
            f"have.{did_you_mean(unknown[0], old)}"
        )
    ties = tied_names(base)
    found: dict[str, Tensor] = {}
    for name, tensor in old.items():
        value = next((given[n] for n in (name, *ties.get(name, ())) if n in given), None)
        if value is None:
            raise AdapterError(f"extract: the tuned model lacks {name!r}.{did_you_mean(name, given)}")
        if value.shape != tensor.shape:
            raise AdapterError(
                f"extract: {name!r} has shape {tuple(value.shape)} in the tuned model, {tuple(tensor.shape)} in the "
                "base model."
            )
        found[name] = value.to(tensor.device)
    return found


def _check_rest(
    config: LoraConfig,
    table: Sequence[Site],
    now: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    ties: Mapping[str, Sequence[str]],
) -> None:
    covered = {site.weight_name for site in table}
    for site in table:
        if site.weight_name not in now:
            raise SiteError(
                f"The weight at {site.path!r} is computed from others. Call "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
        if config.lora_bias and site.bias:
            covered.add(_join(site.owner, site.bias))
    left = [name for name in now if name not in covered and not _same(now[name], new[name])]
    if not left:
        return
    tied = [other for other in ties.get(left[0], ()) if other in covered]
    note = f" {left[0]!r} is tied to {tied[0]!r}, and an adapter acts on one of them: untie the base." if tied else ""
    raise AdapterError(
        f"extract: {len(left)} tensors differ that the config does not cover: {', '.join(map(repr, left[:8]))}"
        f"{', ...' * (len(left) > 8)}. Target them, name their modules in modules_to_save, or set bias='all' or "
        f"lora_bias=True for biases.{note}"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))
