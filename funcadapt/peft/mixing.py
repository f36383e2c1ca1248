"""`adapter_names=`: rows of one batch that use different adapters, in `forward` and in `generate`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.view.mixed import mixed_batch


@contextmanager
def named_rows(
    model: nn.Module, names: Sequence[str], call: Mapping[str, Any], inputs: Mapping[str, Tensor] | None = None
) -> Generator[None, None, None]:
    """Row i uses the adapter `names[i]`, for the duration of a block.

    `generate` repeats every row for its beams and for the sequences that it returns, so the names are repeated, too;
    not in an encoder, which sees the rows as they came. (PEFT repeats them for a `num_beams` argument only.)

    Args:
        model: the model.
        names: a name for every row, "__base__" for the bare model.
        call: the keyword arguments of the call.
        inputs: what the adapters need of every call, rows first.

    Yields:
        Nothing.

    Raises:
        TypeError: if rows are repeated and `names` is no list.
    """
    times = _repeats(call)
    if times > 1 and not isinstance(names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    encoder = _encoder_path(model) if times > 1 else None
    within = None if encoder is None else {encoder: list(names)}
    repeated = {name: value.repeat_interleave(times, 0) for name, value in (inputs or {}).items()}
    with mixed_batch(model, [name for name in names for _ in range(times)], within, repeated):
        yield


def _repeats(call: Mapping[str, Any]) -> int:
    config: Any = call.get("generation_config")
    counts = (call.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max((count for count in counts if isinstance(count, int)), default=1)


def _encoder_path(model: Any) -> str | None:
    """Where the encoder is, if there is one. Other models of transformers 5 give themselves."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return next((path for path, module in named_modules(model) if path and module is encoder), None)
