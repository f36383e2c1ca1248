"""numpy's default random numbers without numpy: `default_rng(seed)`'s `choice` without replacement and `shuffle`.

PEFT draws the projections of some methods with numpy, so that a checkpoint without them can only be read by whoever
has the same stream: SeedSequence, PCG64 (XSL RR 128/64), Lemire's bounded integers, and Floyd's sampling. All are
fixed: numpy promises that the bit stream of PCG64 does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_M32, _M64, _M128 = 2**32 - 1, 2**64 - 1, 2**128 - 1
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


def _seeds(seed: int) -> list[int]:
    """The four 64-bit words that `SeedSequence(seed)` gives."""
    words = [seed >> 32 * i & _M32 for i in range(max(1, (seed.bit_length() + 31) // 32))]
    constant = 0x43B0D7E5

    def mixed(value: int) -> int:
        nonlocal constant
        value ^= constant
        constant = constant * 0x931E8875 & _M32
        value = value * constant & _M32
        return value ^ value >> 16

    def mix(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & _M32
        return value ^ value >> 16

    pool = [mixed(words[i] if i < len(words) else 0) for i in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mix(pool[target], mixed(pool[source]))
    for word in words[4:]:
        for target in range(4):
            pool[target] = mix(pool[target], mixed(word))
    constant, halves = 0x8B51F9DD, list[int]()
    for i in range(8):
        value = pool[i % 4] ^ constant
        constant = constant * 0x58F38DED & _M32
        value = value * constant & _M32
        halves.append(value ^ value >> 16)
    return [halves[2 * i] | halves[2 * i + 1] << 32 for i in range(4)]


class Stream:
    """The generator that `numpy.random.default_rng(seed)` makes.

    Args:
        seed: not negative.

    Example:
        >>> items = list(range(5))
        >>> Stream(42).shuffle(items)
        >>> items
        [4, 2, 3, 1, 0]
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"A seed of numpy's generator must not be negative, got {seed}.")
        words = _seeds(seed)
        increment = ((words[2] << 64 | words[3]) << 1 | 1) & _M128
        state = ((words[0] << 64 | words[1]) + increment) & _M128
        state = (state * _MULTIPLIER + increment) & _M128
        half: int | None = None

        def word(wide: bool) -> int:
            """The next 64 bits, or 32 of them: the low half first."""
            nonlocal state, half
            if half is not None and not wide:
                value, half = half, None
                return value
            state = (state * _MULTIPLIER + increment) & _M128
            value, turn = (state >> 64 ^ state) & _M64, state >> 122
            value = (value >> turn | value << (64 - turn)) & _M64
            if not wide:
                value, half = value & _M32, value >> 32
            return value

        self._word: Callable[[bool], int] = word

    def _bounded(self, bound: int) -> int:
        """A number in [0, bound], by Lemire's multiplication."""
        if not bound:
            return 0
        wide = bound > _M32
        size, bits, mask = bound + 1, *((64, _M64) if wide else (32, _M32))
        while True:
            product = self._word(wide) * size
            rest = product & mask
            if rest >= size or rest >= (mask - bound) % size:  # otherwise some numbers would be likelier
                return product >> bits

    def _swap(self, items: list[int], first: int) -> None:
        for i in range(len(items) - 1, first - 1, -1):
            j = self._bounded(i)
            items[i], items[j] = items[j], items[i]

    def shuffle(self, items: list[int]) -> None:
        """Put a list into a random order.

        Args:
            items: the list, changed in place.
        """
        word = self._word
        for i in range(len(items) - 1, 0, -1):
            mask, wide = (1 << i.bit_length()) - 1, i > _M32
            j = word(wide) & mask
            while j > i:  # numpy shuffles arrays by masks and rejection, not by multiplication
                j = word(wide) & mask
            items[i], items[j] = items[j], items[i]

    def choice(self, population: int, size: int) -> list[int]:
        """So many different numbers out of [0, population), in a random order.

        Args:
            population: how many numbers there are.
            size: how many are chosen, at most all.

        Returns:
            The numbers.
        """
        if population > 10000 and size > population // 50:
            items = list(range(population))
            self._swap(items, max(population - size, 1))
            return items[population - size :]
        chosen: dict[int, None] = {}
        for last in range(population - size, population):
            value = self._bounded(last)
            chosen[last if value in chosen else value] = None
        items = list(chosen)
        self._swap(items, 1)
        return items


def indices(total: int, length: int, seed: int, *, use_numpy: bool = True) -> Tensor:
    """Which of `length` numbers each of `total` places holds: each equally often or once more, in a random order.

    Args:
        total: how many places there are.
        length: how many numbers.
        seed: the seed of numpy's default generator.
        use_numpy: whether numpy draws them, if it is installed: the same ones, in a hundredth of the time.

    Returns:
        (total), torch.long.
    """
    times, more = divmod(total, length)
    if use_numpy and find_spec("numpy") is not None:
        import numpy  # pyright: ignore

        rng: Any = numpy.random.default_rng(seed)
        drawn: Any = numpy.repeat(numpy.arange(length), times)
        if more:
            drawn = numpy.concatenate([drawn, rng.choice(length, size=more, replace=False)])
        rng.shuffle(drawn)
        return torch.as_tensor(drawn, dtype=torch.long)
    stream = Stream(seed)
    items = [i for i in range(length) for _ in range(times)]
    items += stream.choice(length, more) if more else []
    stream.shuffle(items)
    return torch.tensor(items, dtype=torch.long)
