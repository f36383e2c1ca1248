"""(IA)^3."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, Dense, Spec, Variant, config


def ia3(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    vector = p["ia3_l"]
    outputs = vector.shape[0] == site.out_features if vector.ndim == 2 else vector.shape[1] == site.out_features
    vector = vector.flatten()
    if outputs:
        scaled = bias * vector if bias is not None else None
        return weight * vector.reshape(-1, *(1,) * (weight.ndim - 1)), scaled
    per_group = vector.reshape(site.groups, -1).repeat_interleave(site.out_features // site.groups, 0)
    return weight * per_group.reshape(*per_group.shape, *(1,) * (weight.ndim - 2)), bias


SPECS = {
    "ia3": Spec(
        [
            Variant("output", config(fa.IA3Config, feedforward_modules=[])),
            Variant(
                "input",
                lambda **targets: fa.IA3Config(**targets, feedforward_modules=next(iter(targets.values()))),
                EMBEDDINGS,
            ),
        ],
        ia3,
    )
}
