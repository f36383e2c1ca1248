"""The methods that more than a config makes, each beside PEFT's on the same numbers: Arrow, QA-LoRA, X-LoRA, Shadow.

Arrow and X-LoRA choose among four LoRAs of rank 8. Nothing is trained for Arrow: PEFT loads its experts frozen, and
nothing reads the A and B of the router. So it has a forward pass, and no training step, saved bytes or quality.
PEFT has QA-LoRA for GPTQ layers only, and GPTQ's kernels need a GPU. What such a layer computes does not matter to
QA-LoRA, so the bare `nn.Linear` stands for it on both sides: PEFT's own GPTQ class is put around it. The figures are
those of the adapter, not of a quantised model.
X-LoRA trains its classifier, over frozen experts; its forward pass is two of the model.
Shadow trains a decoder of one layer beside the model. Its training loss has the auxiliary loss in it, on both sides.

`both` checks that the two sides give the same logits, dropout aside, before anything is timed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt import shadow as sh
from funcadapt import xlora as xl
from funcadapt.methods.arrow import arrow

TARGETS = ["q_proj", "v_proj"]
EXPERTS = 4
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "arrow": ("LoraConfig", {"top_k": 3, "rng_seed": 0}),
    "qalora": ("LoraConfig", {"r": 8, "use_qalora": True, "target_modules": TARGETS}),
    "xlora": ("XLoraConfig", {"hidden_size": 576, "task_type": "CAUSAL_LM"}),
    "shadow": ("ShadowConfig", {"task_type": "CAUSAL_LM"}),
}
UNTRAINED = {"arrow"}


class Ours(NamedTuple):
    """Our side of a method.

    Attributes:
        value: the adapter, a pytree.
        leaves: those of its tensors that are trained.
        call: token ids, the method's inputs, keyword arguments of the model -> what the model returns.
    """

    value: Any
    leaves: list[torch.Tensor]
    call: Callable[..., Any]


def trained(tree: Any) -> Any:
    """The tensors of a tree with gradients."""

    def with_gradient(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone().requires_grad_()

    return pytree.tree_map(with_gradient, tree)


def new_experts(model: nn.Module) -> dict[str, fa.Adapter]:
    """LoRAs with random numbers in A and B."""
    config = fa.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    return {str(i): fa.init(model, config, seed=i) for i in range(EXPERTS)}


def ours(name: str, model: nn.Module, experts: Mapping[str, fa.Adapter], **fields: Any) -> Ours:
    """Our side, new.

    Args:
        name: the method.
        model: the model.
        experts: the LoRAs of Arrow and X-LoRA.
        **fields: of the config, beside those of `CONFIGS`.

    Returns:
        The side.
    """
    fields = {**CONFIGS[name][1], **fields}
    value: Any
    experts = {key: pytree.tree_map(torch.Tensor.detach, adapter) for key, adapter in experts.items()}
    if name == "xlora":
        value = xl.xlora(model, experts, xl.XLoraConfig(**fields, adapters=dict.fromkeys(experts, "")))
        value = value.replace(classifier=trained(value.classifier))
        leaves, apply = value.classifier, xl.call
    elif name == "shadow":
        value = leaves = trained(sh.shadow(model, sh.ShadowConfig(**fields)))
        apply = sh.call
    else:
        value = arrow(experts, **fields) if name == "arrow" else fa.init(model, fa.LoraConfig(**fields))
        value = value if name in UNTRAINED else value.replace(params=trained(value.params))
        leaves, apply = {} if name in UNTRAINED else value.params, fa.functional_call

    def call(ids: torch.Tensor, inputs: Any = None, **kwargs: Any) -> Any:
        return apply(model, value, (ids,), {"use_cache": False, **kwargs})

    return Ours(value, pytree.tree_leaves(leaves), call)


def theirs(name: str, model: nn.Module, mine: Ours, experts: Mapping[str, fa.Adapter], **fields: Any) -> Any:
    """PEFT's side with our numbers, on a copy of the model."""
    fields = {**CONFIGS[name][1], **fields}
    base: Any = copy.deepcopy(model)
    base.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {key: str(Path(folder, key)) for key in experts}
        for key, path in paths.items():
            fa.save(experts[key], path)
        if name == "arrow":
            return peft.create_arrow_model(base, list(paths.values()), peft.ArrowConfig(**fields))
        if name == "xlora":
            wrapped: Any = peft.get_peft_model(base, peft.XLoraConfig(**fields, adapters=paths))
            wrapped.base_model.internal_xlora_classifier.load_state_dict(mine.value.classifier)
            return wrapped
        if name == "qalora":
            config = peft.LoraConfig(**fields)
            config._register_custom_module({nn.Linear: GPTQLoraLinear})
            wrapped = peft.get_peft_model(base, config)
            fa.save(mine.value, folder)
            state = load_file(Path(folder, "adapter_model.safetensors"))
        else:
            wrapped, state = peft.get_peft_model(base, peft.ShadowConfig(**fields)), sh.to_tensors(mine.value)
        peft.set_peft_model_state_dict(wrapped, {key: t.detach() for key, t in state.items()})
        return wrapped


def both(name: str, model: nn.Module, ids: torch.Tensor) -> tuple[Ours, Any]:
    """Our side and PEFT's, which give the same logits. Neither starts as the identity, so that these say something.

    Args:
        name: the method.
        model: the model, in training mode.
        ids: the token ids to compare with.

    Returns:
        The two.

    Raises:
        AssertionError: if the logits differ, or are the bare model's.
    """
    start = {"qalora": {"init_lora_weights": False}, "shadow": {"init_weights": False}}.get(name, {})
    experts = new_experts(model) if name in ("arrow", "xlora") else {}
    mine = ours(name, model, experts, **start)
    wrapped = theirs(name, model, mine, experts, **start).eval()
    model.eval()
    with torch.no_grad():
        bare, found, expected = model(ids).logits, mine.call(ids).logits, wrapped(input_ids=ids).logits
    model.train()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    change = (found - bare).abs().max().item()
    assert change > 0.1, f"{name} does nothing: the largest change of a logit is {change}"
    return mine, wrapped
