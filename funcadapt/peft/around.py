"""What `PeftModel` and `PeftMixedModel` share: they are around a tuner, and pass on what it says."""

from __future__ import annotations

from typing import Any

from torch import nn

from funcadapt.peft.checks import print_trainable
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.status import count_parameters


class AroundTuner(nn.Module):
    """A module around a tuner, `base_model`, whose attributes are its own where it has none."""

    base_model: Any

    def __getattr__(self, name: str) -> Any:
        """The base model's attributes, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not initialised yet
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that are trained in full, of all adapters; None if there are none."""
        names: set[str] = set()
        for config in self.peft_config.values():
            names.update(getattr(config, "modules_to_save", None) or ())
        return names or None

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio."""
        print_trainable(*self.get_nb_trainable_parameters())
