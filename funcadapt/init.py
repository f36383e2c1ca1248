"""Creating adapters: every leaf drawn from a stream that depends on the seed and the site's path alone."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.binding import TOKEN_INDICES, TOKENS
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, SiteError, TargetError, did_you_mean
from funcadapt.layer import Given, Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, method_of
from funcadapt.sharing import SHARED, complete, stacked
from funcadapt.sites import Site, one_expert, tied_names
from funcadapt.targeting import is_saved, model_type, names_match, pattern_note, sites, whole_names
from funcadapt.tying import tie

Trees = tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]


def init(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    expect: int | None = None,
) -> Adapter:
    """A new adapter for a model. The model is not changed.

    Each site has its own random stream, seeded from (seed, path): neither the order nor the subset of the sites
    changes a draw, and every device gets the same numbers. On the meta device only shapes are made.

    Args:
        model: the model.
        config: what to adapt, and how.
        seed: the seed.
        dtype: dtype of the leaves; by default the one of the site's weight (float32 where that is quantised).
        device: device of the leaves; by default the one of the site's weight.
        expect: how many sites there must be.

    Returns:
        The adapter. Its config has the model's defaults filled in.

    Raises:
        TargetError: if the config matches nothing, or names what the model lacks.
        SiteError: if a site cannot be adapted.
        AdapterError: if the init takes a part out of the base weights (PiSSA, OLoRA): use `init_with_base`.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> both = fa.init(model, fa.LoraConfig(r=2, target_modules=["0", "1"]), seed=7)
        >>> one = fa.init(model, fa.LoraConfig(r=2, target_modules=["1"]), seed=7)
        >>> torch.equal(both.params["1"]["lora_A"], one.params["1"]["lora_A"])
        True
    """
    adapter, base = init_with_base(model, config, seed=seed, dtype=dtype, device=device, expect=expect)
    if base:
        how = getattr(config, "init_lora_weights", None)
        raise AdapterError(
            f"The init {how!r} takes the adapter's part out of the base weights. Keep both: adapter, base = "
            "fa.init_with_base(model, config), then fa.functional_call(model, adapter, args, parameters=base)."
        )
    return adapter


def init_with_base(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    expect: int | None = None,
) -> tuple[Adapter, dict[str, Tensor]]:
    """A new adapter, and the base weights that go with it: for PiSSA and OLoRA, as pure functions.

    Args:
        model: the model, not changed.
        config: what to adapt, and how.
        seed: the seed.
        dtype: dtype of the leaves, as in `init`.
        device: device of the leaves, as in `init`.
        expect: how many sites there must be.

    Returns:
        The adapter, and the corrected base weights by name (empty for the inits that leave the base alone), for
        `functional_call(..., parameters=...)`.

    Raises:
        TargetError: as in `init`.
        SiteError: as in `init`.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter, base = fa.init_with_base(model, fa.LoraConfig(r=2, target_modules="0", init_lora_weights="pissa"))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(fa.functional_call(model, adapter, x, parameters=base), model(x), atol=1e-6)
        True
    """
    table = sites(model, config, expect=expect)  # of the given config: a default's names may be unused
    config = _with_name(with_defaults(config, model), model)
    return initialise(
        model,
        config,
        table,
        lambda site, at: _draw(site, seed, dtype, device),
        shared_draw=lambda site: _draw(dataclasses.replace(site, path=SHARED), seed, dtype, device),
        device=device,
    )


def initialise(
    model: nn.Module,
    config: AdapterConfig,
    table: Sequence[Site],
    draw_of: Callable[[Site, Any], Draw],
    *,
    shared_draw: Callable[[Site], Draw] | None = None,
    device: torch.device | str | None = None,
    strict: bool = True,
) -> tuple[Adapter, dict[str, Tensor]]:
    """A new adapter at given sites.

    Args:
        model: the model, not changed.
        config: the config, with the model's defaults filled in.
        table: the sites.
        draw_of: (site, the config at it) -> where its numbers come from.
        shared_draw: (first site) -> where those come from that all sites share; by default as those of the site.
        device: device of the parameters that the adapter holds in full.
        strict: whether a name in `modules_to_save` that matches nothing is an error.

    Returns:
        As `init_with_base`.

    Raises:
        TargetError: as in `init`.
    """
    method = method_of(config)
    params: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    for site in table:
        at, module = config.at(site.path), model.get_submodule(site.owner)
        layer = Layer(site, module, at)
        made = fresh(method, site, at, draw_of(site, at), Given(layer))
        corrected = method.residual(at, {**made.params, **made.buffers}, Given(layer, changes=True))
        if corrected is not None:
            base[site.weight_name] = layer.stored(corrected)
        made = _without_single_expert_axis(site, made)
        if made.params:
            params[site.path] = dict(method.layout(made.params))
        buffers[site.path] = made.buffers
    complete(model, method, config, table, (params, buffers), shared_draw or (lambda site: draw_of(site, config)))
    _whole_parameters(model, config, table, (params, buffers), device, strict)
    _token_rows(model, config, (params, buffers), device)
    if method.rows and not getattr(config, "init_weights", True):
        for path, p in params.items():
            like = p[TOKENS]
            draw = draw_of(Site(path, "embedding", tuple(like.shape), like.dtype, like.device, path), config)
            p[TOKENS] = draw.normal(*like.shape)
    if not params:
        raise TargetError("The config selects nothing to train.")
    if SHARED in params:  # first, as it acts everywhere
        params = {SHARED: params.pop(SHARED), **params}
    return Adapter(params, {path: leaves for path, leaves in buffers.items() if leaves}, config), base


def with_defaults(config: AdapterConfig, model: nn.Module) -> Any:
    """The config with the model's defaults filled in, as PEFT writes it to a checkpoint.

    Args:
        config: the config.
        model: the model.

    Returns:
        A config that says what it targets.
    """
    filled: Any = config.for_model(model_type(model))
    if method_of(filled).rows and filled.target_modules is None:
        return dataclasses.replace(filled, target_modules=_embedding_name(model))
    return filled


def _embedding_name(model: nn.Module) -> str:
    """The path of the input embedding; PEFT's default if the model does not say."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return next((path for path, module in named_modules(model) if path and module is embedding), "embed_tokens")


def _with_name(config: AdapterConfig, model: Any) -> AdapterConfig:
    """The config with the name of the base model, which PEFT's `AutoPeftModel` looks for in a checkpoint."""
    name = getattr(model, "name_or_path", None)
    if config.base_model_name_or_path is not None or not isinstance(name, str) or not name:
        return config
    return dataclasses.replace(config, base_model_name_or_path=name)


def _draw(site: Site, seed: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Draw:
    target = torch.device(device) if device is not None else site.device
    digest = hashlib.sha256(f"{seed}:{site.path}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return Draw(generator, dtype or site.dtype, target)


def fresh(method: Method, site: Site, config: Any, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The leaves of one site as the method's `init` makes them; experts one by one, unless it makes them all.

    Args:
        method: the method.
        site: the site.
        config: the config at it.
        draw: where numbers come from.
        weight: gives the base weight, experts first.

    Returns:
        The leaves, with an expert axis where the site has experts.

    Raises:
        SiteError: if the method has no form for this kind of layer.
    """
    if site.kind not in method.kinds:
        raise SiteError(f"{method.name} cannot adapt {site.path!r}, which is of the kind {site.kind!r}. Exclude it.")
    if not site.stack or method.inits_experts:
        return method.init(site, config, draw, weight)
    one = one_expert(site)
    every = [method.init(one, config, draw, lambda e=e: weight()[e]) for e in range(site.experts)]
    return Fresh(stacked([e.params for e in every]), stacked([e.buffers for e in every]))


def _without_single_expert_axis(site: Site, fresh: Fresh) -> Fresh:
    if site.experts != 1:
        return fresh
    return Fresh(*({k: v.squeeze(0) if v.ndim else v for k, v in leaves.items()} for leaves in fresh))


def expected_shapes(site: Site, method: Method, config: Any, p: Leaf) -> dict[str, tuple[int, ...]]:
    """The shape that each trainable leaf must have at a site, for the rank that the leaves have.

    Args:
        site: the site.
        method: the method.
        config: the adapter's config.
        p: the leaves.

    Returns:
        Leaf name -> shape.
    """
    at = config.at(site.path)
    if method.shapes is not None:
        return method.shapes(site, at, p)
    rank = config.rank(p)
    if rank and hasattr(at, method.rank_field):
        at = dataclasses.replace(at, **{method.rank_field: rank})
    draw = Draw(None, site.dtype, torch.device("meta"))
    abstract: Callable[[], Tensor] = lambda: torch.empty(*site.stack, *site.shape, device="meta")  # noqa: E731
    return {name: tuple(leaf.shape) for name, leaf in fresh(method, site, at, draw, abstract).params.items()}


def expected_shared_shapes(table: Sequence[Site], method: Method, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape that each trained leaf must have that sites share. Frozen ones may be larger than they need be.

    Args:
        table: the sites.
        method: the method.
        config: the adapter's config.

    Returns:
        Leaf name -> shape.
    """
    if method.share is None:
        return {}
    draw = Draw(None, table[0].dtype, torch.device("meta"))
    made = method.share(table, config, draw, lambda site: torch.empty(*site.stack, *site.shape, device="meta"))
    return {name: tuple(leaf.shape) for name, leaf in made.params.items()}


def _copy(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor.detach().clone().to(device) if device is not None else tensor.detach().clone()


def _whole_parameters(
    model: nn.Module, config: Any, table: Sequence[Site], trees: Trees, device: torch.device | str | None, strict: bool
) -> None:
    """`modules_to_save` and `bias`: parameters that the adapter holds in full, as copies of the model's."""
    params, buffers = trees
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    for name in saved if strict else ():
        if not any(path and is_saved_by(name, path) for path, _ in named_modules(model)):
            raise TargetError(
                f"modules_to_save names {name!r}, which matches no module."
                + did_you_mean(name, (path.rpartition(".")[2] for path, _ in named_modules(model) if path))
            )
    for path, name in whole_names(model, config, {site.path for site in table}):
        module = model.get_submodule(path)
        tree, slot = (params, module._parameters) if name in module._parameters else (buffers, module._buffers)
        held = slot[name]
        assert held is not None
        tree.setdefault(path, {})[name] = _copy(held, device)


def is_saved_by(name: str, path: str) -> bool:
    """Whether a path is the module that an entry of `modules_to_save` names."""
    return path.endswith(name)  # PEFT's rule, see is_saved


def token_table(config: Any, model: nn.Module) -> dict[str, list[int]]:
    """Which rows of which embedding are trained: path -> token indices.

    Args:
        config: a config with `trainable_token_indices`.
        model: the model.

    Returns:
        The table; empty if no rows are trained.

    Raises:
        TargetError: if the embedding is not found, or an index is out of range or given twice.
    """
    wanted: Any = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    paths = {path: m for path, m in named_modules(model) if path}
    if not isinstance(wanted, Mapping):
        wanted = {_embedding_name(model): wanted}
    found: dict[str, list[int]] = {}
    names: Mapping[str, Sequence[int]] = wanted  # pyright: ignore[reportUnknownVariableType]
    for name, rows in names.items():
        matches = [path for path in paths if has_rows(config, name, path)]
        if not matches:
            field = "target_modules" if method_of(config).rows else "trainable_token_indices"
            hint = pattern_note(name, paths) or did_you_mean(name, paths)
            raise TargetError(f"{field} names {name!r}, which matches no module.{hint}")
        for path in matches:
            size = model.get_submodule(path).weight.shape[0]  # pyright: ignore
            bad = [i for i in rows if not 0 <= i < size]  # pyright: ignore
            if bad or len(set(rows)) != len(rows):
                raise TargetError(
                    f"trainable_token_indices at {path!r} must be distinct and in [0, {size}), got {bad or list(rows)}."
                )
            found[path] = list(rows)
    return found


def has_rows(config: Any, name: str, path: str) -> bool:
    """Whether the name or pattern under which a config lists trained rows means an embedding.

    Args:
        config: the config.
        name: a key of its `trainable_token_indices`.
        path: the embedding's path.

    Returns:
        Whether it does.
    """
    pattern = method_of(config).rows and isinstance(config.target_modules, str)
    return names_match(name if pattern else (name,), path)


def _heads(model: nn.Module, path: str) -> list[str]:
    """The paths of the layers tied to an embedding, where PEFT's `TrainableTokensConfig` ties them, too."""
    config: Any = getattr(model, "config", None)
    said = config.get("tie_word_embeddings") if isinstance(config, dict) else getattr(config, "tie_word_embeddings", 0)  # pyright: ignore
    if not said or path != _embedding_name(model):
        return []
    names = tied_names(model).get(f"{path}.weight", ())
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _token_rows(model: nn.Module, config: Any, trees: Trees, device: torch.device | str | None) -> None:
    params, buffers = trees
    for path, rows in token_table(config, model).items():
        if is_saved(config, path):
            raise ValueError(f"{path!r} is in both trainable_token_indices and modules_to_save. Choose one.")
        weight: Any = model.get_submodule(path).weight
        index = torch.tensor(rows, dtype=torch.long, device=weight.device)
        params.setdefault(path, {})[TOKENS] = _copy(weight.detach()[index], device)
        index = index.to(device) if device is not None else index
        buffers.setdefault(path, {})[TOKEN_INDICES] = index
        for head in _heads(model, path) if method_of(config).rows else ():
            buffers.setdefault(head, {})[tie(TOKENS, path)] = index.new_zeros(())
