"""Subspaces of a weight: its outputs in clusters of like singular vectors, and the main directions of each.

U S V^T is the singular value decomposition of the weight, with the bias as one more column. Outputs whose rows of U are
near to each other are a cluster; the main directions of a cluster are those of its rows of U.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.parts import svd
from funcadapt.parts.kmeans import clusters

if TYPE_CHECKING:
    from funcadapt.methods.adamss import AdamssConfig
    from funcadapt.sites import Site


def count(p: Leaf) -> int:
    """How many subspaces the leaves of a site have."""
    return sum(name.startswith("adamss_A.") for name in p)


class Spaces(NamedTuple):
    """The decomposition of one weight.

    Attributes:
        u: U (out, r).
        v: V^T (r, columns).
        rows: the outputs in each cluster.
    """

    u: Tensor
    v: Tensor
    rows: list[Tensor]


def spaces(site: Site, config: AdamssConfig, weight: Callable[[], Tensor]) -> Spaces:
    """The r largest singular directions of a weight, and the clusters of its outputs, in float32.

    Args:
        site: the site.
        config: the config at it.
        weight: gives the base weight, and has the bias in its attribute of that name.

    Returns:
        The decomposition.

    Raises:
        SiteError: if the layer has a bias that is not given, or the weight is on the meta device.
    """
    matrix, bias = weight().flatten(1), getattr(weight, "bias", None)
    if matrix.is_meta:
        raise SiteError(
            f"AdaMSS clusters the outputs of {site.path!r} by the values of its weight, which is on the meta device, "
            "so the sizes of its leaves are not known. Load the model's weights first."
        )
    if site.bias:
        if bias is None:
            raise SiteError(f"AdaMSS decomposes the weight of {site.path!r} with its bias, which is not at hand.")
        matrix = torch.cat([matrix, bias.reshape(-1, 1).to(matrix)], 1)
    u, _, v = svd.largest(matrix.to(torch.float32), min(config.r, *matrix.shape), 2, config.random_seed)
    labels = clusters(u, min(config.num_subspaces, len(u)))
    found = [(labels == i).nonzero().flatten() for i in range(int(labels.max()) + 1)]
    return Spaces(u, v, [rows for rows in found if len(rows)])


def directions(rows: Tensor, config: AdamssConfig) -> Tensor:
    """The main directions of the rows of a cluster: as PEFT computes them, draw by draw from torch's own generator.

    Args:
        rows: (size, r).
        config: the config, which says how many directions.

    Returns:
        (k, r), orthonormal.
    """
    gram = rows @ rows.T
    rank = min(len(rows), config.subspace_rank)
    if config.use_dynamic_rank:
        s = svd.largest(gram, len(rows), 2)[1]
        rank = max(1, min(rank, int((s > config.svd_threshold * s[0]).sum())))
    return linalg.qr(rows.T @ svd.largest(gram, rank, 2)[0]).Q.T.contiguous()
