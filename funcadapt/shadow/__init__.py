"""Shadow: a small network beside a decoder, whose state rides along and corrects the input of every block.

The shadow backbone, a decoder like the model's but of one layer, reads the same tokens. Its last hidden state,
projected to the model's width d if need be, is the first shadow state s. At each adapted block, with input h,

    h' = h + alpha * W_up W_down drop(h - s)            (W_down: r x d, W_up: d x r)
    out = block(h')
    s' = (1 - g) s + g T(out),   g = sigmoid(G(out))    (T, G: d -> u -> d with GELU; u is `update_hidden_size`, or r)

and if `labels` are passed, `auxiliary_loss_weight` times the loss that the task head makes of the first s is added to
the model's. Only the shadow is trained. It cannot be merged: the correction depends on the input.

A `Shadow` is a value: the blocks' leaves and the backbone's parameters under PEFT's names, what `modules_to_save`
names, and the config. It is a pytree, and `call` a pure function of it. The backbone's module is a skeleton without
parameters, made from the model's class and a smaller copy of its config, and kept as long as the model. Nothing is
registered on the model: the engine puts the blocks' forwards in place for the call, under the model's lock. With a
cache the output's `past_key_values` holds those of both networks: pass it on as it is, as `model.generate` does.

Init: W_up zero, which is the identity; all else as `nn.Linear` and the model's class do, seed for seed PEFT's numbers.
Cost: the backbone, and 2 d (r + 2 u) + 2 (u + d) parameters a block. Checkpoints are PEFT's, both ways.

Source: ShadowPEFT, as in PEFT 0.21.2. Differs from PEFT: `layers_to_transform` acts (PEFT takes all blocks, or none);
blocks that are not contiguous, encoder-decoders and query heads that the key heads do not divide are refused (PEFT
fails inside the model); `attention_mask`, `position_ids`, `labels` and `past_key_values` may be positional (PEFT
ignores them then, without a word), and the auxiliary loss is also in a tuple; a filled cache that lacks the shadow's
half is an error (PEFT goes on without the shadow's past); blocks are in float64 in a model that is (PEFT: float32). As
in PEFT, a backbone whose embeddings are not called `embed_tokens` (GPT-2's) keeps a table that nothing reads, and
without an attention mask the head reads the last token, padding or not. Not here: diffusion models, and a
`shadow_model` from a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt._torch import fork_rng
from funcadapt.binding import state_of
from funcadapt.checkpoint import _FORMAT_OF, CONFIG, WEIGHTS, _read_tensors, read_config, write_all
from funcadapt.config import config_from_dict
from funcadapt.engine import _REENTRANT, Installation
from funcadapt.errors import AdapterError, AdapterFileError, SiteError, did_you_mean
from funcadapt.pytrees import register_pytree
from funcadapt.recompute import calling
from funcadapt.shadow.backbone import ShadowConfig as ShadowConfig
from funcadapt.shadow.backbone import Skeleton as Skeleton
from funcadapt.shadow.backbone import backbone_of as backbone_of
from funcadapt.shadow.backbone import block_paths as block_paths
from funcadapt.shadow.backbone import classifier_of as classifier_of
from funcadapt.shadow.backbone import make_backbone as make_backbone
from funcadapt.shadow.backbone import shares as shares
from funcadapt.shadow.backbone import size_of as size_of
from funcadapt.shadow.backbone import skeleton as skeleton
from funcadapt.shadow.state import Leaves as Leaves
from funcadapt.shadow.state import Run as Run
from funcadapt.shadow.state import advance as advance
from funcadapt.shadow.state import block_shapes as block_shapes
from funcadapt.shadow.state import inject as inject
from funcadapt.shadow.state import join_caches as join_caches
from funcadapt.shadow.state import split_cache as split_cache
from funcadapt.swapping import slot_of
from funcadapt.targeting import is_saved


@dataclasses.dataclass(frozen=True, eq=False)
class Shadow:
    """The shadow network and what corrects the blocks.

    Attributes:
        blocks: path of a block -> its leaves, "shadow_down.weight" and so on; in the order of the model.
        backbone: the shadow backbone's state dict.
        projection: "weight", (d, the backbone's width); empty if the widths are equal.
        head: the classifier's copy, for SEQ_CLS; empty otherwise.
        whole: full name -> parameter, of what `modules_to_save` names.
        config: the config.
    """

    blocks: Mapping[str, Leaves]
    backbone: Leaves
    projection: Leaves
    head: Leaves
    whole: Leaves
    config: ShadowConfig

    def replace(self, **changes: Any) -> Shadow:
        """A copy with some attributes replaced."""
        return dataclasses.replace(self, **changes)


def _from_dict(values: Any) -> Any:
    return config_from_dict(values)


_PARTS = ("blocks", "backbone", "projection", "head", "whole")
register_pytree(
    Shadow,
    _PARTS,
    lambda s: ([{path: dict(p) for path, p in s.blocks.items()}, *(dict(getattr(s, n)) for n in _PARTS[1:])], s.config),
    lambda children, config: Shadow(**dict(zip(_PARTS, children, strict=True)), config=config),
    lambda config: config.to_dict(),
    _from_dict,
)


# -- making one -------------------------------------------------------------------------------------------


def shadow(model: nn.Module, config: ShadowConfig, *, seed: int = 0) -> Shadow:
    """A new shadow network for a model.

    Args:
        model: the model, a decoder of transformers.
        config: the config.
        seed: of the init; the numbers are PEFT's after `torch.manual_seed(seed)`.

    Returns:
        The value. Its config names the blocks.

    Raises:
        TargetError: if the model has no such blocks, or they are not contiguous.
        AdapterError: if a size does not fit.
        NotImplementedError: for diffusion models, and a `shadow_model` from a checkpoint.
    """
    paths = block_paths(model, config)
    like = next(model.parameters())
    with torch.device("cpu"), fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = make_backbone(model, config)
        width, own = size_of(getattr(model, "config", None)), size_of(made.config)
        projection = {} if own == width else dict(nn.Linear(own, width, bias=False).state_dict())
        blocks = {path: _fresh_block(config, width, like) for path in paths}
    scores: Any = classifier_of(model) if config.task_type == "SEQ_CLS" else None
    head = {} if scores is None else {name: p.detach().clone() for name, p in scores.state_dict().items()}
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=paths, layers_to_transform=None, layers_pattern=None)
    parts = (_as(like, made.state_dict()), _as(like, projection), _as(like, head))
    return Shadow(blocks, *parts, whole_parameters(model, config), config)


def _as(like: Tensor, leaves: Leaves) -> dict[str, Tensor]:
    """Leaves where the model is, in its dtype."""
    return {n: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for n, t in leaves.items()}


def _fresh_block(config: ShadowConfig, width: int, like: Tensor) -> dict[str, Tensor]:
    """A block's leaves: those of `nn.Linear`, drawn in PEFT's order, in float32 at least."""
    found: dict[str, Tensor] = {}
    for name, shape in block_shapes(config, width).items():
        if not name.endswith("bias"):
            layer = nn.Linear(shape[1], shape[0], bias=name.startswith("shadow_update"))
            for part, leaf in layer.state_dict().items():
                wide = torch.promote_types(like.dtype, torch.float32)
                found[f"{name.rpartition('.')[0]}.{part}"] = leaf.to(like.device, wide)
    if config.init_weights:
        found["shadow_up.weight"] = torch.zeros_like(found["shadow_up.weight"])
    return found


def whole_parameters(model: nn.Module, config: ShadowConfig) -> dict[str, Tensor]:
    """Copies of what `modules_to_save` names, by full name."""
    named = model.state_dict() if config.modules_to_save else {}
    return {name: t.detach().clone() for name, t in named.items() if is_saved(config, name.rpartition(".")[0])}


def check(model: nn.Module, value: Shadow) -> Skeleton:
    """Compare every leaf with what the model and the config need.

    Args:
        model: the model.
        value: the shadow.

    Returns:
        The backbone's module.

    Raises:
        SiteError: for the first leaf that is missing, unknown or of another shape.
    """
    like = next((leaf for leaf in value.backbone.values() if leaf.is_floating_point()), None)
    if like is None:
        raise SiteError("Shadow: the value's backbone is empty.")
    bones = skeleton(model, value.config, like.dtype, like.device)
    _compare("the shadow backbone", value.backbone, bones.shapes)
    wide = {} if bones.hidden == bones.width else {"weight": (bones.width, bones.hidden)}
    _compare("the projection", value.projection, wide)
    for path, leaves in value.blocks.items():
        _compare(repr(path), leaves, block_shapes(value.config, bones.width))
    if value.config.task_type == "SEQ_CLS" and (scores := classifier_of(model)) is not None:
        _compare("the shadow head", value.head, {n: tuple(t.shape) for n, t in scores.state_dict().items()})
    return bones


def _compare(where: str, leaves: Leaves, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in {**expected, **leaves}:
        got = tuple(leaves[name].shape) if name in leaves else None
        if name not in expected:
            raise SiteError(f"Shadow: {where} has an unknown leaf {name!r}.{did_you_mean(name, expected)}")
        if got != expected[name]:
            raise SiteError(
                f"Shadow: {name!r} of {where} must have shape {expected[name]}, got {got or 'none'}. Was it made for "
                "another model or config? A stack of shadows is for torch.func.vmap."
            )


# -- a call -----------------------------------------------------------------------------------------------


def call(model: nn.Module, value: Shadow, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """Call a model with a shadow. The model is never changed.

    Args:
        model: the model.
        value: the shadow.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model. With `labels` the loss has the auxiliary loss in it.

    Returns:
        What the model returns; its `past_key_values`, if any, hold the shadow's cache, too.
    """
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    with applied(model, value):
        return model(*positional, **(kwargs or {}))


@contextlib.contextmanager
def applied(model: nn.Module, value: Shadow) -> Generator[nn.Module, None, None]:
    """A shadow applied for the duration of a `with` block, for code that calls the model itself, as `generate` does.

    Holds the model's lock for the whole block. Adapters of `fa.applied` can be applied around it, or in it.

    Args:
        model: the model.
        value: the shadow.

    Yields:
        The model.
    """
    with _installed(model, value, blocks=True) as installed:
        yield model
    installed.check_ran(False, stacklevel=5)


class _Installation(Installation):
    """The engine's, with the state of a run: an activation checkpoint runs a block again from where it stood."""

    run: Run

    def mark(self) -> list[Any]:
        return [self.run.state, self.run.last]

    def restore(self, marks: Sequence[Any]) -> None:
        self.run.state, self.run.last = marks


class _Alone(list[Any]):
    """The entries of a shadow's installation: a call that would make one installation of all cannot have them."""

    def __iter__(self) -> Iterator[Any]:
        raise AdapterError(
            "Grouped and routed adapters cannot be applied inside a shadow. Apply the shadow inside: with "
            "fa.applied(model, grouped): funcadapt.shadow.call(model, value, ...)."
        )


class _Block:
    """A block's forward with the shadow."""

    __slots__ = ("base", "check", "config", "leaves", "module", "place", "ran", "run")

    def __init__(self, module: nn.Module, place: tuple[str, int], value: Shadow, run: Run, ran: set[str]) -> None:
        self.base, self.module, self.config, self.leaves = module.forward, module, value.config, value.blocks[place[0]]
        self.place, self.run, self.ran = place, run, ran
        self.check = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in self.leaves.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.check and not torch.is_grad_enabled() and _torch.in_reentrant_checkpoint():
            raise RuntimeError(_REENTRANT)
        self.ran.add(self.place[0])
        rates = self.config.shadow_alpha, self.config.shadow_dropout if self.module.training else 0.0
        return self.run.through(self.place, self.base, self.leaves, rates, args, kwargs)


@contextlib.contextmanager
def _installed(model: nn.Module, value: Shadow, blocks: bool) -> Generator[_Installation, None, None]:
    state = state_of(model)
    with state.lock:
        bones = check(model, value)
        installed = _Installation(model, [], None, state)
        installed.entries, run = _Alone(), Run()
        installed.run = run
        for full, tensor in value.whole.items():
            owner, _, name = full.rpartition(".")
            module = _at(model, owner)
            old = module._parameters.get(name, module._buffers.get(name))
            _compare(repr(owner), {name: tensor}, {} if old is None else {name: tuple(old.shape)})
            installed.swaps.set(slot_of(module, name), name, tensor)
        if blocks:
            for number, path in enumerate(value.blocks):
                module = _at(model, path)
                block = _Block(module, (path, number), value, run, installed.ran)
                installed.forwards[id(module)] = module, block  # pyright: ignore[reportArgumentType]
                installed.hooked.append(path)
            installed.forwards[id(model)] = model, _Top(model, value, bones, run)  # pyright: ignore[reportArgumentType]
        try:
            installed.enter()
            with calling(state):
                yield installed
        finally:
            installed.exit()


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SiteError(f"Shadow: the model has no module {path!r}. Was it made for another model?") from error


class _Top:
    """The model's forward with the shadow: the first shadow state, the caches, the auxiliary loss."""

    __slots__ = ("base", "bones", "model", "run", "value")

    def __init__(self, model: nn.Module, value: Shadow, bones: Skeleton, run: Run) -> None:
        self.base, self.model, self.value, self.bones, self.run = model.forward, model, value, bones, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(self.model, args, kwargs)
        past, shadow_past = split_cache(given.get("past_key_values"))
        if past is not given.get("past_key_values"):
            args, kwargs = (), {**given, "past_key_values": past}
        cached = uses_cache(self.model, given)
        seed, shadow_past = first_state(self.model, self.value, self.bones, {**given, "use_cache": cached}, shadow_past)
        self.run.state, self.run.last = seed, -1
        try:
            output = self.base(*args, **kwargs)
        finally:
            self.run.state = None
        if cached:
            join_caches(output, shadow_past)
        weight, labels = self.value.config.auxiliary_loss_weight, given.get("labels")
        if labels is None or weight <= 0:
            return output
        own = loss_of(_scores(self.model, self.value, seed, given.get("attention_mask")), labels, self.value.config)
        return output if own is None else with_loss(output, weight * own)


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a model by name, also the positional ones."""
    names = _positional(type(model))
    if len(args) > len(names):
        raise AdapterError(f"{type(model).__name__} was called with {len(args)} positional arguments; it has {names}.")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _positional(cls: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def uses_cache(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call fills a cache."""
    asked = given.get("use_cache")
    return bool(getattr(getattr(model, "config", None), "use_cache", False) if asked is None else asked)


def first_state(
    model: nn.Module, value: Shadow, bones: Skeleton, given: Mapping[str, Any], past: Any = None
) -> tuple[Tensor, Any]:
    """The first shadow state of a call: the backbone's last hidden state, projected.

    Args:
        model: the model, for its embeddings.
        value: the shadow.
        bones: the backbone's module; the caller holds the model's lock.
        given: the call's arguments by name.
        past: the backbone's cache.

    Returns:
        The state, (rows, tokens, d), and the backbone's cache.

    Raises:
        AdapterError: if the call has neither `input_ids` nor `inputs_embeds`.
        TypeError: if the backbone returns no last hidden state.
    """
    named = {"attention_mask": given.get("attention_mask"), "use_cache": given.get("use_cache", False)}
    named |= {"return_dict": True, "past_key_values": past}
    if given.get("position_ids") is not None:
        named["position_ids"] = given["position_ids"]
    ids: Any = given.get("input_ids")
    embedded: Any = given.get("inputs_embeds")
    if ids is None and embedded is None:
        raise AdapterError("Shadow: either `input_ids` or `inputs_embeds` must be provided.")
    if bones.share and embedded is None:
        table: Any = getattr(model, "get_input_embeddings")()  # noqa: B009
        embedded = table(ids)
    named |= {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded}
    if bones.module.training != model.training:
        bones.module.train(model.training)
    leaves = {name: leaf.detach() if name in bones.frozen else leaf for name, leaf in value.backbone.items()}
    out: Any = torch.func.functional_call(bones.module, leaves, (), named)
    if not hasattr(out, "last_hidden_state"):
        raise TypeError("The shadow backbone did not return a `last_hidden_state`; architecture is unsupported.")
    state = out.last_hidden_state
    state = F.linear(state, value.projection["weight"]) if value.projection else state
    return state, getattr(out, "past_key_values", None)


# -- the shadow by itself ---------------------------------------------------------------------------------


def detached(model: nn.Module, value: Shadow, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """What the shadow network says by itself: head(projection(backbone(x))). The model's blocks do not run.

    Args:
        model: the model, for its embeddings and its language-model head.
        value: the shadow.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model, without a cache.

    Returns:
        The logits: of all tokens for CAUSAL_LM, of the last one for SEQ_CLS. The projected hidden states for others.
    """
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    given = {**named_arguments(model, positional, kwargs or {}), "use_cache": False}
    with _installed(model, value, blocks=False):
        state, _ = first_state(model, value, check(model, value), given)
        scores = _scores(model, value, state, given.get("attention_mask"))
        return state if scores is None else scores


def auxiliary_loss(
    model: nn.Module, value: Shadow, labels: Tensor, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """The shadow network's own loss, without its weight.

    Args:
        model: the model.
        value: the shadow.
        labels: token ids, -100 for none, or the rows' classes.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.

    Returns:
        The loss.

    Raises:
        AdapterError: if the task has no head: it is CAUSAL_LM or SEQ_CLS.
    """
    found = loss_of(detached(model, value, args, kwargs), labels, value.config)
    if found is None:
        raise AdapterError(f"Shadow has a loss for CAUSAL_LM and SEQ_CLS, not for task_type={value.config.task_type}.")
    return found


def _scores(model: Any, value: Shadow, state: Tensor, mask: Any) -> Tensor | None:
    if value.config.task_type == "CAUSAL_LM":
        head = model.get_output_embeddings()
        return None if head is None else head(state)
    classifier = classifier_of(model) if value.head else None
    if classifier is None:
        return None
    return torch.func.functional_call(classifier, dict(value.head), (last_token(state, mask),))


def last_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state of every row's last token that is no padding; of the last one without a mask."""
    if mask is None:
        return states[:, -1]
    index = (mask.ne(0) * torch.arange(mask.shape[-1], device=mask.device)).argmax(-1)
    return states[torch.arange(states.shape[0], device=states.device), index]


def loss_of(logits: Tensor | None, labels: Tensor, config: ShadowConfig) -> Tensor | None:
    """PEFT's loss of the shadow's logits; None for other tasks."""
    if logits is None or config.task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        return None
    n = logits.shape[-1]
    if config.task_type == "CAUSAL_LM":
        return F.cross_entropy(logits[..., :-1, :].reshape(-1, n), labels[..., 1:].reshape(-1), ignore_index=-100)
    if n == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).reshape(-1))
    if labels.dtype in (torch.long, torch.int):
        return F.cross_entropy(logits.reshape(-1, n), labels.reshape(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def with_loss(output: Any, extra: Tensor) -> Any:
    """A model's output, a tuple too, with something added to its loss."""
    if isinstance(output, tuple):
        items: tuple[Any, ...] = output  # pyright: ignore[reportUnknownVariableType]
        return (items[0] + extra, *items[1:])
    if getattr(output, "loss", None) is not None:
        output.loss = output.loss + extra
    return output


def merge(*_: Any, **__: Any) -> NoReturn:
    """Shadow cannot be merged.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "Shadow cannot be merged into the base model: the correction depends on the input and on the shadow state, and "
        "is no change of a weight. Use the value with `call`, or the shadow network by itself with `detached`."
    )


# -- files ------------------------------------------------------------------------------------------------

_KEYS = {"shadow_backbone": "backbone", "shadow_projection": "projection", "shadow_head": "head"}


def to_tensors(value: Shadow) -> dict[str, Tensor]:
    """The tensors of a PEFT checkpoint.

    Args:
        value: the shadow.

    Returns:
        Key -> tensor.
    """
    found = {f"base_model.model.{name}": leaf for name, leaf in value.whole.items()}
    for path, leaves in value.blocks.items():
        for name, leaf in leaves.items():
            found[f"base_model.model.{path}.{name.replace('.', '.default.', 1)}"] = leaf
    for key, part in _KEYS.items():
        found |= {f"base_model.{key}.default.{name}": leaf for name, leaf in getattr(value, part).items()}
    return found


def from_tensors(tensors: Mapping[str, Tensor], config: ShadowConfig) -> Shadow:
    """The inverse of `to_tensors`.

    Args:
        tensors: key -> tensor.
        config: the config.

    Returns:
        The value.

    Raises:
        SiteError: if a key is none, or a block is incomplete.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_KEYS.values(), "whole")}
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, leaf in tensors.items():
        if found := re.fullmatch(r"base_model\.(shadow_(?:backbone|projection|head))\.default\.(.+)", key):
            parts[_KEYS[found[1]]][found[2]] = leaf
        elif found := re.fullmatch(
            r"base_model\.model\.(.+)\.(shadow_(?:down|up|update_transform|update_gate))\.default\.(.+)", key
        ):
            blocks.setdefault(found[1], {})[f"{found[2]}.{found[3]}"] = leaf
        elif found := re.fullmatch(r"base_model\.model\.(.+)", key):
            parts["whole"][found[1]] = leaf
        else:
            raise SiteError(f"Shadow: {key!r} is no key of a checkpoint.")
    if not blocks or not parts["backbone"]:
        raise SiteError(f"Shadow: there is no {'shadow backbone' if blocks else 'block'} among the keys.")
    ordered = sorted(blocks.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])])
    value = Shadow(dict(ordered), parts["backbone"], parts["projection"], parts["head"], parts["whole"], config)
    _check_blocks(value)
    return value


def _check_blocks(value: Shadow) -> None:
    width = next((p["shadow_up.weight"].shape[0] for p in value.blocks.values() if "shadow_up.weight" in p), 0)
    for path, leaves in value.blocks.items():
        _compare(repr(path), leaves, block_shapes(value.config, width))


def save(value: Shadow, directory: str | os.PathLike[str]) -> None:
    """Write a PEFT checkpoint. A failure leaves an older one as it was.

    Args:
        value: the shadow.
        directory: the folder, made if need be.

    Raises:
        AdapterFileError: if `directory` is a file.
    """
    folder = Path(directory)
    if folder.is_file():
        raise AdapterFileError(f"Provided path ({folder}) should be a directory, not a file.")
    _check_blocks(value)
    tensors = {key: leaf.detach().cpu().contiguous() for key, leaf in to_tensors(value).items()}
    values = {**value.config.to_dict(), "inference_mode": True, "peft_version": _FORMAT_OF}
    text = json.dumps(dict(sorted(values.items())), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    write_all(folder, {WEIGHTS: to_bytes(tensors, {"format": "pt"}), CONFIG: text.encode()})


def load(directory: str | os.PathLike[str], *, model: nn.Module | None = None) -> Shadow:
    """Read a PEFT checkpoint.

    Args:
        directory: the folder.
        model: if given, every tensor is compared with what this model needs, and comes to its device; the backbone, the
            projection and the head also to its dtype, as PEFT's do.

    Returns:
        The value, without a model on the CPU.

    Raises:
        AdapterFileError: if the files are no shadow, malformed, or do not fit the model.
    """
    folder = Path(directory)
    config = read_config(folder)
    if not isinstance(config, ShadowConfig):
        raise AdapterFileError(f"{folder} holds a {config.peft_type} adapter, not Shadow.")
    try:
        value = from_tensors(_read_tensors(folder)[0], config)
        if model is not None:
            like = next(model.parameters())
            blocks = {path: {n: t.to(like.device) for n, t in p.items()} for path, p in value.blocks.items()}
            parts = {name: _as(like, getattr(value, name)) for name in _KEYS.values()}
            whole = {name: t.to(like.device) for name, t in value.whole.items()}
            value = value.replace(blocks=blocks, whole=whole, **parts)
            check(model, value)
            for path in value.blocks:
                _at(model, path)
    except AdapterFileError:
        raise
    except AdapterError as error:
        raise AdapterFileError(f"{folder / WEIGHTS}: {error}") from error
    return value
