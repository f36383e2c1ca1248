"""Questions about what a config targets, under PEFT's names."""

from __future__ import annotations

from typing import Any

from funcadapt import targeting
from funcadapt.peft.config import PeftConfig


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a module is a target of a config.

    Args:
        config: the config.
        key: the module's path.

    Returns:
        Whether it is, by the rules of `target_modules`, `exclude_modules`, `modules_to_save` and the layer fields.

    Example:
        >>> from funcadapt.peft import LoraConfig
        >>> check_target_module_exists(LoraConfig(target_modules=["q"]), "layers.0.q")
        True
    """
    frozen: Any = config.to_funcadapt()
    exclude = getattr(frozen, "exclude_modules", None)
    if exclude and targeting.names_match(exclude, key):
        return False
    targets = frozen.target_modules
    return targets is not None and not targeting._is_kept_out(frozen, key) and targeting._matches(frozen, targets, key)
