"""MonteCLoRA in training, which the laws do not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from peft_tools import layer_model, peft_save, wrap
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence
from torch.func import grad

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.method import method_of
from funcadapt.methods import monteclora as mc

GIVEN: dict[str, Any] = {"num_samples": 4, "sample_scaler": 0.5, "kl_loss_weight": 0.2, "buffer_size": 3}


def make(layer: nn.Module, **given: Any) -> tuple[nn.Module, fa.Adapter]:
    model = nn.Sequential(layer).double()
    config = fa.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, monteclora_config={**GIVEN, **given})
    return model, fa.init(model, config)


def test_the_draws_have_the_distribution_of_peft() -> None:
    """Of what is added to A, row by row: mean zero, and the same variance, averaged over many draws."""
    _, adapter = make(nn.Linear(40, 5))
    p = adapter.leaves("0")
    theirs = MontecloraSampler(40, 3, 4, sample_scaler=0.5, buffer_size=500, device="cpu", dtype=torch.float64)
    theirs.load_state_dict({name: p[name] for name in (mc.STD, mc.EXPERTS, "gaussian_var_prior", "expert_weights")})
    torch.manual_seed(0)
    pairs = [theirs() for _ in range(1500)]
    peft_rows = torch.stack([torch.einsum("n,nio->oi", w, var) for var, w in pairs])
    our_rows = torch.stack([mc.drawn(adapter.config, p)["lora_A"] - p["lora_A"] for _ in range(1500)])
    for rows in (peft_rows, our_rows):
        assert rows.mean().abs() < 0.02
    peft_variance, our_variance = (rows.square().mean((0, 2)) for rows in (peft_rows, our_rows))
    torch.testing.assert_close(our_variance, peft_variance, rtol=0.1, atol=0)
    found = [mc.sample(p) for _ in range(1500)]
    weights = torch.stack([s.weights for s in found])
    torch.testing.assert_close(weights.mean(0), torch.stack([w for _, w in pairs]).mean(0), rtol=0.15, atol=0.01)
    torch.testing.assert_close(weights.sum(1), torch.ones(1500, dtype=torch.float64))
    # chi-squared with r degrees of freedom has mean r
    means = torch.stack([s.variances for s in found]).mean(0)
    torch.testing.assert_close(means, 3 * (2 * p[mc.STD]).exp(), rtol=0.1, atol=0)


def test_the_divergence_is_what_it_is_called() -> None:
    _, adapter = make(nn.Linear(4, 5), use_entropy=True, dirichlet_prior=0.7)
    p = adapter.leaves("0")
    found = mc.sample(p)
    n, r, alpha, t = 4, 3, p[mc.EXPERTS].exp(), p[mc.STD]
    dirichlet = kl_divergence(Dirichlet(alpha), Dirichlet(torch.full_like(alpha, 0.7)))
    v, zero, eye = found.variances, torch.zeros(r).double(), torch.eye(r).double()
    normal = n * kl_divergence(MultivariateNormal(zero, torch.diag(v)), MultivariateNormal(zero, eye))
    # of Wishart matrices with r degrees of freedom: r times that of normal vectors
    wishart = r * kl_divergence(MultivariateNormal(zero, torch.diag((2 * t).exp())), MultivariateNormal(zero, eye))
    expected = 0.2 * (dirichlet + normal + wishart) + found.weights.square().sum()
    torch.testing.assert_close(mc.divergence(adapter.config, p, found), expected)


def test_the_other_terms_are_those_of_peft() -> None:
    _, adapter = make(nn.Linear(4, 5))
    p = adapter.leaves("0")
    theirs = MontecloraSampler(4, 3, 4, False, 0.1, 0.5, 0.2, 3, "cpu", torch.float64)
    theirs.load_state_dict({name: p[name] for name in (mc.STD, mc.EXPERTS, "gaussian_var_prior", "expert_weights")})
    theirs()
    found = mc.Sample(theirs.gaussian_var_prior.diag(), theirs.expert_weights)
    alpha, prior = p[mc.EXPERTS].exp(), torch.full((4,), 0.1)
    # PEFT's sign of these
    gammas = 2 * (alpha.lgamma() - prior.lgamma()).sum()
    theirs_loss = theirs.get_variational_loss()[0]
    torch.testing.assert_close(
        mc.divergence(adapter.config, p, found) + 0.2 * gammas, theirs_loss, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 5), torch.randn(2, 4)),
        (nn.Conv2d(4, 6, 3, groups=3 // 3), torch.randn(2, 4, 5, 5)),
        (nn.Embedding(7, 4), torch.tensor([1, 4])),
    ],
    ids=["linear", "conv2d", "embedding"],
)
def test_gradients_of_the_priors(layer: nn.Module, x: Tensor) -> None:
    """The draw is a differentiable function of them."""
    model, adapter = make(layer)
    model.train()
    x = x.double() if x.is_floating_point() else x

    def f(params: Any) -> Tensor:
        torch.manual_seed(3)
        return fa.functional_call(model, adapter.replace(params=params), (x,)).square().sum()

    g, step = grad(f)(adapter.params)["0"], 1e-5
    for name in (mc.STD, mc.EXPERTS):
        way = torch.randn_like(adapter.params["0"][name])

        def moved(by: float, name: str = name, way: Tensor = way) -> Tensor:
            leaves = adapter.params["0"]
            return f({"0": {**leaves, name: leaves[name] + by * way}})

        numeric = (moved(step) - moved(-step)) / (2 * step)
        torch.testing.assert_close((g[name] * way).sum(), numeric, rtol=1e-6, atol=1e-7)
        assert numeric.abs() > 1e-4


def test_each_adapter_of_a_group_draws_its_own() -> None:
    model, adapter = make(nn.Linear(4, 5))
    x = torch.randn(1, 4, dtype=torch.float64).repeat(2, 1)
    out = fa.functional_call(model.train(), fa.grouped(fa.stack([adapter, adapter])), (x,))
    assert not torch.allclose(out[0], out[1])
    out = fa.functional_call(model.eval(), fa.grouped(fa.stack([adapter, adapter])), (x,))
    torch.testing.assert_close(out[0], out[1])


def test_the_loss_of_a_peft_model(tmp_path: Path) -> None:
    model, x, target = layer_model("linear")
    config = peft.LoraConfig(r=3, **target, monteclora_config=GIVEN)  # pyright: ignore
    folder = peft_save(wrap(layer_model("linear")[0], config), tmp_path)
    ours: Any = shim.PeftModel.from_pretrained(model, folder, is_trainable=True)
    assert ours.eval().base_model._get_monteclora_loss() == 0.0
    assert ours.train().base_model._get_monteclora_loss("none") == 0.0
    loss = ours.base_model._get_monteclora_loss()
    (loss + ours(x).sum()).backward()
    sampler = ours.base_model.model.inner["layer"].lora_monteclora_sampler["default"]
    assert sampler.std_prior.grad.abs().min() > 0
    assert sampler.expert_weights_prior.grad.abs().min() > 0


def test_the_mixin_of_a_trainer() -> None:
    from funcadapt.peft.helpers import MontecloraTrainerMixin

    class Trainer:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            outputs = model(**inputs)
            return (outputs.sum(), outputs) if return_outputs else outputs.sum()

    class Mixed(MontecloraTrainerMixin, Trainer):
        pass

    model, x, target = layer_model("linear")
    config = shim.LoraConfig(r=3, **target, monteclora_config=shim.MontecloraConfig(**GIVEN))
    wrapped: Any = shim.get_peft_model(model, config).train()
    torch.manual_seed(1)
    loss, outputs = Mixed().compute_loss(wrapped, {"x": x}, return_outputs=True)
    torch.manual_seed(1)
    expected = wrapped(x).sum() + wrapped.base_model._get_monteclora_loss()
    torch.testing.assert_close(loss, expected)
    assert outputs.shape == (3, 2, 5)
    wrapped.eval()
    torch.testing.assert_close(Mixed().compute_loss(wrapped, {"x": x}), wrapped(x).sum())


@pytest.mark.parametrize("name", ["monteclora", "velora", "kasa"])
def test_an_empty_dict_asks_for_the_variant_with_its_defaults(name: str) -> None:
    """As in PEFT; it was a plain LoRA."""
    config = fa.LoraConfig(target_modules=["0"], **{f"{name}_config": {}})
    assert method_of(config).name == name
    built = peft.LoraConfig(**{f"{name}_config": {}})
    assert getattr(built, f"{name}_config") is not None


def test_errors() -> None:
    with pytest.raises(ValueError, match="`num_samples` must be greater than 0, got 0"):
        fa.LoraConfig(monteclora_config={"num_samples": 0})
