"""Arrow: its routing, its experts, and PEFT's `create_arrow_model`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft_tools import peft_save, tiny
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.methods import arrow as ar
from funcadapt.parts import arrow_leaves

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own

IDS = torch.randint(2, 32, (3, 5), generator=torch.Generator().manual_seed(0))


def loras(n: int, **fields: Any) -> tuple[nn.Module, list[fa.Adapter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **fields}
    return model, [fa.init(model, fa.LoraConfig(lora_alpha=i + 1, **config), seed=i) for i in range(n)]


def test_prototypes_are_singular_vectors() -> None:
    a, b = torch.randn(3, 2, 6).double(), torch.randn(3, 5, 2).double()
    found = arrow_leaves.prototypes(a, b)
    expected = torch.linalg.svd(b @ a)[2][:, 0]
    torch.testing.assert_close((found * expected).sum(-1).abs(), torch.ones(3).double())
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3).double())
    layer = ArrowLoraLinearLayer(6, _config(peft, 1, seed=4))
    for i, v in enumerate(arrow_leaves.prototypes(a, b, rng_seed=4)):
        theirs = layer.top_right_singular_vec_from_BA(a[i], b[i])
        torch.testing.assert_close(v, theirs.double(), rtol=0, atol=1e-6)


def _config(package: Any, k: int, seed: int | None = 3, **fields: Any) -> Any:
    config = package.ArrowConfig(top_k=k, router_temperature=0.5, rng_seed=seed, **fields)
    config.task_adapter_names = []
    return config


def test_every_token_uses_the_experts_that_fit_it() -> None:
    """Against a loop over tokens."""
    model, adapters = loras(3)
    router = ar.arrow(adapters, top_k=2, router_temperature=0.5)
    x = torch.randn(2, 3, 6).double()
    out, base = fa.functional_call(model, router, (x,)), model(x)
    each = torch.stack([fa.functional_call(model, adapter, (x,)) - base for adapter in adapters])
    vectors = router.buffers["0"][arrow_leaves.PROTOTYPES]
    for row in range(2):
        for token in range(3):
            fit = (vectors @ x[row, token]).abs()
            best = fit.argsort(descending=True)[:2]
            c = torch.softmax(fit[best] / 0.5, 0)
            expected = base[row, token] + c[0] * each[best[0], row, token] + c[1] * each[best[1], row, token]
            torch.testing.assert_close(out[row, token], expected)
    alone = ar.arrow(adapters[1:2], top_k=1)
    torch.testing.assert_close(fa.functional_call(model, alone, (x,)), fa.functional_call(model, adapters[1], (x,)))


def test_there_and_back(tmp_path: Path) -> None:
    model, adapters = loras(3)
    router = ar.arrow({"a": adapters[0], "b": adapters[1], "c": adapters[2]}, top_k=2)
    back = ar.experts(router)
    assert list(back) == ["a", "b", "c"]
    for old, new in zip(adapters, back.values(), strict=True):
        assert new.config.lora_alpha == old.config.lora_alpha  # pyright: ignore
        for name, leaf in old.leaves("0").items():
            assert torch.equal(new.leaves("0")[name], leaf)
    fa.save(router, tmp_path)
    again = fa.load(tmp_path)
    assert again.config == router.config
    x = torch.randn(4, 6).double()
    out = fa.functional_call(model, router, (x,))
    torch.testing.assert_close(fa.functional_call(model, again, (x,)), out)
    # in place
    live: Any = fa.materialize(fa.structural_copy(model), router)
    torch.testing.assert_close(live(x), out)


def test_ranks_may_differ() -> None:
    model, (a, _) = loras(2)
    b = fa.init(model, dataclasses.replace(a.config, r=3), seed=5)
    router = ar.arrow([a, b], top_k=1)
    x = torch.randn(20, 6).double()
    out = fa.functional_call(model, router, (x,))
    both = [fa.functional_call(model, adapter, (x,)) for adapter in (a, b)]
    close = torch.stack([(out - one).abs().amax(-1) < 1e-9 for one in both])
    assert close.any(0).all()
    assert close.any(1).all()


def test_what_is_general_is_subtracted() -> None:
    _, (a, b, c, d) = loras(4)
    router = ar.arrow([a, b], general=[c, d], top_k=2)
    for name, leaf in (("lora_A", arrow_leaves.A), ("lora_B", arrow_leaves.B)):
        mean = (c.params["0"][name] + d.params["0"][name]) / 2
        torch.testing.assert_close(router.params["0"][leaf][1], b.params["0"][name] - mean)
    p = router.leaves("0")
    torch.testing.assert_close(
        p[arrow_leaves.PROTOTYPES], arrow_leaves.prototypes(p[arrow_leaves.A], p[arrow_leaves.B])
    )


def test_what_does_not_fit_raises() -> None:
    model, (a, b) = loras(2)
    with pytest.raises(fa.AdapterError, match="at least one"):
        ar.arrow([])
    biased = fa.init(model, fa.LoraConfig(target_modules=["0"], lora_bias=True))
    with pytest.raises(fa.AdapterError, match="'task_1' is no plain LoRA"):
        ar.arrow([a, biased])
    two = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)).double()
    with pytest.raises(fa.AdapterError, match="the same layers, but 'task_1' differs at '1'"):
        ar.arrow([a, fa.init(two, fa.LoraConfig(target_modules=["0", "1"]))])
    with pytest.raises(fa.SiteError, match="2 experts, fewer than top_k=3"):
        fa.functional_call(model, ar.arrow([a, b]), (torch.randn(2, 6).double(),))
    with pytest.raises(fa.SiteError, match="needs experts"):
        fa.init(model, fa.LoraConfig(target_modules=["0"], arrow_config={"top_k": 2}))
    with pytest.raises(fa.SiteError, match="a weight for every token"):
        fa.merge(model, ar.arrow([a, b]))
    with pytest.raises(ValueError, match="`top_k` must be greater than 0"):
        fa.LoraConfig(arrow_config={"top_k": 0})
    with pytest.raises(ValueError, match="does not go with lora_dropout"):
        fa.LoraConfig(arrow_config={"top_k": 1}, lora_dropout=0.1)


def _saved(folder: Path, n: int) -> list[str]:
    """LoRAs that PEFT has saved."""
    paths: list[str] = []
    for i in range(n):
        config = peft.LoraConfig(
            r=2,
            lora_alpha=3 + i,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = tiny("llama")
        torch.manual_seed(10 + i)
        paths.append(str(peft_save(peft.get_peft_model(model, config), folder / str(i))))
    return paths


@pytest.mark.parametrize("gks", [False, True])
def test_create_arrow_model_is_peft_s(gks: bool, tmp_path: Path) -> None:
    """Its outputs, those of the experts, and an expert that comes later."""
    paths = _saved(tmp_path, 5)
    found: list[list[Tensor]] = []
    for package in (peft, shim):
        config = package.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1, use_gks=gks)
        general = {"general_adapter_paths": paths[2:4]} if gks else {}
        model: Any = package.create_arrow_model(tiny("llama"), paths[:2], config, **general).eval()
        assert model.active_adapter == "arrow_router"
        assert config.task_adapter_names == ["task_0", "task_1"]
        outs = [model(input_ids=IDS).logits]
        with model.disable_adapter():
            outs.append(model(input_ids=IDS).logits)
        model.load_adapter(paths[4], adapter_name="late")
        outs.append(model(input_ids=IDS).logits)
        outs.append(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))
        if not gks:  # PEFT has subtracted from them in place
            model.set_adapter("task_1")
            outs.append(model(input_ids=IDS).logits)
        found.append(outs)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (found[1][0] - found[1][2]).abs().max() > 1e-3


def test_a_router_is_saved_with_its_experts(tmp_path: Path) -> None:
    paths = _saved(tmp_path, 2)
    model: Any = shim.create_arrow_model(tiny("llama"), paths, shim.ArrowConfig(top_k=1)).eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "all")
    again: Any = shim.PeftModel.from_pretrained(tiny("llama"), tmp_path / "all" / "arrow_router").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    value = fa.load(tmp_path / "all" / "arrow_router")
    ours = fa.functional_call(tiny("llama"), value, kwargs={"input_ids": IDS}).logits
    torch.testing.assert_close(ours, expected)
    made = ar.arrow([fa.load(path) for path in paths], top_k=1)
    ours = fa.functional_call(tiny("llama"), made, kwargs={"input_ids": IDS}).logits
    torch.testing.assert_close(ours, expected)
    with pytest.raises(fa.SiteError, match="cannot be merged"):
        model.merge_adapter()


def test_create_arrow_model_checks_its_adapters(tmp_path: Path) -> None:
    (path,) = _saved(tmp_path, 1)
    other = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    more = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    embedding = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    other, more, embedding = (
        str(peft_save(m, tmp_path / n)) for m, n in ((other, "other"), (more, "more"), (embedding, "embedding"))
    )
    config = shim.ArrowConfig(top_k=1)
    with pytest.raises(ValueError, match="at least one adapter path"):
        shim.create_arrow_model(tiny("llama"), [], config)
    with pytest.raises(ValueError, match="general LoRA paths"):
        shim.create_arrow_model(tiny("llama"), [path], shim.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match="rank mismatch"):
        shim.create_arrow_model(tiny("llama"), [path, other], config)
    with pytest.raises(ValueError, match="target_modules mismatch"):
        shim.create_arrow_model(tiny("llama"), [path, more], config)
    with pytest.raises(TypeError, match="plain LoRAs at linear layers"):
        shim.create_arrow_model(tiny("llama"), [embedding], config)
    with pytest.raises(ValueError, match=r"does not contain 'adapter_config\.json'"):
        shim.create_arrow_model(tiny("llama"), [str(tmp_path)], config)
