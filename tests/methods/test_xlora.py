"""X-LoRA against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, peft_save, raw, tiny
from torch import Tensor
from torch.func import grad

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt import xlora as xl
from funcadapt.checkpoint import read_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and"),
]

IDS = torch.randint(2, 32, (2, 5), generator=torch.Generator().manual_seed(0))
KWARGS = {"input_ids": IDS}


def base() -> Any:
    model: Any = tiny("llama")
    model.config.use_cache = False
    return model


def saved(folder: Path, n: int = 3) -> dict[str, str]:
    """LoRAs that PEFT has saved, under the only names with which its X-LoRA works."""
    paths: dict[str, str] = {}
    for i in range(n):
        modules = ["q_proj", "down_proj"] if i else ["q_proj", "down_proj", "o_proj"]
        config = peft.LoraConfig(r=2, lora_alpha=3 + i, target_modules=modules, init_lora_weights=False)
        model = base()
        torch.manual_seed(10 + i)
        paths[str(i)] = str(peft_save(peft.get_peft_model(model, config), folder / str(i)))
    return paths


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"xlora_depth": 3, "xlora_size": 7, "softmax_temperature": 0.3, "global_scaling_weight": 1.5},
    "without_dropout": {"xlora_depth": 2, "xlora_size": 7, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 7},
    "top": {"top_k_lora": 2, "layerwise_scalings": True},
    "softmax_top": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    "raw": {"enable_softmax": False},
    "first_pass": {"scaling_pass_value": 0.4},
}


def both(name: str, folder: Path) -> tuple[Any, Any, xl.XLora]:
    """PEFT's model, the bare one, and the value."""
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters=saved(folder), use_trainable_adapters=True, **CONFIGS[name]
    )
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(folder / "theirs")
    classifier = theirs.base_model.internal_xlora_classifier.state_dict()
    # PEFT loses the layers of the classifier that have the number of an expert
    assert len(raw(folder / "theirs")) < len(classifier)
    with pytest.raises(fa.AdapterFileError, match="experts at 6 layers need"):
        xl.load(folder / "theirs")
    experts = {name: fa.load(path) for name, path in config.adapters.items()}
    xl.save(xl.XLora(experts, classifier, read_config(folder / "theirs")), folder / "ours")  # pyright: ignore
    return theirs, base(), xl.load(folder / "ours")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_peft_s(name: str, tmp_path: Path) -> None:
    """Outputs, scalings, gradients and files."""
    theirs, model, value = both(name, tmp_path)
    expected = theirs(**KWARGS).logits
    found = xl.predict(model, value, kwargs=KWARGS)
    torch.testing.assert_close(found, theirs.get_latest_scalings())
    torch.testing.assert_close(xl.call(model, value, kwargs=KWARGS).logits, expected)
    torch.testing.assert_close(xl.call(model, value, IDS, scalings=found).logits, expected)
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    again: Any = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**KWARGS).logits, expected)

    expected.square().sum().backward()

    def loss(classifier: Any) -> Tensor:
        return xl.call(model, value.replace(classifier=classifier), kwargs=KWARGS).logits.square().sum()

    trained = dict(theirs.base_model.internal_xlora_classifier.named_parameters())
    for key, g in grad(loss)(value.classifier).items():
        torch.testing.assert_close(g, trained[key].grad, rtol=1e-4, atol=1e-4)


def test_it_is_a_value(tmp_path: Path) -> None:
    paths = saved(tmp_path, 2)
    experts = {f"my {name}": fa.load(path) for name, path in paths.items()}
    config = xl.XLoraConfig(hidden_size=16, adapters={}, xlora_depth=2, xlora_size=4)
    model = base()
    value = xl.xlora(model, experts, config)
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    assert len(leaves) == 4 + sum(len(list(adapter.tensors())) for adapter in experts.values())
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    out = xl.call(model, again, kwargs=KWARGS).logits
    torch.testing.assert_close(out, xl.call(model, value, kwargs=KWARGS).logits)
    w = xl.predict(model, value, kwargs=KWARGS)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 5, 6))
    # as a sum of the adapters with these weights
    weights = {name: w[:, :, 0, e] for e, name in enumerate(experts)}
    torch.testing.assert_close(out, fa.functional_call(model, experts, kwargs=KWARGS, weights=weights).logits)
    # in training only dropout differs
    model.train()
    assert not torch.equal(xl.predict(model, value, kwargs=KWARGS), w)
    # the experts can be trained, too
    g = grad(lambda x: xl.call(model.eval(), x, kwargs=KWARGS).logits.sum())(value)
    path = "model.layers.1.mlp.down_proj"
    assert g.experts["my 0"].params[path]["lora_A"].abs().max() > 0


def test_what_is_wrong_raises(tmp_path: Path) -> None:
    model = base()
    config = xl.XLoraConfig(hidden_size=16, adapters={})
    with pytest.raises(fa.AdapterError, match="at least one"):
        xl.xlora(model, {}, config)
    dora = fa.init(model, fa.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(fa.AdapterError, match="'a' is no plain LoRA"):
        xl.xlora(model, {"a": dora}, config)
    with pytest.raises(ValueError, match="depth must be strictly positive"):
        xl.XLoraConfig(hidden_size=16, adapters={}, xlora_depth=0)
    with pytest.warns(UserWarning, match="`hidden_size`. This will be set to 4096"):
        assert xl.XLoraConfig(adapters={}).hidden_size == 4096
    with pytest.warns(UserWarning, match="`adapters`. This will be set to empty"):
        filled = shim.XLoraConfig(hidden_size=16)
    with pytest.raises(ValueError, match="at least one adapter in `adapters`"):
        shim.get_peft_model(model, filled)
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        shim.get_peft_model(tiny("llama"), filled)
    lora = fa.init(model, fa.LoraConfig(target_modules=["q_proj"]))
    xl.save(xl.xlora(model, {"a": lora}, config), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="2 experts at 2 layers need"):
        xl.load(tmp_path, {"a": lora, "b": lora})
    fa.save(lora, tmp_path / "lora")
    with pytest.raises(fa.AdapterFileError, match="holds a LORA adapter"):
        xl.load(tmp_path / "lora")


@pytest.mark.parametrize("name", ["plain", "layerwise", "softmax_top", "first_pass"])
def test_the_in_place_model_is_peft_s(name: str, tmp_path: Path) -> None:
    """Outputs, gradients, generation, the log and the switches."""
    paths = saved(tmp_path)
    found: list[list[Any]] = []
    for package in (peft, shim):
        config = package.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=paths, **CONFIGS[name])
        torch.manual_seed(0)
        model: Any = package.get_peft_model(base(), config).eval()
        classifier = model.base_model.internal_xlora_classifier
        with torch.no_grad():
            for p in classifier.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        outs = [model(**KWARGS).logits]
        model.enable_scalings_logging()
        outs[0].square().sum().backward()
        outs += [p.grad for p in classifier.parameters()]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"base_model.internal_xlora_classifier.{n}" for n, _ in classifier.named_parameters()
        ]
        outs.append(model.get_latest_scalings())
        outs.append(model.generate(**KWARGS, max_new_tokens=3, do_sample=False, pad_token_id=0))
        assert [s.shape[1] for s in model.get_scalings_log()] == [5, 6, 7]
        assert list(model.get_bucketed_scalings_log()) == [5, 6, 7]
        with model.disable_adapter():
            outs.append(model(**KWARGS).logits)
        model.set_topk_lora(1)
        model.set_global_scaling_weight(0.5)
        model.set_scaling_pass_value(None)
        outs.append(model(**KWARGS).logits)
        found.append(outs)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match="cannot run with activation checkpoints"):
        model(**KWARGS)
    model.get_base_model().gradient_checkpointing_disable()
    model.eval()
    model.save_pretrained(tmp_path / "in place")
    again: Any = shim.PeftModel.from_pretrained(base(), tmp_path / "in place").eval()
    torch.testing.assert_close(again(**KWARGS).logits, found[1][-1])
    value = xl.load(tmp_path / "in place")
    torch.testing.assert_close(xl.call(base(), value, kwargs=KWARGS).logits, found[1][-1])
    assert sorted(p.name for p in (tmp_path / "in place").iterdir() if p.is_dir()) == ["0", "1", "2"]
