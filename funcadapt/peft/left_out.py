"""PEFT's warnings of what a config leaves out of checkpoints: it is computed again, and must be the same then."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

# PEFT's type -> (what is left out, the field with the seed, its name in a checkpoint if reading it warns, too)
_DRAWN = {
    "VERA": ("vera_A and vera_B", "projection_prng_key", "vera_A and vera_B"),
    "PVERA": ("pvera_A and pvera_B", "projection_prng_key", "pvera_A and pvera_B"),
    "RANDLORA": ("basis_A and basis_B", "projection_prng_key", ""),
    "TINYLORA": ("projection tensors P", "projection_seed", "tinylora_P"),
}


def warn_when_made(config: Any) -> None:
    """Warn of a new config that leaves something out.

    Args:
        config: PEFT's config, of any method.
    """
    if config.peft_type in _DRAWN and not config.save_projection:
        what, seed, _ = _DRAWN[config.peft_type]
        warnings.warn(
            f"Specified to not save {what} within the state dictionary. They will be restored using the PRNG key "
            f"stored in `config.{seed}`. Consider setting `config.save_projection` to `True` to guarantee restoring "
            "the checkpoint correctly on all system configurations.",
            stacklevel=4,
        )
    if config.peft_type == "SUPERTUNING" and not config.save_precomputed_indices:
        warnings.warn(
            "save_precomputed_indices=False: sparse-support indices will be recomputed from base weight magnitudes at "
            "load time. This assumes the base model is identical to training time; numerical drift can cause topk "
            "tie-breaks to differ.",
            stacklevel=4,
        )


def warn_when_read(config: Any, keys: Iterable[str]) -> None:
    """Warn of a checkpoint that is read without something, unless it is there: then the method says what it does.

    Args:
        config: PEFT's config, of any method.
        keys: the checkpoint's keys.
    """
    _, seed, named = _DRAWN.get(config.peft_type, ("", "", ""))
    if not named or config.save_projection or any(name in key for name in named.split(" and ") for key in keys):
        return
    warnings.warn(
        f"Specified to not load {named} from state dictionary. This means we will be relying on PRNG initialisation to "
        f"restore these projections using `config.{seed}`, which may not be accurate on all system configurations.",
        stacklevel=3,
    )
