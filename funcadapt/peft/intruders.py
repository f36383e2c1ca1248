"""`reduce_intruder_dimension`: a LoRA whose new singular directions are weakened, so that less is forgotten.

A direction of the adapted weight W + D = U S V^T is an intruder if it is like none of W = U0 S0 V0^T, that is if
max_j |u_i . u0_j| is small. Of those among the first ones, a part l stays:

    D' = D - (1 - l) sum_{intruders i} u_i s_i v_i^T

and is cut to the rank of the LoRA. Directions are those of the outputs, whatever the layer: PEFT takes those of the
inputs at embeddings and transformers' Conv1D, and writes factors that do not fit there.

Source: Shuttleworth et al. 2024, arXiv:2410.21228.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.keys import encode
from funcadapt.layer import Layer
from funcadapt.method import method_of
from funcadapt.parts.lowrank import factor_names, factors
from funcadapt.peft.utils.save_and_load import set_peft_model_state_dict
from funcadapt.view import adapter_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import layers


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add and activate a copy of a LoRA adapter with its intruder dimensions weakened. The old one stays.

    Args:
        peft_model: the model, with a LoRA adapter.
        old_adapter_name: its name.
        new_adapter_name: the name of the new one.
        top_k: how many of the largest singular directions are looked at.
        threshold_epsilon: one whose cosine similarity with all of the base weight's is below this is an intruder.
        mitigation_lambda: the part of an intruder's singular value that stays.
        logging_sink: gets the messages; None for none.

    Raises:
        ValueError: if the model's adapters are no LoRA.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        >>> reduce_intruder_dimension(model)
        base_model.model.0: No intruders
        Enabling new adapter intruder_reduced
        >>> model.active_adapter
        'intruder_reduced'
    """
    log: Callable[[str], Any] = logging_sink or (lambda message: None)
    if peft_model.peft_type != "LORA":
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    adapter = adapter_of(peft_model, old_adapter_name)
    params = {path: dict(leaves) for path, leaves in adapter.params.items()}
    messages: list[str] = []
    with torch.no_grad():
        for path, layer in layers(peft_model):
            if old_adapter_name not in layer.adapters:
                continue
            new, count = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
            messages.append(f"{path}: Intruders: {count}" if count else f"{path}: No intruders")
            if layer.site.experts == 1:  # see binding.bind
                new = {name: leaf.squeeze(0) for name, leaf in new.items()}
            params[layer.site.path].update(new)
    peft_model.add_adapter(new_adapter_name, copy.copy(peft_model.peft_config[old_adapter_name]))
    for message in messages:
        log(message)
    # of several parameters of one module, keys want the innermost wrapper first
    inner_first = sorted(layers(peft_model), key=lambda found: -len(found[0]))
    order = [layer.site.path for _, layer in inner_first if layer.site.path in params]
    params = {path: params[path] for path in dict.fromkeys([*order, *params])}
    tensors = encode(adapter.replace(params=params), method_of(adapter.config))[0]
    set_peft_model_state_dict(peft_model, {k: v.detach().clone() for k, v in tensors.items()}, new_adapter_name)
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _reduced(
    layer: AdapterLayer, name: str, top_k: int, epsilon: float, mitigation: float
) -> tuple[dict[str, Tensor], int]:
    """The new factors, and how many intruders there were."""
    site, p = layer.site, layer.leaves(name)
    if site.groups > 1:
        raise SiteError(f"LoRA on the grouped convolution {site.path!r} has no dense form to look for intruders in.")
    a, b, scaling = factors(p)
    at, kept = Layer(site, layer.get_base_layer(), layer.adapters[name].config), layer.kept.get(site.parameter)
    weight = at.weight if kept is None else at.canonical(kept.value)  # adapters are merged into it
    names, count = factor_names(p), 0
    every: list[tuple[Tensor, Tensor]] = []
    for w, one_a, one_b in zip(weight, a, b, strict=True) if site.stack else [(weight, a, b)]:
        found = _without_intruders(
            w.flatten(1), one_a.flatten(1), one_b.flatten(1), scaling, top_k, epsilon, mitigation
        )
        count += found[2]
        every.append((found[0].reshape(one_a.shape).to(a.dtype), found[1].reshape(one_b.shape).to(b.dtype)))
    new = [torch.stack(leaves) if site.stack else leaves[0] for leaves in zip(*every, strict=True)]
    return dict(zip(names, new, strict=True)), count


def _without_intruders(
    weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor, top_k: int, epsilon: float, mitigation: float
) -> tuple[Tensor, Tensor, int]:
    """A, B and the number of intruders, for one matrix."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, change = weight.to(wide), (b.to(wide) * scaling.to(wide)) @ a.to(wide)
    base = linalg.svd(w, full_matrices=False)[0]
    u, s, vh = linalg.svd(w + change, full_matrices=False)
    alike = (u.mT @ base).abs().amax(1)[:top_k]
    intruders = (alike < epsilon).nonzero().flatten()
    if not len(intruders):
        return a, b, 0
    u, s, vh = u[:, intruders], s[intruders], vh[intruders]
    change = (change + (mitigation - 1) * (u * s) @ vh) / scaling.to(wide)
    u, s, vh = linalg.svd(change, full_matrices=False)
    root, r = s.sqrt(), a.shape[0]
    new_a, new_b = (root[:, None] * vh)[:r], (u * root)[:, :r]
    short = r - new_a.shape[0]  # more ranks than the layer is wide
    if short > 0:
        new_a = torch.cat([new_a, new_a.new_zeros(short, new_a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], short)], 1)
    return new_a, new_b, len(intruders)
