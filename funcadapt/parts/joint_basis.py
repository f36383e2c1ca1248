"""What FRoD makes of the weights of layers of one role: a basis that they have in common, and their shares of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.parts.checks import check_leaves
from funcadapt.parts.forms import columns
from funcadapt.sites import Site


def category(path: str) -> str:
    """The role of a layer, by PEFT's rule: the last two parts of its path, or one if the other is a number.

    Args:
        path: its path.

    Returns:
        The name, "self_attn_q_proj".
    """
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    name = f"{parts[-2]}_{parts[-1]}"
    # BERT's attention has an output.dense of its own
    return "attention_output" if name == "output_dense" and "attention" in parts[-3:-2] else name


def depth(path: str, fallback: int) -> int:
    """The number of a layer's block, by PEFT's rule; the fallback if its path says none."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), fallback)


def sizes(site: Site) -> tuple[int, int]:
    """Rows and columns of the weight as a matrix; an embedding's are those that torch stores."""
    if site.kind == "embedding":
        return site.in_features, site.out_features
    return site.out_features, columns(site)


def matrices(site: Site, weight: Tensor) -> list[Tensor]:
    """The canonical weight as such a matrix, or those of all experts."""
    if site.stack:
        return [*weight]
    return [weight.t() if site.kind == "embedding" else weight.flatten(1)]


def categories(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of each category in the order of their blocks.

    Args:
        sites: all sites, in model order.

    Returns:
        Category -> sites.

    Raises:
        SiteError: if those of one category have different numbers of columns.
    """
    members: dict[str, list[tuple[int, Site]]] = {}
    for i, site in enumerate(sites):
        members.setdefault(category(site.path), []).append((depth(site.path, i), site))
    found = {name: [site for _, site in sorted(row, key=lambda pair: pair[0])] for name, row in members.items()}
    for name, row in found.items():
        widths = {sizes(site)[1] for site in row}
        if len(widths) > 1:
            raise SiteError(f"The layers of the category {name!r}, such as {row[0].path!r}, share a basis, but they "
                            f"have {sorted(widths)} inputs. Adapt those of one size.")  # fmt: skip
    return found


def basis(matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """V: what the weights of a category have in common, as PEFT computes it.

    Args:
        matrices: the weights, (rows, columns) each, float32.
        alpha: the ridge.

    Returns:
        (columns, columns).
    """
    stacked = torch.cat([*matrices])
    if stacked.shape[0] < stacked.shape[1]:
        return linalg.svd(stacked, full_matrices=True)[2].T
    q, r = linalg.qr(stacked)
    ridge = alpha * torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    inverses: list[Tensor] = [linalg.inv(part.T @ part + ridge) for part in q.split([len(m) for m in matrices])]
    mean = sum(inverses, torch.zeros_like(ridge)) / len(matrices)
    return r.T @ linalg.eigh(mean)[1]


def decompose(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U with columns of length 1, and l_0, so that U diag(l_0) V^T is a weight.

    Args:
        matrix: the weight, (rows, columns).
        v: V.

    Returns:
        U (rows, columns) and l_0 (columns), in float64.
    """
    w, v = matrix.to(v.device, torch.float64), v.double()
    try:
        scaled: Tensor = linalg.solve(v, w.T).T
    except RuntimeError:  # V is singular
        scaled = w @ linalg.pinv(v, rtol=1e-6).T
    strength: Tensor = linalg.vector_norm(scaled, dim=0)
    some = strength > 1e-12
    return torch.where(some, scaled / torch.where(some, strength, 1.0), 0.0), strength


def entries(width: int, rate: float) -> int:
    """How many numbers S has: the share `rate` of a square, off its diagonal, and at least one."""
    count = min(int(width * width * rate), width * (width - 1))
    return max(1, count) if rate > 0 and width > 1 else count


def off_diagonal(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows and columns (2, count) of random places of a square matrix, none on its diagonal."""
    drawn = torch.randperm(width * (width - 1), generator=generator)[:count] if count else torch.empty(0).long()
    rows = drawn // max(width - 1, 1)
    inner = drawn - rows * (width - 1)
    return torch.stack([rows, inner + (inner >= rows)])  # the diagonal is left out


def check(config: Any, path: str, p: Leaf) -> None:
    """A basis and the places of S for each category, or l and the numbers of S."""
    if path:
        check_leaves(path, p, {"frod_lambda_l": (None,), "frod_lambda_s_values": (None,)})
        return
    for name in p:
        if name.startswith("frod_V."):
            _check_category(p, name.removeprefix("frod_V."))


def _check_category(p: Leaf, name: str) -> None:
    """Raise SiteError unless the leaves of a category fit each other."""
    width = p[f"frod_V.{name}"].shape[0]
    expected: dict[str, tuple[int | None, ...]] = {f"frod_V.{name}": (width, width)}
    check_leaves("", p, {**expected, f"frod_s_indices.{name}": (2, None), f"frod_s_size.{name}": (2,)}, lead=False)
    places, size = p[f"frod_s_indices.{name}"], p[f"frod_s_size.{name}"]
    if places.is_floating_point() or (places.numel() and not (places.min() >= 0 and places.max() < width)):
        raise SiteError(f"The file has frod_s_indices.{name} that are no places of a matrix of {width} rows.")
    if [int(n) for n in size] != [width, width]:
        raise SiteError(f"The file has frod_s_size.{name} {size.tolist()}, and frod_V.{name} of {width} rows.")  # pyright: ignore
