"""PEFT's exceptions: those of funcadapt under PEFT's names, so that `except` clauses catch what is raised here."""

from funcadapt.errors import AdapterError as PeftError
from funcadapt.errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
