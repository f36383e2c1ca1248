"""The variants of LoRA: methods that `LoraConfig` selects when one of its fields asks for them.

A variant is a file in `funcadapt/methods/` that registers a `Method` with `config=LoraConfig, when=asks("its_field")`.
Nothing else says so: a field of `LoraConfig` is implemented as soon as a registered method asks for it, and raises
NotImplementedError until then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from funcadapt.config import freeze
from funcadapt.errors import did_you_mean
from funcadapt.method import Method, methods

_S = TypeVar("_S")

# inits that need nothing of the weight, so that they go with every shape of A and B
PLAIN = (True, False, "gaussian")


def asks(field: str, value: Any = None, check: Callable[[Any], None] | None = None) -> Callable[[Any], bool]:
    """The `when` of a variant: whether a config asks for it.

    Args:
        field: the field of the config.
        value: the value that asks for the variant; by default any that counts as true, or is a dict, even an empty one.
        check: raises an error if a config that asks for the variant cannot have it.

    Returns:
        The condition.
    """

    def when(config: Any) -> bool:
        found = getattr(config, field)
        return bool(found) or isinstance(found, Mapping) if value is None else found == value

    when.field, when.check = field, check  # pyright: ignore[reportFunctionMemberAccess]
    return when


class Unclaimed:
    """The fields of a config class that no registered method asks for.

    Args:
        *fields: those that have no meaning without such a method.
    """

    def __init__(self, *fields: str) -> None:
        self.fields = fields

    def __get__(self, instance: object, owner: type[Any]) -> frozenset[str]:
        """The fields, for the class that is asked."""
        return _unclaimed(self.fields, owner, methods())


@functools.lru_cache(maxsize=8)
def _unclaimed(fields: tuple[str, ...], owner: type[Any], registered: tuple[Method, ...]) -> frozenset[str]:
    claimed = {getattr(method.when, "field", None) for method in registered if method.config is owner}
    return frozenset(fields) - claimed


def check_variant(config: Any) -> None:
    """That a config asks for one variant at most, and for one that it can have.

    Args:
        config: the config.

    Raises:
        ValueError: if it asks for two.
    """
    found = [m for m in methods() if m.config is type(config) and hasattr(m.when, "field") and m.when(config)]
    if len(found) > 1:
        names = " and ".join(repr(method.when.field) for method in reversed(found))  # pyright: ignore
        raise ValueError(f"Invalid or unsupported variant combination: {names}. Ask for one of them.")
    for method in found:
        check: Any = getattr(method.when, "check", None)
        if check is not None:
            check(config)


def check_init(config: Any, *others: str) -> None:
    """That the init looks at no weight, where the factors of a variant have other shapes or meanings.

    Args:
        config: the config.
        *others: further inits that the variant can have.

    Raises:
        ValueError: if it is another one.
    """
    how = config.init_lora_weights
    if how not in PLAIN and how not in others:
        known = ", ".join(map(repr, (*PLAIN, *others)))
        raise ValueError(f"init_lora_weights={how!r} does not go with {method_field(config)!r}. It is one of {known}.")


def method_field(config: Any) -> str:
    """The field by which a config asks for its variant."""
    return next(m.when.field for m in methods() if m.config is type(config) and m.when(config))  # pyright: ignore


def settings(cls: type[_S], given: Mapping[str, Any], field: str) -> _S:
    """The nested config in a field, as an instance of its class.

    Args:
        cls: a dataclass, whose `__post_init__` checks the values.
        given: the dict in the config.
        field: the name of the field.

    Returns:
        The instance.

    Raises:
        ValueError: if the dict has a key that the class does not know; near matches are listed.
    """
    names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in names:
            raise ValueError(f"`{field}` has no field {name!r}.{did_you_mean(name, names)}")
    return cls(**{name: freeze(value) for name, value in given.items()})


def setting(cls: type[Any], given: Mapping[str, Any] | None, name: str) -> Any:
    """One value of a nested config that was checked before, in a form that dynamo can trace.

    Args:
        cls: the dataclass, for its default.
        given: the dict in the config.
        name: the value's name.

    Returns:
        The value.
    """
    return (given or {}).get(name, getattr(cls, name))
