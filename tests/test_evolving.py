"""Methods with a state that changes in training, on the real SmolLM2, step by step against PEFT's on the same text.

The first two layers of the thirty: the weights are real, and a step takes a second. Both models begin with the same
numbers, from one seed, and get the same batches; what evolves is compared after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.methods import monteclora, velora

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]
LAYERS, STEPS, TARGETS = 2, 12, ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def real() -> tuple[nn.Module, Tensor]:
    """The model, and token ids of real text."""
    from pydoc_data.topics import topics

    from funcadapt.recipes.pretrained import load_pretrained

    model, tokenizer = load_pretrained()
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    ids = torch.tensor(tokenizer("\n".join(topics[key] for key in sorted(topics)[:12]))["input_ids"])
    return model, ids[: STEPS * 48].reshape(STEPS, 2, 24)


def both(model: nn.Module, config: str, **fields: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, from one seed."""
    made: list[Any] = []
    for package in (peft, shim):
        torch.manual_seed(5)
        given = {key: value(package) if callable(value) else value for key, value in fields.items()}
        built = getattr(package, config)(target_modules=TARGETS, task_type="CAUSAL_LM", **given)
        made.append(package.get_peft_model(copy.deepcopy(model), built).train())
    return made[0], made[1]


def state(model: Any) -> dict[str, Tensor]:
    """What is trained, and what evolves beside it, by name."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in own.items()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], step: int, tolerance: float = 2e-4) -> None:
    assert ours.keys() == theirs.keys(), step
    for name, value in theirs.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance * max(scale, 1e-3), msg=lambda m, n=name: f"step {step}, {n}: {m}"
        )


def train(models: tuple[Any, Any], batches: Tensor, rate: float, after: Callable[[Any, int], None] | None = None,
          before: Callable[[], None] | None = None, tolerance: float = 2e-4) -> list[dict[str, Tensor]]:  # fmt: skip
    """The same steps of plain gradient descent for both; the states after each step."""
    states = [state(models[1])]
    close(states[0], state(models[0]), -1)
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=rate) for m in models]
    for step, ids in enumerate(batches):
        for model, optimiser in zip(models, optimisers, strict=True):
            torch.manual_seed(step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            if after is not None:
                after(model, step)
            optimiser.zero_grad()
        states.append(state(models[1]))
        close(states[-1], state(models[0]), step, tolerance)
    assert any((states[-1][name] - states[0][name]).abs().max() > 0 for name in states[0] if name in states[-1])
    return states


def test_osf_stays_in_its_subspace(real: tuple[nn.Module, Tensor]) -> None:
    """Gradients are projected: what is trained never gets a part in the frozen large directions."""
    models = both(real[0], "OSFConfig", effective_rank=16)
    train(models, real[1], 0.05)
    held = models[1].state_dict()
    key = next(k for k in held if "layers.0.self_attn.q_proj" in k and k.endswith("U_low"))
    u = torch.linalg.svd(real[0].model.layers[0].self_attn.q_proj.weight.detach(), full_matrices=False).U  # pyright: ignore
    high = u[:, : u.shape[1] - held[key].shape[1]]
    assert high.shape[1] > 0
    assert (high.T @ held[key]).abs().max() < 1e-3


def test_adalora_allocates_its_ranks(real: tuple[nn.Module, Tensor]) -> None:
    models = both(real[0], "AdaLoraConfig", init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=STEPS)

    def allocate(model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    states = train(models, real[1], 0.5, allocate)
    ranks = [sum(int((v != 0).sum()) for k, v in s.items() if "lora_E" in k) for s in states[2:]]
    assert ranks[-1] < max(ranks)
    patterns = [m.peft_config["default"].rank_pattern for m in models]
    short = [{key[key.index("layers.") :].removesuffix(".default"): list(v) for key, v in p.items()} for p in patterns]
    assert short[0]
    assert short[1] == short[0]


def test_velora_follows_the_inputs(real: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    """The direction that inputs are projected on is the one of every batch; `observe` is its pure update."""
    torch.manual_seed(5)
    given = peft.VeloraConfig(num_groups=32, scale=1.0, init_type="batch_average")
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", velora_config=given)
    theirs: Any = peft.get_peft_model(copy.deepcopy(real[0]), config).train()
    theirs.save_pretrained(tmp_path)
    model, adapter = copy.deepcopy(real[0]).train().requires_grad_(False), fa.load(tmp_path, model=real[0])
    seen: list[Tensor] = []
    for step, ids in enumerate(real[1]):
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        adapter = velora.observe(model, adapter, (), {"input_ids": ids})

        def loss(params: Any, adapter: fa.Adapter = adapter, ids: Tensor = ids) -> Tensor:
            given = {"input_ids": ids, "labels": ids}
            return fa.functional_call(model, adapter.replace(params=params), (), given).loss

        grads = torch.func.grad(loss)(adapter.params)
        moved = {p: {k: t - 0.5 * grads[p][k] for k, t in leaves.items()} for p, leaves in adapter.params.items()}
        adapter = adapter.replace(params=moved)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter -= 0.5 * parameter.grad
        layer = theirs.base_model.model.model.layers[1].self_attn.v_proj
        own = adapter.leaves("model.layers.1.self_attn.v_proj")
        found = {"A": own["lora_A"], "B": own["lora_B"], "embed": own["lora_velora_embed"]}
        expected = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        expected["embed"] = layer.lora_velora_embed["default"]
        close(found, {k: v.detach() for k, v in expected.items()}, step)
        seen.append(own["lora_velora_embed"])
    assert (seen[-1] - seen[0]).abs().max() > 1e-3


def test_adamss_leaves_out_subspaces(real: tuple[nn.Module, Tensor]) -> None:
    """Step for step as PEFT's, until it leaves out the first ones: PEFT keeps one fewer than its schedule says."""
    asa = {"use_asa": True, "asa_target_subspaces": 6, "init_warmup": 8, "final_warmup": 11, "mask_interval": 1}
    models = both(real[0], "AdamssConfig", r=32, num_subspaces=4, **asa)

    def allocate(model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    train(models, real[1][:7], 0.5, allocate)
    for step, ids in enumerate(real[1][7:], 7):
        flags: list[set[str]] = []
        for model in models:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            allocate(model, step)
            flags.append({name for name, p in model.named_parameters() if p.requires_grad})
    theirs, ours = flags
    assert theirs <= ours
    assert len(ours) - len(theirs) in (0, 2)  # an A and a B
    assert len(ours) == 2 * 6


def test_monteclora_learns_its_deviation(real: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same draws, what they are drawn from is learned as PEFT's. One expert: ours draws the sum."""
    fields = {"num_samples": 1, "sample_scaler": 0.1}
    theirs, ours = models = both(
        real[0], "LoraConfig", r=4, monteclora_config=lambda package: package.MontecloraConfig(**fields)
    )
    ours.load_state_dict(theirs.state_dict(), strict=False)
    samplers = [m for m in theirs.modules() if type(m).__name__ == "MontecloraSampler"]
    generator = torch.Generator().manual_seed(0)
    draws: dict[tuple[int, ...], Tensor] = {}
    sizes = ((4, 4), (1,), (4, 576))

    def draw_anew() -> None:
        draws.update({size: torch.randn(size, generator=generator) for size in sizes})
        chi = torch.diag(draws[4, 4].square().sum(-1))
        sample = {"z_mvn": draws[4, 576].T.unsqueeze(0), "z_wishart": chi, "z_dirichlet": draws[1,]}
        for sampler in samplers:
            sampler.sampler.buffer, sampler.sampler.index = [sample], 0

    class Draws:
        """torch, whose `randn` gives the numbers of this step."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def randn(self, *size: Any, **options: Any) -> Tensor:
            return draws[tuple(size[0]) if isinstance(size[0], torch.Size) else size]

    monkeypatch.setattr(monteclora, "torch", Draws())
    draw_anew()
    states = train(models, real[1], 0.1, lambda model, step: draw_anew() if model is ours else None)
    moved = [name for name in states[0] if name.endswith("std_prior")]
    assert len(moved) == 2 * LAYERS
    assert all((states[-1][name] - states[0][name]).abs().max() > 1e-4 for name in moved)
