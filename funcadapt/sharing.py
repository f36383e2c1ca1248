"""Sites that get the same input share one down-projection: q, k and v of an attention, gate and up of an MLP.

Which sites those are is seen, not guessed: the first call of a model records what came in where. Later calls
compute the common part once, and each site takes its share only if its input is the very same tensor, unchanged;
otherwise it computes its own. The result is the same either way.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from funcadapt.layer import Layer
from funcadapt.method import Leaf, Shared


class Group:
    """The common part of a few sites, for the duration of one call."""

    __slots__ = ("layers", "parts", "ps", "shared", "version", "x")

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.layers: list[Layer] = []
        self.ps: list[Leaf] = []
        self.x: Tensor | None = None
        self.version = 0
        self.parts: dict[int, Tensor] = {}

    def join(self, layer: Layer, p: Leaf) -> int:
        """Add a site. Returns its number in the group."""
        self.layers.append(layer)
        self.ps.append(p)
        return len(self.ps) - 1

    def take(self, number: int, x: Tensor) -> Tensor | None:
        """The share of a site, or None if it has to compute its own: the input differs, or sharing is not possible.

        Args:
            number: the site's number in the group.
            x: its input.

        Returns:
            The intermediate of the method.
        """
        if self.x is not x or self.version != _version(x):
            self.x, self.parts = None, {}
            if not all(self.shared.ready(layer, p, x) for layer, p in zip(self.layers, self.ps, strict=True)):
                return None
            self.parts = dict(enumerate(self.shared.down(self.ps, x)))
            self.x, self.version = x, _version(x)
        part = self.parts.pop(number, None)
        if not self.parts:
            self.x = None  # let go of the activation
        return part


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Watch:
    """Sees, during a first call, which sites of one parent get the very same tensor."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[weakref.ref[Tensor], list[str]]] = {}
        self._groups: list[list[str]] = []

    def see(self, path: str, x: Tensor) -> None:
        """Note the input of a site. Nothing is kept alive: a reused address is no common input."""
        parent = path.rpartition(".")[0]
        last = self._last.get(parent)
        if last is not None and last[0]() is x:
            if path not in last[1]:
                last[1].append(path)
            return
        group = [path]
        self._groups.append(group)
        self._last[parent] = (weakref.ref(x), group)

    def groups(self) -> list[list[str]]:
        """Lists of at least two paths, no path in two of them."""
        taken: set[str] = set()
        found: list[list[str]] = []
        for group in self._groups:
            if len(group) > 1 and taken.isdisjoint(group):
                found.append(group)
                taken.update(group)
        return found


def make_groups(paths: Sequence[Sequence[str]], methods: dict[str, Shared]) -> dict[str, Group]:
    """A fresh group for each list of paths whose sites all take part, by path.

    Args:
        paths: what a `Watch` found.
        methods: path -> how that site shares.

    Returns:
        Path -> group.
    """
    made: dict[str, Group] = {}
    for group in paths:
        shares = {methods.get(path) for path in group}
        share = shares.pop()
        if share is not None and not shares:
            made.update(dict.fromkeys(group, Group(share)))
    return made
