"""Poly: a bank of skills, each a LoRA, mixed for every row by the weights that its task has learned.

    y = W x + b + B_t^T A_t^T x / r          A_t = sum_s w[t, q, s] A[q, s],    B_t likewise,    for each split q
    w[t, q, :] = sigmoid(logits[t, q, :]) / (its sum + 1e-12)

In training the sigmoid is a sample of the relaxed Bernoulli distribution of temperature 1, drawn for every row. With
n_splits = q > 1 (multi-head routing) the inputs and the outputs are cut into q parts, each with a mixture of its own.

The task of each row is an input of the call: `fa.functional_call(model, adapter, args, inputs={"task_ids": ids})`,
ids (rows) of integers in [0, n_tasks). It can be different in every row; a number without an axis is the task of all.
There is no dense form, as there is a weight for every row.

Leaves: `poly_lora_A` (q, S, in / q, r), `poly_lora_B` (q, S, r, out / q), `module_logits` (n_tasks, q S).
Init: A kaiming-uniform, B zero: the identity. The logits are uniform in (-0.001, 0.001).
Cost: S r (in + out) + n_tasks q S parameters a layer; for each row 2 S r (in + out) flops for the mixture, then LoRA's
for each token; twice that backward.

Source: Ponti et al. 2022, arXiv:2202.13914; Caccia et al. 2022 (multi-head routing), arXiv:2211.03831. Differs from
PEFT: rows of any number of axes, not only (rows, tokens, features); transformers' Conv1D; a negative task id raises
(PEFT counts from the end).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from funcadapt._torch import in_functorch, is_recording
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site

_EPS = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolyConfig(AdapterConfig):
    """Config of Poly, with PEFT's fields, defaults and meanings.

    Attributes:
        r: the rank of each skill.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether B starts at zero.
        poly_type: "poly", the only router that there is.
        n_tasks: how many tasks there are.
        n_skills: how many skills each layer has.
        n_splits: how many parts the features are cut into, each mixed by itself.

    Raises:
        ValueError: if a number is not positive.
    """

    peft_type: str = "POLY"
    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("r", "n_tasks", "n_skills", "n_splits"):
            value = getattr(self, field)
            if value <= 0:
                raise ValueError(f"`{field}` should be a positive integer value but the value passed is {value}")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["poly_lora_A"].shape[-1] if "poly_lora_A" in leaves else 0


def init(site: Site, config: PolyConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A kaiming-uniform, skill by skill; B zero, or likewise; small logits."""
    q, skills, r = config.n_splits, config.n_skills, config.r
    for what, size in (("inputs", site.in_features), ("outputs", site.out_features)):
        if size % q:
            raise SiteError(f"{site.path!r} has {size} {what}, which n_splits={q} does not divide.")
    d, out = site.in_features // q, site.out_features // q

    def drawn(rows: int, columns: int) -> Tensor:  # (q, S, columns, rows), drawn as PEFT does: skills first
        every = [draw.uniform(rows, columns, bound=1 / math.sqrt(columns)).t() for _ in range(skills * q)]
        return torch.stack(every).reshape(skills, q, columns, rows).transpose(0, 1).contiguous()

    a = drawn(r, d)
    b = draw.zeros(q, skills, r, out) if config.init_weights else drawn(out, r)
    logits = draw.uniform(config.n_tasks, q * skills, bound=1e-3)
    return Fresh({"poly_lora_A": a, "poly_lora_B": b, "module_logits": logits}, {})


def _tasks(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    tasks, rows, available = p.get("task_ids"), x.shape[0], p["module_logits"].shape[0]
    if tasks is None:
        raise SiteError(
            f"Poly at {layer.site.path!r} needs the task of each row: fa.functional_call(..., inputs={{'task_ids': "
            "ids}), with ids of shape (rows). (PEFT: task_ids should not be None.)"
        )
    if tasks.device.type == "cpu" and not (is_recording() or in_functorch()):  # elsewhere the values are not at hand
        wrong = tasks[(tasks < 0) | (tasks >= available)]
        if wrong.numel():
            raise SiteError(
                f"Poly at {layer.site.path!r}: Only {available} tasks available. Found task id = {int(wrong[0])}. "
                f"Expected numbers from 0 to {available - 1}."
            )
    tasks = tasks.to(device=p["module_logits"].device, dtype=torch.long)
    if not tasks.ndim:
        return tasks.expand(rows)
    # a layer that gets two axes may have its tokens among the rows: each entry is for consecutive ones then
    times = rows // max(1, tasks.shape[0]) if x.ndim == 2 else 1
    if tasks.ndim != 1 or times * tasks.shape[0] != rows:
        raise SiteError(
            f"Poly at {layer.site.path!r} got task_ids of shape {tuple(tasks.shape)}, expected ({rows},): one a row, "
            "or a number without an axis for all rows."
        )
    return tasks if times == 1 else tasks.repeat_interleave(times)


def mixture(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    """The weight of each skill: (rows, q, S)."""
    logits = p["module_logits"].index_select(0, _tasks(layer, p, x)).reshape(x.shape[0], *p["poly_lora_A"].shape[:2])
    if layer.training:
        # a sample of the relaxed Bernoulli distribution of temperature 1, as torch.distributions draws it
        tiny = torch.finfo(logits.dtype).eps
        probs = torch.rand_like(logits).clamp(tiny, 1 - tiny)
        logits = probs.log() - (-probs).log1p() + logits
    w = torch.sigmoid(logits)
    return w / (w.sum(-1, keepdim=True) + _EPS)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B_t^T A_t^T x / r, row by row."""
    site, a, b = layer.site, p["poly_lora_A"], p["poly_lora_B"]
    rows, (q, skills, _, r) = x.shape[0], a.shape
    a, b = a.reshape(q, skills, site.in_features // q, r), b.reshape(q, skills, r, site.out_features // q)
    if not rows:
        return y
    w = mixture(layer, p, x)
    a = torch.einsum("bqs,qsdr->bqdr", w, a).reshape(rows, site.in_features, r)
    b = torch.einsum("bqs,qsrd->bqrd", w, b).transpose(1, 2).reshape(rows, r, site.out_features)
    h = x.to(a.dtype).reshape(rows, -1, site.in_features) @ a
    return (y + (h @ b).reshape(y.shape) / r).to(y.dtype)


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
    raise SiteError(f"Poly at {layer.site.path!r} has a weight for every task, so it cannot be merged.")


def check(config: PolyConfig, path: str, p: Leaf) -> None:
    """All three leaves, of the sizes that the config says."""
    q, skills = config.n_splits, config.n_skills
    for name in METHOD.keys:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    a, b, logits = (tuple(p[name].shape) for name in METHOD.keys)
    if a[:2] != (q, skills) or b[:2] != (q, skills) or a[3:] != (config.r,) or b[2:3] != (config.r,):
        raise SiteError(
            f"The site {path!r} has poly_lora_A of shape {a} and poly_lora_B of shape {b}; its config says "
            f"({q}, {skills}, in, {config.r}) and ({q}, {skills}, {config.r}, out)."
        )
    if logits != (config.n_tasks, q * skills):
        raise SiteError(
            f"The site {path!r} has module_logits of shape {logits}, expected ({config.n_tasks}, {q * skills})."
        )


METHOD = register(
    Method(
        name="poly",
        config=PolyConfig,
        kinds=frozenset({"linear", "hf_conv1d"}),
        keys={
            "poly_lora_A": "poly_lora_A",
            "poly_lora_B": "poly_lora_B",
            "module_logits": "poly_router.module_logits",
        },
        init=init,
        after=after,
        weight=weight,
        check=check,
        inputs=frozenset({"task_ids"}),
        reads=frozenset(),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            package="poly",
            name="Poly",
            prefix="poly_",
            containers=("poly_lora_A", "poly_lora_B", "poly_router"),
            label="poly.",
            attributes={name: name for name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type")},
        ),
    )
)
