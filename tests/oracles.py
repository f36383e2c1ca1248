"""Naive second implementations, and what it means that a model is unchanged."""

from __future__ import annotations

from typing import Any

import specs
import torch
from torch import Tensor, nn

from funcadapt.sharing import SHARED
from funcadapt.sites import describe

# -- the dense form of each method, written from the paper, by autograd alone -----------------------------

DENSE = {name: spec.dense for name, spec in specs.load().items() if spec.dense is not None}


def dense_weights(model: nn.Module, adapter: Any, method: str) -> dict[str, Tensor]:
    """The adapted weights by name, from the oracle of a method, expert by expert."""
    out: dict[str, Tensor] = {}
    shared = adapter.leaves(SHARED)
    for path in dict.fromkeys((*adapter.params, *adapter.buffers)):
        if path == SHARED:
            continue
        site, module = describe(model, path)
        p = adapter.leaves(path)
        weight = getattr(module, site.parameter)
        weight = weight.transpose(-2, -1) if site.transposed else weight
        bias = getattr(module, site.bias) if site.bias else None
        if site.experts:
            leaves = [{k: v[e] if v.ndim else v for k, v in p.items()} | shared for e in range(site.experts)]
            new = torch.stack([DENSE[method](site, leaf, w, None)[0] for leaf, w in zip(leaves, weight, strict=True)])
        else:
            new, new_bias = DENSE[method](site, p | shared, weight, bias)
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
