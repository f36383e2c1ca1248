"""The inits of LoRA that look at data, and LoftQ: against PEFT where it has a function for it, and by formula."""

from __future__ import annotations

import sys
import types
from typing import Any

import peft
import pytest
import torch
from oracles import Snapshot
from peft.tuners.lora.eva import get_eva_state_dict
from peft_tools import layer_model, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import funcadapt as fa
from funcadapt import loftq
from funcadapt.recipes.inits import corda, eva, lora_ga
from funcadapt.recipes.inits.variance import components

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found: list[dict[str, Tensor]] = []
    for _ in range(count):
        ids = torch.randint(2, 32, (4, 12), generator=generator)
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


# -- EVA --------------------------------------------------------------------------------------------------


def test_eva_gives_the_components_of_peft() -> None:
    fields: Any = {"r": 2, "target_modules": TARGETS, "init_lora_weights": "eva"}
    data = batches()
    theirs = get_eva_state_dict(
        tiny("llama"), data, peft.LoraConfig(**fields, eva_config=peft.EvaConfig(rho=2.0)), show_progress_bar=False
    )
    model = tiny("llama")
    before = Snapshot(model)
    ours = components(model, fa.LoraConfig(**fields, eva_config={"rho": 2.0}), data)
    before.check()
    assert {path: a.shape[0] for path, a in ours.items()} == {path: a.shape[0] for path, a in theirs.items()}
    assert sum(a.shape[0] for a in ours.values()) == 2 * len(ours)
    for path, a in ours.items():
        torch.testing.assert_close(a, theirs[path], rtol=0, atol=1e-4, msg=path)


def deep() -> nn.Sequential:
    """Layers whose inputs vary in one direction, in none that is larger, and in two."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    with torch.no_grad():
        for layer, spectrum in zip(model, ((1.0,) * 12, (1.0, 1.0, *(0.01,) * 10)), strict=False):
            layer.weight.copy_(torch.linalg.qr(torch.randn(12, 12)).Q @ torch.diag(torch.tensor(spectrum)))
    return model


@pytest.mark.parametrize("adjust", [True, False])
def test_the_config_of_eva_says_the_ranks(adjust: bool, tmp_path: Any) -> None:
    model, x = deep(), torch.randn(400, 12, generator=torch.Generator().manual_seed(2))
    given: Any = {"rho": 2.0, "tau": 0.5, "adjust_scaling_factors": adjust}
    config = fa.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"], eva_config=given)
    adapter = eva(model, config, [x, x])
    torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x))
    ranks = {path: p["lora_A"].shape[0] for path, p in adapter.params.items()}
    assert sum(ranks.values()) == 6
    assert ranks["2"] == 2
    for path, r in ranks.items():
        assert adapter.config.at(path).r == r  # pyright: ignore
        assert adapter.buffers[path]["scaling"].item() == pytest.approx(3.0 if adjust else 6 / r)
    fa.save(adapter, tmp_path)
    again = fa.load(tmp_path, model=model)
    assert again.config == adapter.config
    wrapped: Any = peft.PeftModel.from_pretrained(deep(), tmp_path)
    torch.testing.assert_close(wrapped(x), model(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.a(x) + self.b(z)


def test_a_layer_without_a_rank_is_not_adapted() -> None:
    z = torch.randn(400, 12, generator=torch.Generator().manual_seed(2))
    x = torch.cat([z[:, :2], torch.zeros(400, 10)], 1)  # each direction has half of the variance
    model, config = Two(), fa.LoraConfig(r=1, target_modules=["a", "b"], eva_config={"rho": 2.0})
    adapter = eva(model, config, [(x, z)])
    assert set(adapter.params) == {"a"}
    assert adapter.config.target_modules == ("a",)  # pyright: ignore
    assert adapter.config.at("a").r == 2  # pyright: ignore
    torch.testing.assert_close(fa.functional_call(model, adapter, (x, z)), model(x, z))


def test_eva_of_plain_data() -> None:
    """One layer, exactly: the directions of the largest variance."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 9.0, 1.0, 0.1, 5.0, 0.2])
    model = nn.Sequential(nn.Linear(6, 4))
    config = fa.LoraConfig(r=3, target_modules=["0"], eva_config={"rho": 1.0, "whiten": True})
    a = eva(model, config, [x]).params["0"]["lora_A"]
    _, s, vh = torch.linalg.svd(x - x.mean(0))
    torch.testing.assert_close((a / a.norm(dim=1, keepdim=True)).abs(), vh[:3].abs(), rtol=0, atol=1e-2)
    # the singular values grow with every batch, as in PEFT
    size = a.norm(dim=1) * s[:3].sqrt()
    torch.testing.assert_close(size / size[0], torch.ones(3), rtol=0.01, atol=0)


def test_what_eva_cannot_do_says_so() -> None:
    model, config = nn.Sequential(nn.Linear(6, 4)), fa.LoraConfig(r=2, target_modules=["0"])
    with pytest.raises(fa.AdapterError, match="dataloader is empty"):
        eva(model, config, [])
    noise = [torch.randn(9, 6) for _ in range(9)]
    with pytest.raises(fa.AdapterError, match="did not converge in 5 batches"):
        eva(model, fa.LoraConfig(r=2, target_modules=["0"], eva_config={"tau": 1.0}), noise, steps=5)
    with pytest.raises(fa.AdapterError, match="Pass a list"):
        eva(model, config, iter([torch.randn(9, 6)]))
    with pytest.raises(fa.SiteError, match="EVA needs linear layers; '0' is of kind 'conv1d'"):
        eva(nn.Sequential(nn.Conv1d(6, 4, 1)), config, [torch.randn(2, 6, 3)])
    with pytest.raises(ValueError, match="`rho` must be >= 1"):
        eva(model, fa.LoraConfig(r=2, target_modules=["0"], eva_config={"rho": 0.5}), [torch.randn(9, 6)])


# -- CorDA ------------------------------------------------------------------------------------------------


@pytest.fixture
def attr(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's defect B18: a dependency that it does not declare."""
    if "attr" not in sys.modules:
        import dataclasses

        module: Any = types.ModuleType("attr")
        module.dataclass = dataclasses.dataclass
        monkeypatch.setitem(sys.modules, "attr", module)


@pytest.mark.usefixtures("attr")
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["linear", "hf_conv1d"])
def test_corda_is_that_of_peft(kind: str, method: str) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    fields: Any = {"r": 2, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": "corda"}
    fields["corda_config"] = {"corda_method": method}
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 9.0  # the largest is the largest in size, too
    theirs = layer_model(kind)[0]
    config = peft.LoraConfig(
        **{**fields, "corda_config": peft.tuners.lora.config.CordaConfig(corda_method=method)},
        fan_in_fan_out=kind == "hf_conv1d",
    )
    preprocess_corda(theirs, config, run_model=lambda: theirs(x))
    wrapped: Any = peft.get_peft_model(theirs, config)
    layer = wrapped.base_model.model.inner["layer"]
    model = layer_model(kind)[0]
    before = Snapshot(model)
    adapter, base = corda(model, fa.LoraConfig(**fields), [x])
    before.check()
    p = adapter.params["inner.layer"]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(p["lora_B"] @ p["lora_A"], product, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(base["inner.layer.weight"], layer.base_layer.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fa.functional_call(model, adapter, x, parameters=base), model(x), rtol=0, atol=1e-4)
    assert adapter.config.init_lora_weights == "corda"  # pyright: ignore


def test_corda_keeps_what_the_inputs_need() -> None:
    """With kpm and inputs in a plane, the part that is taken out does nothing to them."""
    plane = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) @ plane
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    config = fa.LoraConfig(r=2, target_modules=["0"], corda_config={"corda_method": "kpm"})
    _, kept = corda(model, config, [x])
    torch.testing.assert_close(x @ kept["0.weight"].T, model(x), rtol=0, atol=0.1)
    _, taken = corda(model, fa.LoraConfig(r=2, target_modules=["0"]), [x])
    assert (x @ taken["0.weight"].T).norm() < 0.1 * model(x).norm()


def test_what_corda_cannot_do_says_so() -> None:
    config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda")
    with pytest.raises(ValueError, match="needs data"):
        fa.init(nn.Sequential(nn.Linear(6, 4)), config)
    with pytest.raises(fa.AdapterError, match="'0' was never called"):
        corda(nn.Sequential(nn.Linear(6, 4)), config, [])
    with pytest.raises(fa.AdapterError, match="not finite"):
        corda(nn.Sequential(nn.Linear(6, 4)), config, [torch.full((3, 6), torch.nan)])


# -- LoRA-GA ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_that_of_peft(direction: str, scale: str) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    given: Any = {"direction": direction, "scale": scale}
    fields: Any = {"r": 2, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": "lora_ga"}
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    theirs = layer_model("linear")[0]
    config = peft.LoraConfig(**fields, lora_ga_config=peft.LoraGAConfig(**given))
    preprocess_loraga(theirs, config, lambda: theirs(x).square().sum().backward())
    wrapped: Any = peft.get_peft_model(theirs, config)
    layer = wrapped.base_model.model.inner["layer"]
    model = layer_model("linear")[0]
    before = Snapshot(model)
    adapter, base = lora_ga(model, fa.LoraConfig(**fields, lora_ga_config=given), [x], lambda y, _: y.square().sum())
    before.check()
    p = adapter.params["inner.layer"]
    # the sign of a singular vector of A and of one of B is arbitrary
    for name, theirs_of in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        torch.testing.assert_close(p[name].abs(), theirs_of["default"].weight.abs(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(fa.functional_call(model, adapter, x, parameters=base), model(x), rtol=0, atol=1e-4)


def test_the_gradient_is_the_mean_over_batches_of_all_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(4, 8)).double()
    data = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    config = fa.LoraConfig(r=2, target_modules=["0", "2"], lora_ga_config={"scale": "unit", "direction": "ArBr"})
    adapter, _ = lora_ga(model, config, data, lambda y, _: y.square().mean())
    total = sum(model(x).square().mean() for x in data) / 3
    total.backward()  # pyright: ignore
    for path, g in (("0", model[0].weight.grad), ("2", model[2].weight.grad.T)):  # pyright: ignore
        _, s, vh = torch.linalg.svd(g)
        p = adapter.params[path]
        torch.testing.assert_close((p["lora_A"] @ vh[1:4:2].T).abs(), torch.eye(2).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(p["lora_B"].norm(dim=0), s[0:4:2], rtol=1e-4, atol=0)


def test_what_lora_ga_cannot_do_says_so() -> None:
    config, loss = fa.LoraConfig(r=3, target_modules=["0"]), lambda y, _: y.sum()  # pyright: ignore
    with pytest.raises(fa.SiteError, match="needs 2 r <= 4 at '0', got r=3"):
        lora_ga(nn.Sequential(nn.Linear(6, 4)), config, [torch.randn(3, 6)], loss)
    with pytest.raises(fa.AdapterError, match="no batches"):
        lora_ga(nn.Sequential(nn.Linear(6, 4)), config, [], loss)
    with pytest.raises(ValueError, match="`scale` must be one of"):
        lora_ga(nn.Sequential(nn.Linear(6, 4)), fa.LoraConfig(target_modules=["0"], lora_ga_config={"scale": 1}), [])


# -- LoftQ ------------------------------------------------------------------------------------------------


def test_nf4_is_the_nearest_of_its_sixteen_numbers() -> None:
    w = torch.randn(6, 40)  # 240 numbers: the last block is not full
    q = loftq.quantised(w, 4)
    table = torch.tensor(loftq._NF4)
    for block, rounded in zip(w.flatten().split(64), q.flatten().split(64), strict=True):
        scale = block.abs().max()
        best = table[(block[:, None] / scale - table).abs().argmin(1)] * scale
        torch.testing.assert_close(rounded, best)
    eight = loftq.quantised(w, 8)
    assert ((eight - w).abs().amax(1) <= w.abs().amax(1) / 127 / 2 * 1.001).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("alpha", [2, 6])
def test_loftq_is_closer_to_the_weight_than_its_rounding(bits: int, alpha: float) -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    w, errors = model[0].weight.detach(), []
    for iterations in (1, 5):
        config = fa.LoraConfig(
            r=4,
            lora_alpha=alpha,
            target_modules=["0"],
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": bits, "loftq_iter": iterations},
        )
        adapter, base = fa.init_with_base(model, config)
        merged = fa.merge(model, adapter)["0.weight"] - w + base["0.weight"]
        errors.append((merged - w).norm().item())
        again = loftq.quantised(base["0.weight"], bits)
        torch.testing.assert_close(again, base["0.weight"])  # it has few bits
    rounding = (loftq.quantised(w, bits) - w).norm().item()
    assert errors[1] < errors[0] < rounding
    with pytest.raises(fa.AdapterError, match="takes the adapter's part out"):
        fa.init(model, config)  # pyright: ignore
