"""LoRA+, LoRA-FA and the Riemannian optimiser against PEFT's, on PEFT's own models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import nn

import funcadapt.peft as shim
import funcadapt.peft.optimizers as optimizers
from funcadapt.peft.optimizers.lorafa import LoraFAOptimizer
from funcadapt.peft.optimizers.pairs import Factors, lora_pairs

STEPS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.norm(self.up(x)))))


def peft_model(dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ("up", "down"), **config: Any) -> Any:
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | config
    model = peft.get_peft_model(Net(), peft.LoraConfig(**fields)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model


def losses(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(13, (4, 5), generator=generator)
        target = torch.randint(3, (4, 5), generator=generator)
        yield nn.functional.cross_entropy(model(ids).float().flatten(0, 1), target.flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    for loss in losses(model):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_training(make: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """Both libraries' optimisers make the same of the same model, and something was trained."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    one, two = make(peft.optimizers, theirs), make(optimizers, ours)
    plain = [[{k: v for k, v in g.items() if k in ("lr", "weight_decay")} for g in o.param_groups] for o in (one, two)]
    assert plain[0] == plain[1]
    assert [len(g["params"]) for g in one.param_groups] == [len(g["params"]) for g in two.param_groups]
    want, got = train(theirs, one), train(ours, two)
    assert list(want) == list(got)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)
    assert any(not torch.equal(got[name], before[name]) for name in got if "lora_" in name)
    return got


# -- LoRA+ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"targets": ("embed", "up", "down")},
        {"use_dora": True, "targets": ("embed", "up")},
        {"lora_bias": True},
        {"bias": "all", "modules_to_save": ["norm", "head"]},
        {"dtype": torch.float64},
    ],
)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_loraplus(config: dict[str, Any], cls: Any) -> None:
    def make(library: Any, model: nn.Module) -> Any:
        return library.create_loraplus_optimizer(
            model, cls, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-3
        )

    assert_same_training(make, peft_model(**config))


def test_loraplus_passes_its_arguments_on() -> None:
    def make(library: Any, model: nn.Module) -> Any:
        return library.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0, eps=1e-3, betas=(0.5, 0.9)
        )

    model = peft_model(targets=("embed", "up"))
    assert_same_training(make, model)
    assert make(optimizers, model).defaults["betas"] == (0.5, 0.9)


def test_loraplus_with_trained_base_weights_and_a_layer_at_the_top() -> None:
    def make(library: Any, model: nn.Module) -> Any:
        return library.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)

    model = peft_model(targets=("embed", "up"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert_same_training(make, model)


# -- Riemannian -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"targets": ("embed", "up", "down")},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["head"]},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian(config: dict[str, Any], cls: Any) -> None:
    def make(library: Any, model: nn.Module) -> Any:
        return library.create_riemannian_optimizer(model, cls, lr=1e-2, reg=1e-2, weight_decay=0.1)

    assert_same_training(make, peft_model(**config))


def test_riemannian_gradients_are_those_of_the_paper() -> None:
    model = peft_model(torch.float64)
    optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.0, reg=0.3)
    next(losses(model)).backward()
    a, b = (model.get_parameter(f"base_model.model.up.lora_{x}.default.weight") for x in "AB")
    eye = 0.3 * torch.eye(4, dtype=torch.float64)
    want_a = torch.linalg.solve(b.detach().T @ b.detach() + eye, a.grad)
    want_b = torch.linalg.solve(a.detach() @ a.detach().T + eye, b.grad.T).T
    optimizer.step()
    torch.testing.assert_close(a.grad, want_a)
    torch.testing.assert_close(b.grad, want_b)


def test_riemannian_refuses_what_it_cannot_do() -> None:
    model = peft_model()
    with pytest.raises(TypeError, match="subclass"):
        optimizers.create_riemannian_optimizer(model, "adamw", lr=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="closure"):
        optimizers.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(ValueError, match="lora_A/lora_B"):
        optimizers.create_riemannian_optimizer(Net(), torch.optim.SGD, lr=1e-3)
    optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    assert isinstance(optimizer, torch.optim.SGD)
    with pytest.raises(ValueError, match="closures"):
        optimizer.step(lambda: 0.0)


def test_a_step_hook_runs_once() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch wraps the `step` of a class at its first instance
    optimizer = optimizers.create_riemannian_optimizer(peft_model(), torch.optim.SGD, lr=1e-3)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert len(calls) == 1


# -- LoRA-FA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({}, {"weight_decay": 0.1}),
        ({"targets": ("embed", "up", "down")}, {}),
        ({"use_rslora": True}, {}),
        ({"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}}, {}),
        ({"modules_to_save": ["head"], "bias": "all"}, {"weight_decay": 0.1}),
        ({"dtype": torch.float64}, {}),
        ({"dtype": torch.bfloat16}, {}),
    ],
)
def test_lorafa(config: dict[str, Any], options: dict[str, Any]) -> None:
    def make(library: Any, model: nn.Module) -> Any:
        return library.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, **options)

    model = peft_model(**config)
    got = assert_same_training(make, model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            assert torch.equal(got[name], parameter)


def test_lorafa_state_is_that_of_peft() -> None:
    model = peft_model(modules_to_save=["head"])
    states = []
    for library in (peft.optimizers, optimizers):
        optimizer = library.create_lorafa_optimizer(copied := copy.deepcopy(model), r=4, lora_alpha=6, lr=1e-2)
        train(copied, optimizer)
        states.append(optimizer.state_dict()["state"])
    assert set(states[0]) == set(states[1])
    for name, state in states[0].items():
        assert set(state) == set(states[1][name])
    # and so a run that PEFT began can go on here
    ours = optimizers.create_lorafa_optimizer(copied := copy.deepcopy(model), r=4, lora_alpha=6, lr=1e-2)
    theirs = peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    train(model, theirs)
    copied.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    want, got = train(model, theirs), train(copied, ours)
    assert all(torch.equal(got[name], want[name]) for name in want)


def by_definition(b: torch.Tensor, a: torch.Tensor, grads: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """LoRA-FA in float64 and without a matrix inverse; AdamW as in the older transformers, eps before correction."""
    mean = square = torch.zeros_like(b)
    for t, grad in enumerate(grads, 1):
        grad = torch.linalg.solve(a @ a.T + 1e-8 * torch.eye(len(a), dtype=a.dtype), grad.T).T / scaling**2
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        b = b - 1e-2 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * mean / (square.sqrt() + 1e-6)
    return b


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_lorafa_where_a_layer_has_more_than_two_parameters(config: dict[str, Any]) -> None:
    """PEFT pairs the magnitude of one layer with the A of the next, and fails; ours is the definition."""
    model = peft_model(torch.float64, **config)
    theirs = copy.deepcopy(model)
    with pytest.raises((AttributeError, TypeError, RuntimeError, UserWarning)):
        train(theirs, peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2))
    optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    a, b = (model.get_parameter(f"base_model.model.up.lora_{x}.default.weight") for x in "AB")
    start, grads = b.detach().clone(), []
    other = "lora_magnitude_vector.default.weight" if "use_dora" in config else "lora_B.default.bias"
    extra = model.get_parameter(f"base_model.model.up.{other}")
    extra_start = extra.detach().clone()
    for loss in losses(model):
        optimizer.zero_grad()
        loss.backward()
        grads.append(b.grad.clone())
        optimizer.step()
    want = by_definition(start, a.detach(), grads, 6 / 4)
    torch.testing.assert_close(b.detach(), want, rtol=1e-6, atol=1e-8)
    assert not torch.equal(extra, extra_start)


def test_lorafa_with_two_adapters_trains_the_active_one() -> None:
    """PEFT pairs the A of one adapter with the A of the other, and fails."""
    alone, both = peft_model(torch.float64), peft_model(torch.float64)
    both.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up", "down"]))
    both.double()
    theirs = copy.deepcopy(both)
    with pytest.raises((AttributeError, TypeError, RuntimeError, UserWarning)):
        train(theirs, peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2))
    got = train(both, optimizers.create_lorafa_optimizer(both, r=4, lora_alpha=6, lr=1e-2))
    want = train(alone, optimizers.create_lorafa_optimizer(alone, r=4, lora_alpha=6, lr=1e-2))
    for name in want:
        assert torch.equal(got[name], want[name])


def test_lorafa_arguments() -> None:
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            LoraFAOptimizer([nn.Parameter(torch.zeros(1))], **bad)
    model = peft_model(use_rslora=True)
    with pytest.raises(ValueError, match=r"\['default'\]"):
        optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, use_rslora=False)
    with pytest.warns(FutureWarning, match="use_rslora"):
        optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, use_rslora=True)
    assert optimizer.param_groups[0]["scaling_factor"] == 6 / 4**0.5


def test_lorafa_takes_the_older_group_and_a_closure() -> None:
    model = peft_model()
    named = dict(model.named_parameters())
    group = {"params": list(named.values()), "names": list(named), "lr": 1e-2}
    with pytest.raises(KeyError, match="scaling_factors"):
        LoraFAOptimizer([dict(group)]).step()
    optimizer = LoraFAOptimizer([group | {"scaling_factor": 1.5}])
    batches = losses(model)

    def closure() -> float:
        loss = next(batches)
        loss.backward()
        return loss.item()

    with pytest.warns(FutureWarning, match="scaling_factor"):
        first = optimizer.step(closure)
    optimizer.zero_grad()
    assert isinstance(first, float)
    assert isinstance(optimizer.step(closure), float)


# -- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [peft, shim])
def test_experts_are_preconditioned_one_by_one(library: Any) -> None:
    """PEFT's r x r matrix of E experts mixes them; ours is each expert's own."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
            self.num_experts = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eoi->beo", x, self.up)

    torch.manual_seed(0)
    config = library.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
    model = library.get_peft_model(nn.ModuleDict({"experts": Experts()}), config).double()
    layer = model.base_model.model["experts"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(7, 4, dtype=torch.float64)
    (layer(x) ** 2).sum().backward()
    blocks = a.detach().reshape(3, 2, 4), b.detach().reshape(5, 2, 3).permute(2, 0, 1)
    grads = a.grad.reshape(3, 2, 4).clone(), b.grad.reshape(5, 2, 3).permute(2, 0, 1).clone()
    optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.0, reg=0.2).step()
    for e in range(3):
        eye = 0.2 * torch.eye(2, dtype=torch.float64)
        want_a = torch.linalg.solve(blocks[1][e].T @ blocks[1][e] + eye, grads[0][e])
        want_b = torch.linalg.solve(blocks[0][e] @ blocks[0][e].T + eye, grads[1][e].T).T
        torch.testing.assert_close(a.grad.reshape(3, 2, 4)[e], want_a)
        torch.testing.assert_close(b.grad.reshape(5, 2, 3)[..., e], want_b)


def test_a_model_of_the_shim_is_trained_like_one_of_peft() -> None:
    theirs = peft_model(targets=("embed", "up", "down"))
    config = shim.LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "up", "down"])
    ours = shim.get_peft_model(Net(), config)
    ours.load_state_dict(theirs.state_dict())
    makes: list[Any] = [
        lambda lib, m: lib.create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0),
        lambda lib, m: lib.create_riemannian_optimizer(m, torch.optim.SGD, lr=1e-2),
        lambda lib, m: lib.create_lorafa_optimizer(m, r=4, lora_alpha=6, lr=1e-2),
    ]
    for make in makes:
        want, got = train(theirs, make(peft.optimizers, theirs)), train(ours, make(optimizers, ours))
        assert list(got) == list(want)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_lorafa_of_a_convolution_follows_the_full_gradient(groups: int) -> None:
    """At B = 0 the step of the weight is the full gradient projected on the rows of A, which is what LoRA-FA means."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["conv"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        model = peft.get_peft_model(nn.ModuleDict({"conv": conv}), config).double()
    layer = model.base_model.model["conv"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = conv.weight.detach().clone().requires_grad_()
    (nn.functional.conv2d(x, weight, groups=groups) ** 2).sum().backward()
    (layer(x) ** 2).sum().backward()
    factors = Factors(a.detach(), b.detach())
    raw = factors.split_b(b.grad)
    projected = raw @ torch.linalg.pinv(factors.a @ factors.a.mT) @ factors.a / 2  # dB = s dW A^T, s = 2
    if groups == 1:
        rows = factors.a.mT @ torch.linalg.pinv(factors.a.mT)
        torch.testing.assert_close(projected, weight.grad.flatten(1) @ rows)
    assert factors.join_b(raw, b.grad).equal(b.grad)
    assert factors.join_a(factors.a, a).equal(a)
    optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    optimizer.step()
    assert b.abs().min() > 0


def test_names_of_pairs() -> None:
    names = ["lora_A.x.weight", "lora_B.x.weight", "e.lora_embedding_A.y", "e.lora_embedding_B.y", "e.lora_A.z.weight"]
    assert [(p.layer, p.adapter) for p in lora_pairs(names)] == [("", "x"), ("e", "y")]
