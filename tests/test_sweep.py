"""Sweeps: every trial is the run that it would have been alone."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcadapt as fa
from funcadapt import optim, sweep
from funcadapt.sweep import examples, stacks, starting, training

pytest.importorskip("transformers")

LORA = fa.LoraConfig(r=2, target_modules="all-linear")
Trial = sweep.Trial


def in_float64(model: Any) -> nn.Module:
    """All of it: transformers' norms compute in float32, which would lift differences of 1e-16 to 1e-7."""
    for module in list(model.double().modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model


@pytest.fixture(scope="module")
def model(llama: nn.Module) -> nn.Module:
    return in_float64(copy.deepcopy(llama))


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randint(0, 40, (10, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(4))


def config(**changes: Any) -> fa.LoraConfig:
    return dataclasses.replace(LORA, **changes)


VARIED = [
    Trial(config(r=2), lr=1e-2),
    Trial(config(r=4, lora_alpha=3, lora_dropout=0.4), lr=2e-3, seed=1, data_seed=5, weight_decay=0.3, name="dropout"),
    Trial(config(init_lora_weights="gaussian", lora_dropout=0.1), betas=(0.5, 0.9), clip=0.05, schedule="linear"),
    Trial(config(r=4, init_lora_weights="orthogonal"), schedule="cosine", warmup=3, end=0.1, eps=1e-3, seed=2),
    Trial(config(r=3, init_lora_weights="pissa", lora_alpha=2), lr=3e-3, clip=1.0, data_seed=1, name="pissa"),
    Trial(config(r=1, init_lora_weights="olora"), lr=5e-3, seed=4),
    Trial(config(r=2, target_modules=["q_proj"], use_rslora=True), schedule="linear", warmup=2, weight_decay=0.1),
]


def by_hand(model: nn.Module, trial: Trial, data: Tensor, steps: int, batch: int) -> fa.Adapter:
    """One trial alone, written down with torch's own optimiser, clipping and cross-entropy."""
    adapter, base = fa.init_with_base(model, trial.config, seed=trial.seed)
    params = optree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params)
    leaves = optree.tree_leaves(params)
    options = {"lr": trial.lr, "weight_decay": trial.weight_decay}
    if trial.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(leaves, **options, betas=trial.betas, eps=trial.eps)
    else:
        optimizer = torch.optim.SGD(leaves, **options, momentum=trial.momentum, nesterov=trial.nesterov)
    generator = torch.Generator().manual_seed(trial.data_seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(len(data), generator=generator).tolist()
    for step in range(steps):
        rising = step < trial.warmup
        done = (step - trial.warmup) / max(1, steps - trial.warmup)
        falling = {"constant": 1.0, "linear": 1 - (1 - trial.end) * done,
                   "cosine": trial.end + (1 - trial.end) * (1 + math.cos(math.pi * done)) / 2}  # fmt: skip
        optimizer.param_groups[0]["lr"] = trial.lr * (step / trial.warmup if rising else falling[trial.schedule])
        rows = data[order[step * batch : (step + 1) * batch]]
        kwargs = {"use_cache": False}
        logits = fa.functional_call(model, adapter.replace(params=params), (rows,), kwargs, parameters=base).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if trial.clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves, trial.clip)
        optimizer.step()
    return adapter.replace(params=optree.tree_map(lambda t: t.detach(), params))


def assert_same(a: fa.Adapter, b: fa.Adapter, **tolerance: float) -> None:
    assert a.config == b.config
    assert a.params.keys() == b.params.keys()
    for path, leaves in a.params.items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf, b.params[path][name], **(tolerance or {"rtol": 1e-8, "atol": 1e-11}))


def named(trials: list[Trial]) -> list[Trial]:
    return [t if t.name else dataclasses.replace(t, name=f"t{i}") for i, t in enumerate(trials)]


# Together is as alone


def test_each_trial_is_what_it_is_alone(model: nn.Module, data: Tensor):
    trials = named(VARIED)
    together = sweep.run(model, trials, data, steps=12, batch=2)
    for trial, got in zip(trials, together.runs, strict=True):
        alone = sweep.run(model, [trial], data, steps=12, batch=2).runs[0]
        assert got.losses == pytest.approx(alone.losses, rel=1e-9)
        assert got.adapter is not None
        assert alone.adapter is not None
        assert_same(got.adapter, alone.adapter)
    assert len({run.losses for run in together.runs}) == len(trials)


@pytest.mark.parametrize("trial", [t for t in named(VARIED) if not t.config.lora_dropout], ids=lambda t: t.name)
def test_it_is_the_run_written_by_hand(model: nn.Module, data: Tensor, trial: Trial):
    other = Trial(config(r=3), lr=1e-2, seed=9, data_seed=9, name="other")
    got = sweep.run(model, [other, trial], data, steps=8, batch=3).runs[1].adapter
    want = by_hand(model, trial, data, steps=8, batch=3)
    assert got is not None
    if str(trial.config.init_lora_weights) not in ("pissa", "olora"):
        return assert_same(got, want)
    r = trial.config.r  # the base that PiSSA and OLoRA changed is in the adapter's other half
    assert got.config.r == 2 * r
    for path, leaves in want.params.items():
        torch.testing.assert_close(got.params[path]["lora_A"][:r], leaves["lora_A"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got.params[path]["lora_B"][:, :r], leaves["lora_B"], rtol=1e-8, atol=1e-10)
    _, base = fa.init_with_base(model, trial.config, seed=trial.seed)
    theirs = fa.functional_call(model, want, (data,), parameters=base).logits
    torch.testing.assert_close(fa.functional_call(model, got, (data,)).logits, theirs, rtol=1e-8, atol=1e-10)
    return None


def test_sgd_and_ia3_have_stacks_of_their_own(model: nn.Module, data: Tensor):
    sgd = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}
    trials = named(
        [
            Trial(LORA, lr=1e-2),
            Trial(LORA, **sgd, nesterov=True, weight_decay=0.1),
            Trial(fa.IA3Config(), lr=1e-2),
            Trial(config(r=3), lr=2e-2),
            Trial(LORA, **sgd, clip=0.1),
            Trial(dataclasses.replace(LORA, use_dora=True), lr=1e-2),
        ]
    )
    sizes: list[int] = []
    result = sweep.run(model, trials, data, steps=6, batch=2, report=lambda event: sizes.append(len(event.names)))
    assert sizes == [2] * 6 + [1] * 24  # LoRA with AdamW; SGD with and without Nesterov, IA3 and DoRA alone
    for trial, run in zip(trials, result.runs, strict=True):
        assert run.name == trial.name
        assert_same(run.adapter, by_hand(model, trial, data, steps=6, batch=2))  # pyright: ignore


def test_at_once_limits_a_stack(model: nn.Module, data: Tensor):
    trials = sweep.grid(LORA, lr=[1e-2, 3e-3, 1e-3])
    sizes: list[int] = []
    few = sweep.run(model, trials, data, steps=3, at_once=2, report=lambda event: sizes.append(len(event.names)))
    assert sizes == [2, 2, 2, 1, 1, 1]
    for a, b in zip(few.runs, sweep.run(model, trials, data, steps=3).runs, strict=True):
        assert_same(a.adapter, b.adapter)  # pyright: ignore


def test_layers_that_a_trial_lacks_stay_out(llama: nn.Module, data: Tensor):
    """IA3 is neutral at one, which weight decay would pull down and gradients would move."""
    few = fa.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    more = fa.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    model = in_float64(copy.deepcopy(llama))
    trials = [Trial(few, lr=1e-1, weight_decay=0.5, clip=0.01, name="few"), Trial(more, name="more")]
    assert starting.groups(trials, starting.starts(model, trials, None), None) == [[0, 1]]
    result = sweep.run(model, trials, data, steps=5, batch=2)
    for trial, run in zip(trials, result.runs, strict=True):
        assert_same(run.adapter, by_hand(model, trial, data, steps=5, batch=2))  # pyright: ignore


# Stopping


def test_patience_frees_the_stack_and_keeps_the_best(model: nn.Module, data: Tensor):
    trials = [
        Trial(LORA, lr=1e-3, name="slow"),
        Trial(config(r=4, lora_dropout=0.3), lr=0.0, seed=1, name="still"),
        Trial(config(init_lora_weights="pissa"), lr=0.2, name="wild"),
        Trial(config(r=3, lora_dropout=0.3), lr=1e-3, seed=3, data_seed=3, name="steady"),
    ]
    options: dict[str, Any] = {"steps": 12, "batch": 2, "held_out": data, "every": 2}
    events: list[sweep.Event] = []
    result = sweep.run(model, trials, data, **options, patience=2, report=events.append)
    assert [run.stopped for run in result.runs] == [None, "patience", "patience", None]
    stops = [event for event in events if event.kind == "stop"]
    assert {name for event in stops for name in event.names} == {"still", "wild"}
    assert len([e for e in events if e.kind == "step"][-1].names) == 2
    full = sweep.run(model, trials, data, **options)
    for run, whole in zip(result.runs, full.runs, strict=True):
        n = len(run.losses)
        assert n == 12 if run.stopped is None else n < 12
        assert run.losses == pytest.approx(whole.losses[:n], rel=1e-7)  # as if nobody had left
        best = min(loss for _, loss in run.held_out)
        assert run.loss == best
        assert dict(run.held_out)[run.best_step] == best
        with torch.no_grad():
            out = fa.functional_call(model, run.adapter, (data,))  # pyright: ignore[reportArgumentType]
        assert float(sweep.token_loss(out, data).mean()) == pytest.approx(best, rel=1e-9)
    assert result.best.loss == min(run.loss for run in result.runs)


def test_patience_begins_anew_with_every_improvement(model: nn.Module, data: Tensor, held_out: Tensor):
    script = iter([5.0, 6.0, 4.0, 5.0, 6.0, 1.0])

    def loss(output: Any, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return sweep.token_loss(output, batch)
        return torch.full((len(batch),), next(script))

    (run,) = sweep.run(
        model, [Trial(LORA)], data, steps=9, batch=5, held_out=held_out, every=1, patience=2, loss=loss
    ).runs
    assert run.held_out == ((0, 5.0), (1, 6.0), (2, 4.0), (3, 5.0), (4, 6.0))
    assert (run.stopped, run.loss, run.best_step, len(run.losses)) == ("patience", 4.0, 2, 4)


def test_a_diverged_trial_harms_nobody(model: nn.Module, data: Tensor, held_out: Tensor):
    trials = [Trial(LORA, lr=1e-2, name="good"), Trial(config(r=4), lr=1e200, seed=1, name="bad")]
    result = sweep.run(model, trials, data, steps=6, batch=2)
    assert [run.stopped for run in result.runs] == [None, "diverged"]
    bad = result["bad"]
    assert bad.adapter is None
    assert bad.loss == math.inf
    assert len(bad.losses) < 6
    assert result.best.name == "good"
    assert_same(result.best.adapter, by_hand(model, trials[0], data, steps=6, batch=2))  # pyright: ignore
    json.dumps(result.records(), allow_nan=False)
    with_data = sweep.run(model, trials, data, steps=6, batch=2, held_out=held_out, every=3)
    assert with_data["bad"].best_step == 0  # its start was the best of it
    assert_same(with_data["bad"].adapter, fa.init(model, trials[1].config, seed=1))  # pyright: ignore


def test_everything_may_diverge(model: nn.Module, data: Tensor, tmp_path: Path):
    result = sweep.run(model, [Trial(LORA, lr=1e200)], data, steps=5)
    assert result.best.loss == math.inf
    assert result.save(tmp_path) == [None]
    result.plot(tmp_path / "sweep.png")
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["loss"] is None


def test_a_loss_above_the_limit_counts_as_diverged(model: nn.Module, data: Tensor):
    trials = [Trial(LORA, lr=0.0, name="a"), Trial(config(init_lora_weights=False), lr=0.0, name="b")]
    runs = sweep.run(model, trials, data, steps=3, batch=10).runs
    losses = [run.losses[0] for run in runs]
    limited = sweep.run(model, trials, data, steps=3, batch=10, max_loss=sum(losses) / 2).runs
    assert [run.stopped for run in limited] == ["diverged" if loss == max(losses) else None for loss in losses]


# The model


def test_the_model_stays_as_it_is(llama: nn.Module, data: Tensor, held_out: Tensor):
    model = copy.deepcopy(llama).requires_grad_(True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trials = [Trial(config(lora_dropout=0.5, init_lora_weights="pissa")), Trial(LORA, name="b")]
    sweep.run(model, trials, data, steps=2, held_out=held_out)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_dropout_acts_in_training_only(model: nn.Module, data: Tensor, held_out: Tensor):
    trials = [
        Trial(config(lora_dropout=rate, init_lora_weights=False), seed=seed, lr=0.0, name=f"{rate} {seed}")
        for rate in (0.0, 0.5)
        for seed in (0, 1)
    ]
    runs = sweep.run(model, trials, data[:1], steps=4, held_out=held_out).runs
    assert len(set(runs[0].losses)) == 1  # no step, no dropout: the same loss
    assert len(set(runs[2].losses)) == 4  # another mask every time
    assert runs[0].held_out == runs[2].held_out  # none in evaluation
    state = torch.random.get_rng_state()
    again = sweep.run(model, trials[2:], data[:1], steps=4).runs
    assert again[0].losses == pytest.approx(runs[2].losses)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("how", [False, "pissa"])
def test_dropout_is_that_of_grouped_and_its_seeds(model: nn.Module, data: Tensor, how: bool | str):
    """PiSSA's dropout leaves the base, and so the part that was taken out of it, alone."""
    trial = Trial(config(r=4, lora_dropout=0.5, init_lora_weights=how), seed=3, lr=0.0)
    (run,) = sweep.run(model, [trial], data, steps=3, batch=2).runs
    adapter, base = fa.init_with_base(model, trial.config, seed=3)
    noisy = fa.structural_copy(model).train()  # nothing else in it has dropout
    for step, rows in enumerate(data[examples.order(len(data), 6, 0)].view(3, 2, -1)):
        alone = fa.grouped(fa.stack([adapter]), seeds=[training._seed(3, step)])
        out = fa.functional_call(noisy, alone, (rows,), parameters=base)
        assert run.losses[step] == pytest.approx(float(sweep.token_loss(out, rows).mean()), rel=1e-9)


def test_data_order_is_by_seed(model: nn.Module, data: Tensor):
    seen: list[Tensor] = []

    def loss(output: Any, batch: Tensor) -> Tensor:
        seen.append(batch)
        return sweep.token_loss(output, batch)

    trials = [
        Trial(LORA, data_seed=0, name="a"),
        Trial(LORA, data_seed=1, name="b"),
        Trial(LORA, data_seed=0, name="c"),
    ]
    sweep.run(model, trials, data, steps=10, batch=2, loss=loss)
    rows = torch.stack(seen).view(10, 3, 2, 6).transpose(0, 1).reshape(3, 20, 6)  # (trial, example, token)
    for epochs in rows.unflatten(1, (2, 10)):
        for epoch in epochs:
            assert sorted(epoch.tolist()) == sorted(data.tolist())
        assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_other_models_and_losses():
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
    x = torch.randn(40, 4)
    pairs = (x, x[:, :1] * 3)
    start = fa.LoraConfig(target_modules=["0", "2"])
    trials = sweep.grid(start, lr=[1e-3, 3e-2], r=[1, 2])
    loss = lambda y, batch: (y - batch[1]).square().mean(1)  # noqa: E731
    result = sweep.run(net, trials, pairs, steps=60, batch=8, held_out=pairs, loss=loss)
    assert result.best.trial.lr == 3e-2
    assert result.best.loss < 0.5 * result.best.held_out[0][1]
    fields = {"features": x, "target": pairs[1]}
    by_name = sweep.run(
        net, trials, fields, steps=60, batch=8, held_out=fields, loss=lambda y, b: (y - b["target"]).square().mean(1),
        inputs=lambda b: ((b["features"],), {}),
    )  # fmt: skip
    assert [run.losses for run in by_name.runs] == [run.losses for run in result.runs]


def test_whole_parameters_and_padded_batches(model: nn.Module, data: Tensor):
    mask = torch.ones_like(data)
    mask[:, 4:] = 0
    batch = {"input_ids": data, "attention_mask": mask}
    trials = [Trial(config(modules_to_save=["norm"], r=r), lr=1e-2, name=str(r)) for r in (1, 2)]
    result = sweep.run(model, trials, batch, steps=3, batch=2)
    assert "model.norm" in result.runs[0].adapter.params  # pyright: ignore
    short = sweep.run(model, trials, data[:, :4], steps=3, batch=2)
    assert result.runs[1].losses == pytest.approx(short.runs[1].losses)


# The loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_loss_is_cross_entropy(dtype: torch.dtype):
    from types import SimpleNamespace

    logits = (3 * torch.randn(3, 5, 11)).to(dtype).requires_grad_()
    ids = torch.randint(0, 11, (3, 5))
    labels = ids.masked_fill(torch.rand(3, 5) < 0.3, -100)
    labels[:, 2] = ids[:, 2]
    weight = torch.rand(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [F.cross_entropy(row[:-1].to(wide), goal[1:]) for row, goal in zip(logits, labels, strict=True)]
    expected = torch.stack(rows)
    (want,) = torch.autograd.grad((expected * weight).sum(), logits)
    ours = sweep.token_loss(SimpleNamespace(logits=logits), {"input_ids": ids, "labels": labels})
    (got,) = torch.autograd.grad((ours * weight).sum(), logits)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(got, want)
    assert sweep.token_loss({"logits": logits}, {"labels": torch.full((3, 5), -100)}).tolist() == [0, 0, 0]


def test_token_loss_keeps_no_copy_of_the_logits():
    logits = torch.randn(4, 16, 1000, requires_grad=True)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(0 if t.data_ptr() == logits.data_ptr() else t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sweep.token_loss({"logits": logits}, torch.zeros(4, 16, dtype=torch.long)).sum().backward()
    assert max(sizes) <= 64


# Grids


def test_grid():
    trials = sweep.grid(LORA, r=[2, 4], lr=[1e-3, 1e-2], betas=(0.8, 0.9), target_modules=["q_proj", "v_proj"])
    assert [(t.config.r, t.lr) for t in trials] == [(2, 1e-3), (2, 1e-2), (4, 1e-3), (4, 1e-2)]
    assert all(t.betas == (0.8, 0.9) and t.config.target_modules == ("q_proj", "v_proj") for t in trials)
    axes = sweep.grid(LORA, betas=[(0.8, 0.9), (0.9, 0.99)], target_modules=[["q_proj"], "all-linear"])
    assert [t.name for t in axes][:2] == [
        "betas=0.8+0.9 target_modules=q_proj",
        "betas=0.8+0.9 target_modules=all-linear",
    ]
    start = Trial(LORA, lr=5e-4, clip=1.0, name="base")
    (only,) = sweep.grid(start)
    assert only == start
    assert [t.name for t in sweep.grid(start, seed=[0, 1])] == ["base seed=0", "base seed=1"]
    assert len(sweep.grid(LORA, clip=[None, 1.0], init_lora_weights=[True, "pissa", "gaussian"])) == 6


def test_grid_files(tmp_path: Path):
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(
        "target_modules: [q_proj, v_proj]\nbetas: [[0.9, 0.95], [0.9, 0.999]]\nlr: [1e-3, 3e-3]\nclip: 1\n"
    )
    trials = sweep.read(tmp_path / "a.yaml")
    assert [t.lr for t in trials] == [1e-3, 3e-3, 1e-3, 3e-3]  # YAML reads 1e-3 as text
    assert trials[2].betas == (0.9, 0.999)
    assert trials[0].config.target_modules == ("q_proj", "v_proj")
    spec = {"lr": 1e-3, "trials": [{"r": 2}, {"r": 4, "seed": [0, 1]}, {"peft_type": "IA3", "name": "ia3"}]}
    (tmp_path / "b.json").write_text(json.dumps(spec))
    listed = sweep.read(tmp_path / "b.json")
    assert [t.name for t in listed] == ["r=2", "r=4 seed=0", "r=4 seed=1", "ia3"]
    assert isinstance(listed[3].config, fa.IA3Config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1.0}, "no field 'learning_rat'"),
        ({"lora_alpa": [1]}, "no field 'lora_alpa'. Did you mean 'lora_alpha'"),
        ({"lr": []}, "axis 'lr' of the grid is an empty list"),
        ({"lr": [-1.0]}, "lr must be a number >= 0, got -1.0"),
        ({"lr": "fast"}, "lr must be a number >= 0, got 'fast'"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be a number > 0"),
        ({"clip": -1.0}, "clip must be a number > 0"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"warmup": -1}, "warmup must be an integer >= 0"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown. Did you mean 'cosine'"),
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown. Did you mean 'adamw'"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"r": [0]}, "do not make a LoraConfig: `r` should be a positive"),
        ({"r": "many"}, "do not make a LoraConfig: `r` of LoraConfig must be int"),
    ],
)
def test_bad_grids_are_explained(fields: dict[str, Any], message: str):
    with pytest.raises(fa.AdapterError, match=message):
        sweep.grid(LORA, **fields)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("{", ".json", "is no JSON"),
        ("a: [", ".yaml", "is no YAML"),
        ("", ".yaml", "must hold fields and values"),
        ("[1]", ".json", "must hold fields and values"),
        ('{"trials": []}', ".json", "at least one trial"),
        ('{"trials": [3]}', ".json", "must have fields and values, got 3"),
        ('{"peft_type": "LORRA"}', ".json", "Did you mean 'LORA'"),
        (None, ".yaml", "cannot be read"),
    ],
)
def test_bad_grid_files_are_explained(text: str | None, suffix: str, message: str, tmp_path: Path):
    file = tmp_path / f"grid{suffix}"
    if text is not None:
        file.write_text(text)
    with pytest.raises(fa.AdapterError, match=message):
        sweep.read(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": []}, "no trials"),
        ({"trials": [Trial(LORA, name="a"), Trial(LORA, name="a")]}, "Two trials have the name 'a': 0 and 1"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch": 11}, "data has too few examples: 10, and 11"),
        ({"patience": 2}, "patience needs held_out"),
        ({"held_out": torch.zeros(0, 4)}, "held_out has too few examples: 0"),
        ({"data": (torch.zeros(3, 1), torch.zeros(4))}, "data has tensors of 3 and 4 examples"),
        ({"data": "text"}, "data must be a tensor"),
        ({"loss": lambda output, batch: output.logits.mean()}, r"loss must return one loss .* got \(\)"),
        ({"loss": lambda output, batch: output.logits.detach().mean((1, 2))}, "does not depend on the adapters"),
        ({"loss": lambda output, batch: sweep.token_loss(output.logits, batch)}, "Pass loss="),
    ],
)
def test_bad_runs_are_explained(model: nn.Module, data: Tensor, changes: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"trials": [Trial(LORA)], "data": data, "steps": 1, **changes}
    with pytest.raises(fa.AdapterError, match=message):
        sweep.run(model, arguments.pop("trials"), arguments.pop("data"), **arguments)


def test_what_is_no_trial_is_refused(model: nn.Module, data: Tensor):
    with pytest.raises(TypeError, match=r"trials\[0\] is a LoraConfig"):
        sweep.run(model, [LORA], data, steps=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"config must be a config"):
        Trial({"r": 4})  # pyright: ignore[reportArgumentType]


# Results


@pytest.fixture(scope="module")
def result(model: nn.Module, data: Tensor, held_out: Tensor) -> sweep.Result:
    trials = [
        *sweep.grid(LORA, lr=[1e-2, 1e-3]),
        Trial(config(init_lora_weights="pissa", r=3, lora_alpha=5), name="pissa / 3", betas=(0.8, 0.9)),
        Trial(config(init_lora_weights="olora", use_rslora=True), name="rs", data_seed=1),
        Trial(LORA, lr=1e200, name="bad"),
    ]
    return sweep.run(model, trials, data, steps=4, batch=2, held_out=held_out, max_loss=50)


def test_saved_adapters_are_checkpoints(result: sweep.Result, model: nn.Module, held_out: Tensor, tmp_path: Path):
    (tmp_path / "results.json").write_text("older")
    folders = result.save(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["best"] == result.best.name
    assert [r["name"] for r in content["runs"]] == [run.name for run in result.runs]
    assert [p.name for p in folders][:3] == ["000-lr=0.01", "001-lr=0.001", "002-pissa_3"]  # pyright: ignore
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in folders if p), "results.json"])
    for run, folder, record in zip(result.runs, folders, content["runs"], strict=True):
        assert folder is not None
        assert record["checkpoint"] == folder.name
        loaded = fa.load(folder)
        with torch.no_grad():  # on the base as it is, also after PiSSA and OLoRA
            out = fa.functional_call(model, loaded, (held_out,))
        assert float(sweep.token_loss(out, held_out).mean()) == pytest.approx(run.loss, rel=1e-9)
    pissa = content["runs"][2]
    assert pissa["config"] == {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "init_lora_weights": "pissa",
                               "target_modules": "all-linear"}  # fmt: skip
    assert pissa["betas"] == [0.8, 0.9]
    assert len(pissa["losses"]) == 4
    assert content["runs"][4]["stopped"] == "diverged"


def test_table_and_plot(result: sweep.Result, tmp_path: Path):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    console.print(result.table())
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for expected in ("pissa / 3", "init_lora_weights", "0.8+0.9", f"{result.best.loss:.4f}", "diverged"):
        assert expected in printed
    assert "lora_dropout" not in printed  # the same in all of them
    lines = [line for line in printed.splitlines() if "│" in line]
    assert result.best.name in lines[0]
    result.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match=r"no trial 'lr=0\.1'. Did you mean 'lr=0\.01'"):
        result["lr=0.1"]


def test_progress(model: nn.Module, data: Tensor, held_out: Tensor, monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    trials = sweep.grid(LORA, lr=[1e-3, 1e200])
    events: list[sweep.Event] = []
    run = sweep.run(model, trials, data, steps=4, held_out=held_out, every=2, progress=console, report=events.append)
    assert "best held-out loss" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [event.kind for event in events]
    assert kinds[:2] == ["evaluation", "step"]
    assert kinds.count("evaluation") == 3
    assert [e.losses[0] for e in events if e.kind == "step"] == list(run.runs[0].losses)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    sweep.run(model, trials, data, steps=1)  # the core needs none of it
    with pytest.raises(ImportError, match=r"rich.* is not installed.*pip install"):
        sweep.run(model, trials, data, steps=1, progress=True)


def test_schedules_fill_the_run():
    rates = stacks._rates(Trial(LORA, lr=2.0, schedule="cosine", warmup=2, end=0.5), 6)
    expected = [2 * float(optim.cosine(6, warmup=2, end=0.5)(i)) for i in range(6)]
    assert rates.tolist() == pytest.approx(expected)
    assert rates[0] == 0
    assert rates.min() < rates[-1] < 2


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model over bytes, and a folder of text of two letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("cli")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": len(alphabet), "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet) + 1, **shape, **ends)).save_pretrained(root / "model")
    (root / "text" / ".git").mkdir(parents=True)
    for i, name in enumerate(("a.txt", "b.md", "c.py", "deeper/d.txt", "deeper/e.rst", "f.txt")):
        (root / "text" / name).parent.mkdir(exist_ok=True)
        (root / "text" / name).write_text("ab" * 100 + "a" * i)
    (root / "text" / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (root / "text" / ".git" / "hidden").write_text("z" * 500)
    return str(root / "model"), root / "text"


def command(folder: tuple[str, Path], out: Path, *arguments: str, small: bool = True) -> Any:
    from typer.testing import CliRunner

    from funcadapt import cli

    sizes = ["--steps", "8", "--length", "16", "--batch", "2", "--held-out", "3"] if small else []
    options = ["--model", folder[0], "--text", str(folder[1]), "--out", str(out), *sizes]
    return CliRunner().invoke(cli.app, ["sweep", *arguments, *options])


def test_command_runs_a_grid_file(folder: tuple[str, Path], tmp_path: Path):
    pytest.importorskip("yaml")
    (tmp_path / "grid.yaml").write_text("target_modules: all-linear\nlr: [0, 3e-2]\nr: [1, 2]\nlora_dropout: 0.1\n")
    outcome = command(folder, tmp_path / "out", str(tmp_path / "grid.yaml"), "--every", "4", "--at-once", "3")
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["name"] for r in content["runs"]] == ["lr=0 r=1", "lr=0 r=2", "lr=0.03 r=1", "lr=0.03 r=2"]
    assert [step for step, _ in content["runs"][0]["held_out"]] == [0, 4, 8]
    assert content["best"].startswith("lr=0.03")
    assert fa.load(tmp_path / "out" / content["runs"][3]["checkpoint"]).config.r == 2  # pyright: ignore
    assert (tmp_path / "out" / "sweep.png").is_file()
    assert "lr=0.03 r=2" in outcome.output


def test_command_needs_no_grid_file(folder: tuple[str, Path], tmp_path: Path):
    outcome = command(folder, tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4


def test_command_fails_if_nothing_learned(folder: tuple[str, Path], tmp_path: Path):
    (tmp_path / "grid.json").write_text('{"lr": [0, 1e30], "target_modules": "all-linear"}')
    outcome = command(folder, tmp_path, str(tmp_path / "grid.json"))
    assert outcome.exit_code == 1, outcome.output
    assert "failed: no trial is better" in outcome.stderr


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ('{"lr": []}', [], "error: The axis 'lr'"),
        ('{"lora_alpa": 3}', [], "Did you mean 'lora_alpha'"),
        ('{"ensure_weight_tying": true}', [], "error: "),
        ('{"target_modules": ["q_prj"]}', [], "Did you mean 'q_proj'"),
        ("{}", [], "must hold fields"),
        (None, ["--length", "5000"], "error: the text fills only 0 windows"),
        (None, ["--text", "/nowhere"], "error: there is no text at '/nowhere'"),
        (None, ["--model", "/nowhere/at/all"], "error: no model at"),
    ],
)
def test_command_explains_what_is_wrong(
    grid: str | None, options: list[str], message: str, folder: tuple[str, Path], tmp_path: Path
):
    from typer.testing import CliRunner

    from funcadapt import cli

    file = tmp_path / "grid.json"
    if grid is not None:
        file.write_text(grid)
    base = ["--model", folder[0], "--text", str(folder[1]), "--out", str(tmp_path / "out")]
    arguments = [*([str(file)] if grid is not None else []), *base, *options]
    outcome = CliRunner().invoke(cli.app, ["sweep", *arguments])
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_documents_are_split(folder: tuple[str, Path], tmp_path: Path):
    from funcadapt import cli

    train, held_out = cli._documents(folder[1])
    assert (len(train), len(held_out)) == (5, 1)  # neither the picture nor what is hidden
    assert not set(train) & set(held_out)
    (tmp_path / "one.txt").write_text("0123456789")
    assert cli._documents(tmp_path / "one.txt") == (["01234567"], ["89"])
    assert cli._documents(tmp_path) == (["01234567"], ["89"])


# The real model


@pytest.mark.heavy
def test_trials_of_a_real_model_are_as_alone():
    from funcadapt.recipes import pretrained

    try:
        model, tokenizer = pretrained.load_pretrained()
    except pretrained.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    model.model.layers = model.model.layers[:2]  # the whole takes five minutes
    model = in_float64(model).requires_grad_(False)
    text = (Path(__file__).parents[1] / "LICENSE").read_text()[:8000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 20 * 12]).view(20, 12)
    pair = ["q_proj", "down_proj"]
    trials = [
        Trial(config(r=8, target_modules="all-linear"), lr=2e-3, weight_decay=0.1, schedule="cosine", warmup=5),
        Trial(config(r=4, lora_alpha=16, lora_dropout=0.2, init_lora_weights="gaussian", target_modules="all-linear"),
              lr=1e-3, seed=1, data_seed=1, betas=(0.8, 0.95), clip=0.5),
        Trial(config(r=6, lora_alpha=4, init_lora_weights="pissa_niter_4", target_modules=pair), lr=5e-4, seed=2,
              data_seed=2, schedule="linear", clip=1.0),
    ]  # fmt: skip
    together = sweep.run(model, trials, ids, steps=50)
    worst = 0.0
    for i, trial in enumerate(trials):
        alone = sweep.run(model, [trial], ids, steps=50).runs[0]
        got = together.runs[i]
        assert got.losses == pytest.approx(alone.losses, rel=1e-7)
        assert got.losses[-1] < got.losses[0] or i
        assert got.adapter is not None
        assert alone.adapter is not None
        moved = 0.0
        start = fa.init_with_base(model, trial.config, seed=trial.seed)[0]
        for path, leaves in alone.adapter.params.items():
            for name, leaf in leaves.items():
                worst = max(worst, float((got.adapter.params[path][name] - leaf).abs().max()))
                if leaf.shape == start.params[path][name].shape:
                    moved = max(moved, float((start.params[path][name] - leaf).abs().max()))
        assert i == 2 or moved > 1e-3
    print(f"largest difference of a weight: {worst:.1e}")
    assert worst < 1e-9
