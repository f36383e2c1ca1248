"""`peft.utils.peft_types`: see `funcadapt.peft.types`."""

from funcadapt.peft.types import PeftType, TaskType, register_peft_method

__all__ = ["PeftType", "TaskType", "register_peft_method"]
