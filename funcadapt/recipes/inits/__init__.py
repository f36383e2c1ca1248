"""Inits of LoRA that look at data: pure functions of a model, a config and batches.

    adapter = eva(model, config, batches)                    # A: what the inputs of each layer vary in
    adapter, base = corda(model, config, batches)            # a part of W that matters for these inputs, or does not
    adapter, base = lora_ga(model, config, batches, loss)    # the gradient of W

A batch is the model's keyword arguments in a dict, its arguments in a tuple, or its only argument. `base` are the base
weights that go with the adapter, as of `fa.init_with_base`.
"""

from funcadapt.recipes.inits.context import corda as corda
from funcadapt.recipes.inits.gradients import lora_ga as lora_ga
from funcadapt.recipes.inits.variance import eva as eva
