"""MiCA: LoRA whose B is fixed to the directions in which the base weight does least.

    y = W x + b + s * B A drop(x)        B: the left singular vectors of W of its r smallest singular values

Leaves: as LoRA's; `lora_B` (at embeddings `lora_embedding_B`) is never trained, but it is in checkpoints.
Init (`init_lora_weights="mica"`): A zero, which is the identity. W of a convolution is a matrix of (out, in * kernel),
group by group.
Cost: r in parameters a layer are trained; LoRA's flops, less those of the gradient of B. The init takes an SVD of W.
Dense form: W + s * B A.

Source: "MiCA: Minor Component Adaptation" 2026, arXiv:2604.01694. Differs from PEFT: also on convolutions, attention
and parameters; in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.method import Draw, Fresh, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lowrank
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_variants import asks
from funcadapt.sites import Site


def minor_directions(weight: Tensor, r: int) -> Tensor:
    """The left singular vectors of the r smallest singular values, in at least float32.

    Args:
        weight: (..., out, in).
        r: how many.

    Returns:
        (..., out, r).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return linalg.svd(wide, full_matrices=False)[0][..., -r:]


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A of zeros, and B from the base weight."""
    params, buffers = lora.init(site, dataclasses.replace(config, init_lora_weights=True), draw, weight)
    name_a, name_b = lowrank.factor_names(params)
    b, groups = params.pop(name_b), site.groups
    rows, columns = site.out_features // groups, math.prod(site.shape[1:])
    if config.r > groups * min(rows, columns):
        raise SiteError(f"MiCA at {site.path!r} needs r <= {groups * min(rows, columns)}, got r={config.r}.")
    if not draw.abstract:
        found = minor_directions(weight().detach().reshape(groups, rows, columns), config.r // groups)
        b = draw.cast(found.reshape(b.shape))
    return Fresh({name_a: torch.zeros_like(params[name_a])}, {**buffers, name_b: b})


METHOD = register(
    Method(
        name="mica",
        config=lora.LoraConfig,
        when=asks("init_lora_weights", "mica"),
        kinds=KINDS,
        keys=lora.METHOD.keys,
        init=init,
        constants=frozenset({"lora_B", "lora_embedding_B"}),
        after=lora.after,
        weight=lora.weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=lora.check,
        dropout=lora.METHOD.dropout,
        reads=frozenset(),
        neutral=lora.neutral,
        grouped=lora_forms.grouped,
        masked=lora_forms.masked,
        view=lora.VIEW,
    )
)
