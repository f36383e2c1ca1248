"""aLoRA: where it acts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from peft_tools import peft_load, peft_save, raw, same_tensors, tiny
from torch import nn
from torch.func import grad, vmap

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.methods.alora import offsets

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own

TOKENS = [5, 6, 5]
CONFIG: dict[str, Any] = {
    "r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False,
    "alora_invocation_tokens": TOKENS,
}  # fmt: skip
# invoked in the middle, never, twice and overlapping, at the end, and cut off
IDS = torch.tensor(
    [
        [1, 2, 5, 6, 5, 3, 4, 9],
        [1, 2, 5, 6, 3, 5, 4, 9],
        [5, 6, 5, 6, 5, 6, 5, 7],
        [1, 1, 1, 1, 1, 5, 6, 5],
        [5, 6, 5, 1, 1, 1, 5, 6],
    ]
)
WHERE = [6, 0, 4, 3, 8]


def made(**fields: Any) -> tuple[nn.Module, fa.Adapter]:
    model = nn.Sequential(nn.Linear(4, 6)).double()
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, "alora_invocation_tokens": TOKENS, **fields}
    return model, fa.init(model, fa.LoraConfig(**config))


def test_offsets_are_those_of_peft() -> None:
    config = fa.LoraConfig(**CONFIG)
    assert offsets(IDS, config).tolist() == WHERE
    theirs = calculate_alora_offsets({"a": peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG)}, "a", IDS)
    assert [k or 0 for k in theirs] == WHERE
    assert vmap(lambda ids: offsets(ids, config))(IDS).tolist() == WHERE
    assert offsets(IDS[:, :2], config).tolist() == [0] * 5
    ids = torch.randint(5, 7, (50, 9), generator=torch.Generator().manual_seed(0))
    theirs = calculate_alora_offsets({"a": peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG)}, "a", ids)
    assert [k or 0 for k in theirs] == offsets(ids, config).tolist()


@pytest.mark.parametrize("bias", [False, True])
def test_it_acts_on_the_last_tokens_of_each_row(bias: bool) -> None:
    model, adapter = made(lora_bias=bias)
    adapter = adapter.map(lambda t: t + 0.5)
    lora = adapter.replace(config=fa.LoraConfig(r=2, target_modules=["0"], lora_bias=bias))
    x, k = torch.randn(4, 3, 4).double(), torch.tensor([0, 1, 3, 9])
    on = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 1, 1]], dtype=torch.bool).unsqueeze(-1)
    expected = torch.where(on, fa.functional_call(model, lora, (x,)), model(x))

    def call(x: torch.Tensor, adapter: fa.Adapter = adapter) -> torch.Tensor:
        return fa.functional_call(model, adapter, (x,), inputs={"alora_offsets": k})

    torch.testing.assert_close(call(x), expected)
    assert torch.equal(call(x)[0], model(x)[0])
    torch.testing.assert_close(call(x.flatten(0, 1)), expected.flatten(0, 1))
    torch.testing.assert_close(call(x.unsqueeze(2)), expected.unsqueeze(2))
    twice = x.repeat_interleave(2, 0)
    torch.testing.assert_close(call(twice), expected.repeat_interleave(2, 0))
    torch.testing.assert_close(call(x[:, :1])[1:], fa.functional_call(model, lora, (x[:, :1],))[1:])
    low = fa.functional_call(model, adapter.to(torch.float32), (x,), inputs={"alora_offsets": k})
    torch.testing.assert_close(low, expected, rtol=1e-5, atol=1e-5)

    def loss(params: Any) -> torch.Tensor:
        return call(x, adapter.replace(params=params)).square().sum()

    def dense(params: Any) -> torch.Tensor:
        out = fa.functional_call(model, lora.replace(params=params), (x,))
        return torch.where(on, out, model(x)).square().sum()

    ours, theirs = grad(loss)(adapter.params)["0"], grad(dense)(adapter.params)["0"]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_what_is_missing_raises() -> None:
    model, adapter = made()
    x = torch.randn(2, 3, 4).double()
    with pytest.raises(fa.SiteError, match=r"aLoRA at '0' needs to know where it begins"):
        fa.functional_call(model, adapter, (x,))
    with pytest.raises(fa.SiteError, match=r"alora_offsets of shape \(3,\) for an output of shape \(2, 3, 6\)"):
        fa.functional_call(model, adapter, (x,), inputs={"alora_offsets": torch.tensor([1, 2, 3])})
    with pytest.raises(fa.SiteError, match="does not support merging"):
        fa.merge(model, adapter)


def test_grouped_and_routed() -> None:
    model, a = made()
    b = fa.init(model, a.config, seed=1)
    x, k = torch.randn(4, 3, 4).double(), torch.tensor([1, 2, 0, 3])

    def one(adapter: fa.Adapter, row: int) -> torch.Tensor:
        return fa.functional_call(model, adapter, (x[row : row + 1],), inputs={"alora_offsets": k[row : row + 1]})

    stack = fa.stack([a, b])
    out = fa.functional_call(model, fa.grouped(stack), (x,), inputs={"alora_offsets": k})
    torch.testing.assert_close(out, torch.cat([one(adapter, i) for i, adapter in enumerate((a, a, b, b))]))
    routed = fa.routed(stack, torch.tensor([1, 0, 1, -1]))
    out = fa.functional_call(model, routed, (x,), inputs={"alora_offsets": k})
    torch.testing.assert_close(out, torch.cat([one(b, 0), one(a, 1), one(b, 2), model(x[3:])]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_that_of_peft(family: str, tmp_path: Path) -> None:
    """Its logits, gradients, files, what it generates, and rows of other adapters."""
    config = CONFIG if family == "llama" else {**CONFIG, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    logits: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    grads: list[dict[str, Any]] = []
    for package in (peft, shim):
        torch.manual_seed(3)
        model: Any = package.get_peft_model(tiny(family), package.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        logits.append(model(input_ids=IDS).logits)
        logits.append(model(input_ids=IDS, alora_offsets=[1, None, 3, 9, 2]).logits)
        logits[-2].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for kwargs in ({}, {"alora_offsets": [1, None, 3, 9, 2]}):
            texts.append(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs))
        plain = {name: value for name, value in config.items() if name != "alora_invocation_tokens"}
        model.add_adapter("plain", package.LoraConfig(task_type="CAUSAL_LM", **plain))
        names = ["default", "default", "plain", "__base__", "default"]
        mixed.append(model(input_ids=IDS, adapter_names=names).logits)
        with model.disable_adapter():
            logits.append(model(input_ids=IDS).logits)
        with pytest.raises((NotImplementedError, fa.SiteError), match="merging"):
            model.merge_adapter()
    half = len(logits) // 2
    for ours, theirs in zip(logits[-half:], logits[:half], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(texts[2:], texts[:2], strict=True))
    torch.testing.assert_close(mixed[-1], mixed[0])
    assert list(grads[1]) == list(grads[0])
    for name, value in grads[1].items():
        torch.testing.assert_close(value, grads[0][name], msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_recompute_with_the_offsets(reentrant: bool) -> None:
    """Also where a second call comes before the first one's backward pass."""
    model: Any = shim.get_peft_model(tiny("llama"), shim.LoraConfig(task_type="CAUSAL_LM", **CONFIG)).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        first, second = model(input_ids=IDS).logits, model(input_ids=IDS.flip(1)).logits
        return list(torch.autograd.grad(first.square().sum(), trained)) + list(
            torch.autograd.grad(second.square().sum(), trained)
        )

    expected = gradients()
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # it knows no torch.autograd.grad

        def gradients() -> list[torch.Tensor]:
            model.zero_grad()
            first, second = model(input_ids=IDS).logits, model(input_ids=IDS.flip(1)).logits
            found: list[Any] = []
            for out in (first, second):
                model.zero_grad()
                out.square().sum().backward()
                found += [p.grad for p in trained]
            return found

    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_files_are_those_of_peft(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG)).eval()
        model, adapter = tiny("llama"), fa.load(peft_save(theirs, tmp_path / "theirs"))
        fa.save(adapter, tmp_path / "ours")
        same_tensors(raw(tmp_path / "ours"), raw(tmp_path / "theirs"))
        again: Any = peft_load(tiny("llama"), tmp_path / "ours").eval()
    expected = theirs(input_ids=IDS).logits
    inputs = {"alora_offsets": offsets(IDS, adapter.config)}  # pyright: ignore
    ours = fa.functional_call(model, adapter, kwargs={"input_ids": IDS}, inputs=inputs).logits
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_beams_and_embeddings() -> None:
    model: Any = shim.get_peft_model(tiny("llama"), shim.LoraConfig(task_type="CAUSAL_LM", **CONFIG)).eval()
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    every = model.generate(input_ids=IDS, **settings)
    for row in range(len(IDS)):
        assert torch.equal(model.generate(input_ids=IDS[row : row + 1], **settings), every[row : row + 1])
    names = ["default", "__base__", "default", "default", "default"]
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=names, **settings), every)  # row 1 invokes nothing
    embedded = model.get_input_embeddings()(IDS)
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets"):
        out = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(out, tiny("llama")(IDS).logits)
