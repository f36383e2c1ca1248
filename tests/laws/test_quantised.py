"""A quantised base: what is added to the output of a layer is added there, too; what reads the weight is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAWS, Case, tree_close
from torch import Tensor, nn

import funcadapt as fa


class Quantised(nn.Linear):
    """Eight bits, packed as bitsandbytes packs four: bytes in one column."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale = layer.weight.detach().abs().max() / 127
        packed = (layer.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight, self.bias = nn.Parameter(packed.reshape(-1, 1), requires_grad=False), layer.bias

    def floats(self) -> Tensor:
        return self.weight.view(torch.int8).reshape(self.out_features, self.in_features) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.floats(), self.bias)


def models(case: Case) -> tuple[nn.Sequential, nn.Sequential]:
    """A model whose first layer is quantised, and one with the same weight in floats."""
    model = case.model().eval()
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    packed = Quantised(layer)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight, plain.bias = nn.Parameter(packed.floats()), layer.bias
    rest = list(model)[1:]
    return nn.Sequential(packed, *rest).eval(), nn.Sequential(plain, *rest).eval()


@pytest.mark.parametrize("case", [c for c in LAWS if c.kind.name == "linear"], ids=str)
def test_a_quantised_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, floats), x = models(case), case.inputs()
    adapter, read = case.adapter(floats), []
    get = fa.layer.Layer.weight.fget
    with monkeypatch.context() as patch:
        patch.setattr(fa.layer.Layer, "weight", property(lambda layer: (read.append(layer), get(layer))[1]))
        expected = fa.functional_call(floats, {"a": adapter}, (x,), weights={"a": 1.0})  # hooks, of all methods
    if read:
        with pytest.raises(fa.SiteError, match=r"The weight at '0' is quantised \(torch.uint8\)"):
            fa.functional_call(model, adapter, (x,))
        return
    out = fa.functional_call(model, adapter, (x,))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


# SVDs, norms or copies of the weight; of these OSF, PSOFT and the like never read it again
READ = {
    "adamss", "deft", "delora", "dora", "frod", "kasa", "mica", "osf", "psoft", "supertuning", "tinylora"
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in LAWS if c.kind.name == "linear"], ids=str)
def test_an_init_that_reads_a_quantised_weight_is_refused(case: Case) -> None:
    model, floats = models(case)
    config = case.adapter(floats).config
    if case.method.name in READ and not str(case).startswith(("deft-para", "deft-random")):
        with pytest.raises(fa.SiteError, match=r"The weight at '0' is quantised"):
            fa.init(model, config)
        return
    found, expected = fa.init(model, config), fa.init(floats.float(), config)
    tree_close(found.params, expected.params, rtol=0, atol=0)
