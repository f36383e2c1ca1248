"""RoAd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import GROUPED, Dense, Parity, Spec, Variant, config

GROUP = 2  # of every variant here; the leaves say nothing of it


def rotation(p: Mapping[str, Tensor], out: int, group: int) -> Tensor:
    """R, number by number."""
    theta, alpha = p["road_theta"], p["road_alpha"]
    half, rows = group // 2, [[theta.new_zeros(()) for _ in range(out)] for _ in range(out)]
    for g in range(out // group):
        for j in range(half):
            first, second = g * group + j, g * group + half + j
            if len(theta) == out // 2:  # road_1: an angle for a pair
                at = [g * half + j] * 4
            elif len(theta) == out:  # road_2: an angle for a row
                at = [first, second] * 2
            else:  # road_4: of the cosines of the group, and then of its sines
                start = g * 2 * group
                at = [start + j, start + half + j, start + group + j, start + group + half + j]
            rows[first][first], rows[second][second] = (alpha[i] * theta[i].cos() for i in at[:2])
            rows[first][second], rows[second][first] = (alpha[i] * theta[i].sin() for i in at[2:])
            rows[first][second] = -rows[first][second]
    return torch.stack([torch.stack(row) for row in rows])


def road(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    r = rotation(p, site.out_features, GROUP)
    return (r @ weight.flatten(1)).reshape(weight.shape), None if bias is None else r @ bias


SPECS = {
    "road": Spec(
        [
            # first, as the others' laws want gradients of a sum of squares, which rotations do not change
            Variant("road_2", config(fa.RoadConfig, group_size=GROUP, variant="road_2"), refused=GROUPED),
            Variant("road_1", config(fa.RoadConfig, group_size=GROUP), refused=GROUPED),
            Variant(
                "road_4",
                config(fa.RoadConfig, group_size=GROUP, variant="road_4", init_weights=False),
                refused=GROUPED,
                identity=False,
            ),
        ],
        road,
        {
            variant: Parity({"variant": variant, "group_size": 4, "target_modules": ["q_proj", "up_proj"]}, ("llama",))
            for variant in ("road_1", "road_2", "road_4")
        }
        | {
            "random": Parity(
                {"variant": "road_4", "group_size": 16, "init_weights": False, "target_modules": ["q_proj"]}, ("llama",)
            )
        },
    )
}
