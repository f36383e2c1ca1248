"""The exceptions of funcadapt, and the one form that its messages take.

Every message says what went wrong, where (the site path), what was expected, what came instead, and what to
do about it. Exceptions derive from the built-in type that a caller would guess (`ValueError`, mostly), so code
written for PEFT keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterError(ValueError):
    """Something about an adapter, or about the model it is applied to, does not fit."""


class TargetError(AdapterError):
    """A config matched nothing, or names something that the model does not have."""


class SiteError(AdapterError):
    """The leaves at one site do not fit the layer that they are applied to."""


class AdapterFileError(AdapterError):
    """A checkpoint is missing, truncated, malformed, or does not say what an adapter needs."""


class BypassWarning(UserWarning):
    """A call finished in which some adapted layer never ran, so its adapter had no effect."""


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an error message about an unknown name: near matches, or what there is.

    Args:
        name: what was asked for.
        known: the names that exist.
        count: how many to show at the most.

    Returns:
        A sentence that starts with a space, or an empty string if nothing is known.

    Example:
        >>> did_you_mean("q_prj", ["q_proj", "k_proj"])
        " Did you mean 'q_proj', 'k_proj'?"
    """
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if near:
        return f" Did you mean {', '.join(map(repr, near))}?"
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")
    return f" There are: {shown}."
