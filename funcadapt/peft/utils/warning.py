"""PEFT's category of warnings."""


class PeftWarning(UserWarning):
    """A warning of PEFT."""
