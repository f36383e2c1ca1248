"""Poly: tasks are an input of the call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, layer_model, peft_load, peft_save, raw, same_tensors, tiny, wrap
from torch.func import grad

import funcadapt as fa

FIELDS: dict[str, Any] = {"r": 3, "n_tasks": 4, "n_skills": 3}
TASKS = torch.tensor([2, 0, 3])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("train", [False, True])
def test_it_is_peft_s(splits: int, train: bool, tmp_path: Path) -> None:
    """Outputs, gradients and files; in training from equal seeds."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(6, 4)}).double()
    model.forward = lambda x: model["layer"](x)  # pyright: ignore
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    config = peft.PolyConfig(target_modules=["layer"], n_splits=splits, **FIELDS)
    wrapped: Any = wrap(model, config).double().train(train)
    layer = wrapped.base_model.model["layer"]
    adapter = fa.load(peft_save(wrapped, tmp_path / "theirs"))
    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(tmp_path / "theirs"))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")

    bare = torch.nn.ModuleDict({"layer": layer.base_layer}).train(train)
    bare.forward = lambda x: bare["layer"](x)  # pyright: ignore
    torch.manual_seed(3)
    theirs = layer(x, task_ids=TASKS)
    torch.manual_seed(3)
    ours = fa.functional_call(bare, adapter, (x,), inputs={"task_ids": TASKS})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    if train:
        return
    theirs.pow(2).sum().backward()

    def loss(params: Any) -> torch.Tensor:
        y = fa.functional_call(bare, adapter.replace(params=params), (x,), inputs={"task_ids": TASKS})
        return y.pow(2).sum()

    g = grad(loss)(adapter.params)["layer"]
    for name in ("poly_lora_A", "poly_lora_B"):
        torch.testing.assert_close(g[name], getattr(layer, name)["default"].grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(g["module_logits"], layer.poly_router["default"].module_logits.grad, rtol=0, atol=1e-11)
    again: Any = peft_load(torch.nn.ModuleDict({"layer": torch.nn.Linear(6, 4)}).double(), tmp_path / "ours").double()
    again.base_model.model["layer"].base_layer.load_state_dict(layer.base_layer.state_dict())
    torch.testing.assert_close(again.base_model.model["layer"](x, task_ids=TASKS), theirs, rtol=0, atol=1e-12)


def _net() -> tuple[torch.nn.Module, fa.Adapter, torch.Tensor]:
    model, x, target = layer_model("linear")
    return model, fa.init(model, fa.PolyConfig(init_weights=False, **target, **FIELDS)), x


def test_each_row_has_its_own_task() -> None:
    model, adapter, x = _net()
    model.eval()
    out = fa.functional_call(model, adapter, (x,), inputs={"task_ids": TASKS})
    for row, task in enumerate(TASKS):
        one = fa.functional_call(model, adapter, (x[row : row + 1],), inputs={"task_ids": task.reshape(1)})
        torch.testing.assert_close(out[row : row + 1], one)


def test_grouped_and_routed_take_the_tasks_of_all_rows() -> None:
    model, a, x = _net()
    model.eval()
    b = fa.init(model, a.config, seed=1)
    stack, tasks = fa.stack([a, b]), torch.tensor([2, 0, 3, 1, 1, 0])
    each = [fa.functional_call(model, one, (x,), inputs={"task_ids": t}) for one, t in ((a, tasks[:3]), (b, tasks[3:]))]
    both = torch.cat([x, x])
    out = fa.functional_call(model, fa.grouped(stack), (both,), inputs={"task_ids": tasks})
    torch.testing.assert_close(out, torch.cat(each))
    index = torch.tensor([1, -1, 0, 1, 0, 0])
    for how in (None, "sort", "gather"):
        out = fa.functional_call(model, fa.routed(stack, index, how=how), (both,), inputs={"task_ids": tasks})
        for row, which in enumerate(index.tolist()):
            one = both[row : row + 1]
            expected = model(one) if which < 0 else fa.functional_call(
                model, (a, b)[which], (one,), inputs={"task_ids": tasks[row : row + 1]}
            )  # fmt: skip
            torch.testing.assert_close(out[row : row + 1], expected)


def test_what_is_missing_or_wrong_raises() -> None:
    model, adapter, x = _net()
    with pytest.raises(fa.SiteError, match="needs the task of each row"):
        fa.functional_call(model, adapter, (x,))
    with pytest.raises(fa.SiteError, match=r"task_ids of shape \(2,\)"):
        fa.functional_call(model, adapter, (x,), inputs={"task_ids": TASKS[:2]})
    for wrong in (TASKS[:1], TASKS[:0], TASKS.repeat(2)):
        with pytest.raises(fa.SiteError, match=r"task_ids of shape .*expected \(3,\)"):
            fa.functional_call(model, adapter, (x,), inputs={"task_ids": wrong})
    with pytest.raises(fa.AdapterError, match=r"inputs has 'tasks'.*Did you mean 'task_ids'"):
        fa.functional_call(model, adapter, (x,), inputs={"tasks": TASKS})
    with pytest.raises(fa.SiteError, match="cannot be merged"):
        fa.merge(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrong, found in ((TASKS + 4, 6), (TASKS - 1, -1), (torch.tensor(4), 4)):
            with pytest.raises(fa.SiteError, match=f"Only 4 tasks available. Found task id = {found}"):
                fa.functional_call(model, adapter, (x,), inputs={"task_ids": wrong})
    for bad in ({"r": 0}, {"n_skills": -1}):
        with pytest.raises(ValueError, match="positive integer"):
            fa.PolyConfig(**bad)
    with pytest.raises(fa.SiteError, match="n_splits=4 does not divide"):
        fa.init(model, fa.PolyConfig(n_splits=4, target_modules=["layer"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_the_in_place_model_takes_task_ids() -> None:
    """A model of a task, its `generate`, and a bare injected model."""
    import funcadapt.peft as shim

    config: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, **FIELDS}
    outs: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    ids = {"input_ids": torch.randint(2, 32, (3, 5), generator=torch.Generator().manual_seed(0))}
    for package in (peft, shim):
        torch.manual_seed(7)
        model: Any = package.get_peft_model(tiny("llama"), package.PolyConfig(task_type="CAUSAL_LM", **config)).eval()
        outs.append(model(**ids, task_ids=TASKS).logits)
        texts.append(model.generate(**ids, task_ids=TASKS, max_new_tokens=3, do_sample=False))
    torch.testing.assert_close(outs[1], outs[0])
    assert torch.equal(texts[1], texts[0])
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(**ids)
    assert all("inputs" not in vars(module) for module in model.modules())


def test_a_number_is_the_task_of_all_rows() -> None:
    model, adapter, x = _net()
    model.eval()
    each = fa.functional_call(model, adapter, (x,), inputs={"task_ids": torch.full((3,), 2)})
    assert torch.equal(fa.functional_call(model, adapter, (x,), inputs={"task_ids": torch.tensor(2)}), each)
