"""Naive second implementations, and what it means that a model is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.sites import Site, describe

Dense = tuple[Tensor, Tensor | None]

# -- the dense form of each method, written from the paper, by autograd alone -----------------------------


def lora_delta(site: Site, p: Mapping[str, Tensor]) -> Tensor:
    a = p["lora_A"] if "lora_A" in p else p["lora_embedding_A"]
    b = p["lora_B"] if "lora_B" in p else p["lora_embedding_B"]
    return torch.einsum("or...,ri...->oi...", b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2)).expand(
        *b.shape[:2], *a.shape[2:]), a) * p["scaling"]  # fmt: skip


def lora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    if "lora_B_bias" in p:
        assert bias is not None
        bias = bias + p["lora_B_bias"] * p["scaling"]
    return weight + lora_delta(site, p), bias


def dora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    new = weight + lora_delta(site, p)
    # Section 4.3 of the paper: the norm is a constant for the gradient.
    norm = new.detach().flatten(1).norm(dim=1)
    ratio = p["lora_magnitude_vector"].flatten() / norm
    return new * ratio.reshape(-1, *(1,) * (new.ndim - 1)), bias


def ia3(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    vector = p["ia3_l"]
    outputs = vector.shape[0] == site.out_features if vector.ndim == 2 else vector.shape[1] == site.out_features
    vector = vector.flatten()
    if outputs:
        scaled = bias * vector if bias is not None else None
        return weight * vector.reshape(-1, *(1,) * (weight.ndim - 1)), scaled
    per_group = vector.reshape(site.groups, -1).repeat_interleave(site.out_features // site.groups, 0)
    return weight * per_group.reshape(*per_group.shape, *(1,) * (weight.ndim - 2)), bias


DENSE: dict[str, Callable[[Site, Mapping[str, Tensor], Tensor, Tensor | None], Dense]] = {
    "lora": lora,
    "dora": dora,
    "ia3": ia3,
}


def dense_weights(model: nn.Module, adapter: Any, method: str) -> dict[str, Tensor]:
    """The adapted weights by name, from the oracle of a method, expert by expert."""
    out: dict[str, Tensor] = {}
    for path in adapter.params:
        site, module = describe(model, path)
        p = adapter.leaves(path)
        weight = getattr(module, site.parameter)
        weight = weight.transpose(-2, -1) if site.transposed else weight
        bias = getattr(module, site.bias) if site.bias else None
        if site.experts:
            leaves = [{k: v[e] if v.ndim else v for k, v in p.items()} for e in range(site.experts)]
            new = torch.stack([DENSE[method](site, leaf, w, None)[0] for leaf, w in zip(leaves, weight, strict=True)])
        else:
            new, new_bias = DENSE[method](site, p, weight, bias)
            if new_bias is not None and new_bias is not bias:
                out[f"{site.owner}.{site.bias}"] = new_bias
        out[site.weight_name] = new.transpose(-2, -1) if site.transposed else new
    return out


# -- unchanged --------------------------------------------------------------------------------------------


class Snapshot:
    """Everything that a call could change in a model: bits, names, order, identities, modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.bits = {name: _bits(tensor) for name, tensor in model.state_dict(keep_vars=False).items()}
        self.modules = list(model.named_modules())
        self.attributes = [_attributes(module) for _, module in self.modules]

    def check(self) -> None:
        """Assert that nothing changed."""
        modules = list(self.model.named_modules())
        assert [(n, id(m)) for n, m in modules] == [(n, id(m)) for n, m in self.modules]
        for (name, module), before in zip(modules, self.attributes, strict=True):
            assert _attributes(module) == before, f"the module {name!r} was changed"
        now = self.model.state_dict(keep_vars=False)
        assert list(now) == list(self.bits)
        for name, tensor in now.items():
            assert torch.equal(_bits(tensor), self.bits[name]), f"the tensor {name!r} was changed"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().clone().flatten().view(torch.uint8)


def _plain(value: Any) -> bool:
    """A number, a text, or a list of them: compared by value, as torch.export itself rebuilds those of convolutions."""
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, tuple | list) and all(_plain(item) for item in value)
    )


def _attributes(module: nn.Module) -> list[tuple[Any, ...]]:
    """Names, their order and the identities of all attributes, one level into the dicts."""
    found: list[tuple[Any, ...]] = [("class", type(module))]
    for name, value in vars(module).items():
        found.append((name, value if _plain(value) else id(value)))
        if isinstance(value, dict):
            found.extend((name, key, id(item)) for key, item in value.items())
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.append((name, parameter.requires_grad, parameter._version, parameter.grad is None))
    return found
