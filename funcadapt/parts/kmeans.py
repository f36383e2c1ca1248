"""K-means as scikit-learn computes it, without scikit-learn, so that a file of PEFT's means here what it meant there.

It is KMeans(init="random", n_init=1, max_iter=10, random_state=123456789), PEFT's choice for AdaMSS, in float64.
(scikit-learn's is in float32: a row that is equally near to two centers may go to the other one.)
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

_SEED, _ROUNDS, _TOLERANCE = 123456789, 10, 1e-4  # PEFT's arguments of KMeans, and its default


def clusters(rows: Tensor, k: int) -> Tensor:
    """Lloyd's k-means, with scikit-learn's rules for the start, the end and empty clusters.

    Args:
        rows: (n, d).
        k: how many clusters, at most n.

    Returns:
        (n), which one each row is in.
    """
    x = rows.detach().cpu().to(torch.float64)
    limit = x.var(0, correction=0).mean() * _TOLERANCE
    x = x - x.mean(0)
    centers, labels = x[torch.tensor(_choice(len(x), k))], torch.full((len(x),), -1)

    def nearest() -> Tensor:
        return (centers.square().sum(1) - 2 * (x @ centers.T)).argmin(1)

    for _ in range(_ROUNDS):
        before, labels = labels, nearest()
        counts = torch.bincount(labels, minlength=k).to(x.dtype)
        sums = torch.zeros_like(centers).index_add(0, labels, x)
        empty, far = (counts == 0).nonzero().flatten().tolist(), (x - centers[labels]).square().sum(1)  # pyright: ignore
        if empty and far.any():  # each gets the row that is farthest from its center
            for e, i in zip(empty, far.argsort(descending=True).tolist(), strict=False):  # pyright: ignore
                sums[labels[i]] -= x[i]
                counts[labels[i]] -= 1
                sums[e], counts[e] = x[i], 1
        means = sums / counts.clamp_min(1).unsqueeze(1)
        old, centers = centers, torch.where(counts.unsqueeze(1) > 0, means, means[counts.argmax()])
        if torch.equal(labels, before):
            return labels
        if (centers - old).square().sum() <= limit:
            break
    return nearest()


def _uniform(seed: int) -> Callable[[], float]:
    """Numpy's `RandomState(seed).rand`: the Mersenne twister of the standard library, seeded as numpy does."""
    words = [seed]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    source = random.Random()
    source.setstate((3, (*words, 624), None))
    return source.random


def _choice(n: int, k: int) -> list[int]:
    """Numpy's `RandomState(seed).choice(n, k, replace=False, p=[1 / n] * n)`."""
    draw, found = _uniform(_SEED), list[int]()
    p = [float(torch.tensor(1.0) / n)] * n  # in float32, as scikit-learn has it
    while len(found) < k:
        numbers = [draw() for _ in range(k - len(found))]
        for i in found:
            p[i] = 0.0
        total = list(itertools.accumulate(p))
        found += dict.fromkeys(bisect.bisect_right(total, x * total[-1]) for x in numbers)
    return found
