"""Poly."""

from __future__ import annotations

import torch

from funcadapt.methods.poly import PolyConfig
from specs import EVERY, LINEAR, Spec, Variant, config

TASK = {"task_ids": torch.tensor(1)}
SPECS = {
    "poly": Spec(
        [
            Variant(
                "plain",
                config(PolyConfig, r=2, n_tasks=3, n_skills=2, n_splits=2),
                refused=EVERY - LINEAR,
                no_dense=LINEAR,
                training=False,
                inputs=TASK,
            ),
            Variant(
                "random",
                config(PolyConfig, r=2, n_tasks=2, init_weights=False),
                refused=EVERY - LINEAR,
                no_dense=LINEAR,
                identity=False,
                training=False,
                inputs=TASK,
            ),
        ]
    )
}
