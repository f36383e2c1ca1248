"""Optimisers for LoRA, under PEFT's names: `create_loraplus_optimizer`, `create_lorafa_optimizer`, Riemannian.

They find the parameters by their names (`<layer>.lora_A.<adapter>.weight`), so they work on every model in PEFT's
layout: one from `get_peft_model`, one with an adapter injected, and one of PEFT itself.
"""

from funcadapt.peft.optimizers.lorafa import create_lorafa_optimizer
from funcadapt.peft.optimizers.loraplus import create_loraplus_optimizer
from funcadapt.peft.optimizers.riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
