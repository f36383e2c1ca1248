"""Texts of clearly different kinds that come with every Python, so that nothing is downloaded.

Training and held-out documents never overlap: they are different modules, topics or characters.
"""

from __future__ import annotations

import html.entities
import importlib
import importlib.util
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader
from typing import Any

import torch
from torch import Tensor

# One package, because its modules share a vocabulary that an adapter can learn in a minute.
_TRAIN_MODULES = (
    *("base_events", "base_futures", "base_subprocess", "coroutines", "events", "exceptions"),
    *("futures", "locks", "proactor_events", "protocols", "queues", "runners", "selector_events"),
    *("sslproto", "tasks", "transports", "windows_events"),
)
_HELD_OUT_MODULES = ("streams", "subprocess", "taskgroups", "timeouts", "unix_events")
_HELD_OUT_EVERY = 5


class TextMissingError(RuntimeError):
    """This Python comes without a part of its standard library that a text is made of."""


class TextTooShortError(ValueError):
    """A text has fewer tokens than were asked for."""


@dataclass(frozen=True)
class Text:
    """One kind of text.

    Attributes:
        name: a short name, also for the adapter that is trained on it.
        about: what it is, in a few words.
        train: the documents to train on.
        held_out: the documents to measure on, disjoint from `train`.
    """

    name: str
    about: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def python_texts() -> tuple[Text, ...]:
    """Returns three kinds of text: source code, documentation and a table of characters.

    Raises:
        TextMissingError: if this Python lacks one of them.
    """
    return source_code(), documentation(), characters()


def source_code() -> Text:
    """Returns the source code of the modules of `asyncio`.

    Raises:
        TextMissingError: if a module is missing or comes without its source.
    """
    train, held_out = (
        tuple(_source(f"asyncio.{name}") for name in names) for names in (_TRAIN_MODULES, _HELD_OUT_MODULES)
    )
    return Text("code", "source of asyncio", train, held_out)


def documentation() -> Text:
    """Returns the chapters of the language reference that `help()` shows, from `pydoc_data.topics`.

    Raises:
        TextMissingError: if this Python comes without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextMissingError(_advice("pydoc_data.topics")) from error
    train, held_out = _split([text for _, text in sorted(topics.items())])
    # Topics quote one another ("for" is a section of "compound"), so that different topics are not
    # enough: no held-out paragraph may be anywhere in training.
    seen = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    train = ["\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for text in train]
    return Text("docs", "language reference", tuple(train), tuple(held_out))


def characters() -> Text:
    """Returns a table of the characters that HTML has names for, with their Unicode names.

    The names are those of `html.entities` and `unicodedata`, which are part of every Python.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, text in html.entities.html5.items():
        if name.endswith(";") and len(text) == 1:
            names[text].append(f"&{name}")
    rows = [
        f"U+{ord(character):04X}  {unicodedata.name(character)}  {' '.join(sorted(entities))}"
        for character, entities in sorted(names.items())
        if unicodedata.name(character, "")
    ]
    train, held_out = _split(["\n".join(rows[i : i + 40]) + "\n" for i in range(0, len(rows), 40)])
    return Text("characters", "table of HTML entities", tuple(train), tuple(held_out))


def windows(
    documents: Sequence[str], tokenizer: Any, *, count: int, length: int, seed: int, least: int | None = None
) -> Tensor:
    """Cuts documents into windows of equally many tokens, and draws some of them.

    No window spans two documents, and no two windows overlap.

    Args:
        documents: the texts.
        tokenizer: a Hugging Face tokenizer.
        count: how many windows to draw, without replacement.
        length: the number of tokens in each.
        seed: determines which windows are drawn, and their order.
        least: how many are enough, where there are fewer than `count`; by default all are needed.

    Returns:
        The token ids, `(count, length)`, or as many windows as there are.

    Raises:
        TextTooShortError: if the documents do not fill that many windows.
    """
    rows: list[list[int]] = []
    for document in documents:
        ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    needed = count if least is None else least
    if len(rows) < needed:
        raise TextTooShortError(f"the text fills only {len(rows)} windows of {length} tokens, and {needed} are needed")
    return torch.tensor(random.Random(seed).sample(rows, min(count, len(rows))))


def _source(name: str) -> str:
    # Through the import system, so that a standard library in a zip file works too.
    spec = importlib.util.find_spec(name)
    loader = spec.loader if spec else None
    source = loader.get_source(name) if isinstance(loader, InspectLoader) else None
    if source is None:
        raise TextMissingError(_advice(f"the source of {name!r}"))
    return source


def _split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    train: list[str] = []
    held_out: list[str] = []
    for i, document in enumerate(documents):
        (held_out if i % _HELD_OUT_EVERY == 0 else train).append(document)
    return train, held_out


def _advice(missing: str) -> str:
    return (
        f"this Python comes without {missing}: install the full standard library"
        " (on Debian and Ubuntu: apt-get install libpython3-stdlib)"
    )
