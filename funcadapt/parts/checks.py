"""What the configs of several methods refuse, and what is wrong with leaves that were read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.method import Leaf


def check_positive(config: AdapterConfig, *fields: str) -> None:
    """Raise ValueError unless the integers of some fields are positive, those in their patterns too."""
    for field in fields:
        patterns: Mapping[str, int] | None = getattr(config, config.patterned.get(field, ""), None)
        for name, value in {field: getattr(config, field), **(patterns or {})}.items():
            if value <= 0:
                where = "" if name == field else f" for {name!r}"
                raise ValueError(f"`{field}` should be a positive integer value but the value passed is {value}{where}")


def check_one_of(config: AdapterConfig, first: str, second: str) -> None:
    """Raise ValueError unless exactly one of two fields, a size and a number that make the inputs, is not 0."""
    a, b = getattr(config, first), getattr(config, second)
    if a == 0 and b == 0:
        raise ValueError(f"Either `{first}` or `{second}` must be non-zero. Currently, {first} = {a} and {second} = "
                         f"{b}.")  # fmt: skip
    if a != 0 and b != 0:
        raise ValueError(f"You can only specify either {first} ({a}) or {second} ({b}), but not both simultaneously, "
                         f"because {first} x {second} == in_features.")  # fmt: skip


def check_layers(config: Any, *, of_names: bool = False) -> None:
    """The fields that choose among layers go together.

    Args:
        config: the config.
        of_names: whether they choose among the layers of names only, not of a regular expression.

    Raises:
        ValueError: if they do not.
    """
    if of_names and isinstance(config.target_modules, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(config, field) is not None:
                raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


def check_bias(config: Any) -> None:
    """Raise ValueError unless `bias` is "none", "all" or, after the method's name, "lora_only"."""
    own = f"{config.peft_type.lower()}_only"
    if config.bias not in ("none", "all", own):
        raise ValueError(f"`bias` must be 'none', 'all' or {own!r}, got {config.bias!r}.")


def check_rates(config: AdapterConfig, *fields: str) -> None:
    """Raise ValueError unless the rates of dropout are in [0, 1)."""
    for field in fields:
        if not 0 <= getattr(config, field) < 1:
            raise ValueError(f"`{field}` must be in [0, 1), got {getattr(config, field)}.")


def check_common(config: Any) -> None:
    """The checks of most configs: `r`, the layers, `bias`, and the dropout that is called after the method.

    Args:
        config: the config.

    Raises:
        ValueError: if a value is out of range, or they contradict each other.
    """
    check_positive(config, "r")
    check_layers(config)
    check_bias(config)
    check_rates(config, f"{config.peft_type.lower()}_dropout")


def check_leaves(path: str, p: Leaf, expected: Mapping[str, tuple[int | None, ...]], lead: bool = True) -> None:
    """Exactly the leaves that there must be, in shapes of which None is any size.

    Args:
        path: the site's path, "" for what sites share.
        p: the leaves.
        expected: name -> shape.
        lead: whether experts may come first, as many in every leaf.

    Raises:
        SiteError: if one is missing, or of another shape.
    """
    where = f"The site {path!r}" if path else "The file"
    experts: set[tuple[int, ...]] = set()
    for name, shape in expected.items():
        if name not in p:
            raise SiteError(f"{where} lacks {name!r}.")
        got = tuple(p[name].shape)
        own = got[len(got) - len(shape) :] if lead and len(got) == len(shape) + 1 else got
        experts.add(got[: len(got) - len(own)])
        fits = len(own) == len(shape) and all(want in (None, n) for want, n in zip(shape, own, strict=True))
        if not fits or len(experts) > 1:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise SiteError(f"{where} has {name} of shape {got}, expected ({sizes}) by its config.")
