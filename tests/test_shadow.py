"""Shadow against PEFT's, in float64."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, peft_load, peft_save, raw, same_tensors, tiny, wrap
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt import shadow as sh

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
KWARGS = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
LM = {"task_type": "CAUSAL_LM", "r": 3, "shadow_alpha": 0.7}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LM),
    "narrow": ("llama", {**LM, "shadow_hidden_size": 8, "update_hidden_size": 5, "shadow_intermediate_size": 12}),
    "deep": (
        "llama_tied",
        {**LM, "shadow_num_hidden_layers": 2, "shadow_num_attention_heads": 4, "init_weights": False},
    ),
    "own_table": ("llama", {**LM, "share_embeddings": False, "modules_to_save": ["lm_head"]}),
    "one_block": ("llama", {**LM, "target_modules": ["layers.1"]}),
    "regex": ("llama", {**LM, "target_modules": r".*\.layers\.\d+$", "auxiliary_loss_weight": 0.0}),
    "gpt2": ("gpt2", {**LM, "modules_to_save": ["lm_head"]}),
    "opt": ("opt", LM),
    "qwen3": ("qwen3", LM),
    "classes": ("llama_cls", {**LM, "task_type": "SEQ_CLS", "shadow_hidden_size": 8}),
    "no_task": ("llama", {"r": 2}),
}


def base(name: str) -> Any:
    if name != "qwen3":
        return tiny(name).double()
    import transformers as tf

    config = tf.Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=32, sliding_window=4, use_sliding_window=True,
        max_window_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Qwen3ForCausalLM(config).eval().double()


def both(case: str, folder: Path) -> tuple[Any, Any, sh.Shadow]:
    """PEFT's model with random weights, the bare one, and the value that PEFT's file holds."""
    name, fields = CASES[case]
    theirs: Any = wrap(base(name), peft.ShadowConfig(**fields))
    theirs.double()
    peft_save(theirs, folder / "theirs")
    model = base(name)
    return theirs, model, sh.load(folder / "theirs", model=model)


def labels_of(case: str) -> Tensor:
    return torch.tensor([0, 1]) if case == "classes" else IDS


def trained(wrapped: Any) -> dict[str, Tensor]:
    """PEFT's trained parameters under the keys of a checkpoint."""
    return {
        name.replace(".modules_to_save.default", ""): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("case", CASES)
def test_it_is_peft_s(case: str, tmp_path: Path) -> None:
    """Outputs, losses, gradients and files."""
    theirs, model, value = both(case, tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bare = model(**KWARGS).logits
    expected = theirs(**KWARGS).logits
    out = sh.call(model, value, kwargs=KWARGS).logits
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(out, bare)

    # the loss, with the auxiliary loss in it, and every gradient
    labelled = {**KWARGS, "labels": labels_of(case)}
    found = theirs(**labelled)
    found.loss.backward()
    loss = sh.call(model, value, kwargs=labelled).loss
    torch.testing.assert_close(loss, found.loss, rtol=1e-6, atol=1e-6)
    g = grad(lambda v: sh.call(model, v, kwargs=labelled).loss)(value)
    gradients, parameters = sh.to_tensors(g), trained(theirs)
    assert gradients.keys() == parameters.keys()
    for key, tensor in gradients.items():
        other = parameters[key].grad
        torch.testing.assert_close(tensor, torch.zeros_like(tensor) if other is None else other, rtol=1e-5, atol=1e-7)

    # the auxiliary loss by itself
    if value.config.task_type is not None:
        own = sh.auxiliary_loss(model, value, labels_of(case), kwargs=KWARGS)
        torch.testing.assert_close(own, theirs.base_model.last_shadow_loss, rtol=1e-9, atol=1e-9)
        alone = theirs.base_model.unload_shadow().eval()
        alone = alone(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(sh.detached(model, value, kwargs=KWARGS), alone, rtol=1e-9, atol=1e-9)

    # files, both ways
    sh.save(value, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(tmp_path / "theirs"))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    again: Any = peft_load(base(CASES[case][0]), tmp_path / "ours").double()
    torch.testing.assert_close(again(**KWARGS).logits, expected, rtol=1e-9, atol=1e-9)

    # the model is as it was
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "forward" not in model.__dict__
    torch.testing.assert_close(model(**KWARGS).logits, bare, rtol=0, atol=0)


def small(name: str = "llama", **fields: Any) -> tuple[Any, sh.Shadow]:
    """A model and a shadow of random numbers."""
    model = base(name)
    value = sh.shadow(model, sh.ShadowConfig(**{**LM, **fields}))
    generator = torch.Generator().manual_seed(3)
    noisy = pytree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), value)
    return model, noisy


def same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["narrow", "gpt2", "classes"])
def test_the_init_is_peft_s_seed_for_seed(case: str) -> None:
    name, fields = CASES[case]
    value = sh.shadow(tiny(name), sh.ShadowConfig(**{**fields, "modules_to_save": None}), seed=7)
    model = tiny(name)
    torch.manual_seed(7)
    theirs: Any = peft.get_peft_model(model, peft.ShadowConfig(**{**fields, "modules_to_save": None}))
    own = peft.get_peft_model_state_dict(theirs)
    same_tensors(sh.to_tensors(value), {key: t for key, t in own.items() if ".score." not in key})
    out = sh.call(tiny(name), value, kwargs=KWARGS).logits
    assert torch.equal(out, tiny(name)(**KWARGS).logits)  # it starts as the identity
    assert {t.dtype for t in pytree.tree_leaves(value)} == {torch.float32}
    half = sh.shadow(tiny(name).bfloat16(), sh.ShadowConfig(**fields))
    assert half.backbone[next(iter(half.backbone))].dtype == torch.bfloat16
    assert {t.dtype for p in half.blocks.values() for t in p.values()} == {torch.float32}
    assert sh.call(tiny(name).bfloat16(), half, kwargs=KWARGS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ensembles(name: str) -> None:
    """A stack under vmap is a loop, outputs and gradients."""
    model, one = small(name, shadow_hidden_size=8)
    members = [one, pytree.tree_map(lambda t: t * 1.1, one), pytree.tree_map(torch.neg, one)]
    stack = pytree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    labelled = {"input_ids": IDS, "labels": IDS, "use_cache": False}

    def loss(value: sh.Shadow) -> Tensor:
        return sh.call(model, value, kwargs=labelled).loss

    with fa.math_attention():  # the fused kernel on the CPU has no batching rule, and warns
        outs = vmap(lambda value: sh.call(model, value, IDS, {"use_cache": False}).logits)(stack)
    same(outs, torch.stack([sh.call(model, m, IDS, {"use_cache": False}).logits for m in members]))
    with fa.math_attention():
        found = vmap(grad(loss))(stack)
    for i, member in enumerate(members):
        mine = pytree.tree_map(lambda t, i=i: t[i], found)
        pytree.tree_map(lambda a, b: same(a, b, 1e-6), mine, grad(loss)(member))
    with pytest.raises(fa.SiteError, match=r"must have shape .* A stack of shadows is for torch.func.vmap"):
        loss(stack)
    with pytest.raises(fa.SiteError, match="must have shape"):
        sh.save(stack, "/nowhere")


def test_gradients_are_right() -> None:
    """Finite differences."""
    model, value = small("gpt2", shadow_hidden_size=8)  # whose norms are in float64, too
    leaves, spec = pytree.tree_flatten(value)
    labels = torch.randint(0, 32, IDS.shape)

    def loss(*tensors: Tensor) -> Tensor:
        again = pytree.tree_unflatten(list(tensors), spec)
        out = sh.call(model, again, kwargs={"input_ids": IDS, "use_cache": False}).logits
        return out.tanh().mean() + sh.auxiliary_loss(model, again, labels, IDS)

    inputs = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_generation_carries_both_caches(tmp_path: Path) -> None:
    theirs, model, value = both("narrow", tmp_path)
    # left padding, so that positions matter
    kwargs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK.flip(1), "pad_token_id": 0, "eos_token_id": 99}
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        settings: dict[str, Any] = {**kwargs, "max_new_tokens": 5, "do_sample": False, **options}
        expected = theirs.generate(**settings)
        with sh.applied(model, value):
            assert torch.equal(model.generate(**settings), expected)
        if "num_beams" not in options:
            plain = model.generate(**settings)
            assert not torch.equal(plain, expected)
    # token by token is all at once
    at_once = sh.call(model, value, IDS, {"use_cache": False}).logits
    first = sh.call(model, value, IDS[:, :4])
    cache = first.past_key_values
    assert type(cache).__name__ == "ShadowCache"
    assert (len(cache), cache.get_seq_length(), cache.is_compileable) == (2, 4, False)
    assert cache.__dict__["shadow"].get_seq_length() == 4
    then = sh.call(model, value, (IDS[:, 4:], None, None, cache))  # positional, too
    same(torch.cat([first.logits, then.logits], 1), at_once)
    assert then.past_key_values.get_seq_length() == 6
    then.past_key_values.crop(-1)
    assert then.past_key_values.__dict__["shadow"].get_seq_length() == 5
    # without the shadow's half
    half = then.past_key_values.__dict__["base"]
    with pytest.raises(fa.AdapterError, match="a filled DynamicCache without the shadow's own cache"):
        sh.call(model, value, IDS[:, 5:], {"past_key_values": half})


def test_arguments_may_be_positional() -> None:
    """PEFT's shadow does not see a mask that is no keyword."""
    model, value = small()
    named = sh.call(model, value, kwargs=KWARGS).logits
    same(sh.call(model, value, (IDS, MASK), {"use_cache": False}).logits, named)
    out = sh.call(model, value, kwargs={**KWARGS, "labels": IDS, "return_dict": False})
    same(out[0], sh.call(model, value, kwargs={**KWARGS, "labels": IDS}).loss)
    embedded = {**KWARGS, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(IDS)}
    same(sh.call(model, value, kwargs=embedded).logits, named)
    with pytest.raises(fa.AdapterError, match="either `input_ids` or `inputs_embeds`"):
        sh.call(model, value, kwargs={})
    with pytest.raises(fa.AdapterError, match="ran out of turn"), sh.applied(model, value):
        model.model(**KWARGS)


def test_dropout_acts_in_training_only() -> None:
    model, value = small(shadow_dropout=0.5)
    evaluated = sh.call(model, value, kwargs=KWARGS).logits
    same(sh.call(model, value, kwargs=KWARGS).logits, evaluated, 0)
    model.train()
    one = sh.call(model, value, kwargs=KWARGS).logits
    assert not torch.allclose(one, evaluated)
    assert not torch.allclose(sh.call(model, value, kwargs=KWARGS).logits, one)
    same(sh.call(model.eval(), value, kwargs=KWARGS).logits, evaluated, 0)


def test_activation_checkpoints() -> None:
    """Each block is run again from the state that it had."""
    model, value = small(shadow_dropout=0.0)
    value = pytree.tree_map(lambda t: t.requires_grad_(), value)
    labelled = {**KWARGS, "labels": IDS}
    found: list[Any] = []
    for on in (False, True):
        model.train(on)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [sh.call(model, value, kwargs={**labelled, "input_ids": ids}).loss for ids in (IDS, IDS.flip(0))]
        leaves = pytree.tree_leaves(value)
        found.append(torch.autograd.grad(sum(losses), leaves, allow_unused=True))
    for a, b in zip(*found, strict=True):
        same(a, b)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant"):
        sh.call(model, value, kwargs=labelled)


def test_with_other_adapters() -> None:
    model, value = small()
    lora = fa.init(model, fa.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    with fa.applied(model, lora):
        one = sh.call(model, value, kwargs=KWARGS).logits
    with sh.applied(model, value):
        same(fa.functional_call(model, lora, kwargs=KWARGS).logits, one)
    assert not torch.allclose(one, sh.call(model, value, kwargs=KWARGS).logits)
    # an adapter for each row
    config = fa.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    loras = [fa.init(model, config, seed=i) for i in range(2)]
    for many in (fa.grouped(fa.stack(loras)), fa.routed(fa.stack(loras), torch.tensor([0, 1]))):
        with fa.applied(model, many):
            rows = sh.call(model, value, kwargs=KWARGS).logits
        for i, lora in enumerate(loras):
            with fa.applied(model, lora):
                same(sh.call(model, value, kwargs=KWARGS).logits[i], rows[i])
        with pytest.raises(fa.AdapterError, match="cannot be applied inside a shadow"), sh.applied(model, value):
            fa.functional_call(model, many, kwargs=KWARGS)
    same(model(**KWARGS).logits, base("llama")(**KWARGS).logits, 0)


@pytest.mark.usefixtures("_frequent_switches")
def test_threads() -> None:
    model, one = small()
    values = [one, pytree.tree_map(lambda t: t * 1.2, one)]
    expected = [sh.call(model, value, kwargs=KWARGS).logits for value in values]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not torch.equal(sh.call(model, values[i], kwargs=KWARGS).logits, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_which_blocks() -> None:
    model = tiny("llama")

    def paths(**fields: Any) -> list[str]:
        return [path[-1] for path in sh.block_paths(model, sh.ShadowConfig(**fields))]

    assert paths() == ["0", "1"]
    assert paths(layers_to_transform=1) == ["1"]  # PEFT: both
    assert paths(target_modules=["0", "1"], layers_to_transform=[1], layers_pattern="layers") == ["1"]  # PEFT: none
    assert paths(exclude_modules=["layers.0"]) == ["1"]
    assert sh.shadow(model, sh.ShadowConfig(layers_to_transform=[0])).config.target_modules == ("model.layers.0",)
    for fields, message in (
        ({"target_modules": ["q_proj"]}, "'model.layers.0.self_attn.q_proj' is no member of a list"),
        ({"target_modules": ["nothing"]}, "not found in the base model. .*Lists of blocks: model.layers"),
        ({"target_modules": ["layers.0", "norm"]}, "'model.norm' is no member"),
    ):
        with pytest.raises(fa.TargetError, match=message):
            paths(**fields)
    import transformers as tf

    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32, num_hidden_layers=3, **small))
    with pytest.raises(fa.TargetError, match="contiguous blocks"):
        paths(target_modules=["layers.0", "layers.2"])
    with pytest.raises(fa.AdapterError, match="must be a multiple of 2"):
        sh.shadow(model, sh.ShadowConfig(shadow_num_attention_heads=1))
    for name, message in (("t5", "is an encoder-decoder"), ("bert", "no list of blocks called `layers` or `h`")):
        with pytest.raises(fa.TargetError, match=message):
            sh.shadow(tiny(name), sh.ShadowConfig())
    with pytest.raises(fa.TargetError, match="finds no transformer in Linear"):
        sh.shadow(torch.nn.Linear(2, 2), sh.ShadowConfig())
    flux = torch.nn.Module()
    flux.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(NotImplementedError, match="diffusion"):
        sh.shadow(flux, sh.ShadowConfig())


def test_what_is_wrong_raises(tmp_path: Path) -> None:
    for fields, message in (
        ({"target_modules": "a", "layers_to_transform": 1}, "`layers_to_transform` cannot be used"),
        ({"target_modules": "a", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
        ({"layers_pattern": "h"}, "must also be specified"),
        ({"shadow_model": "other", "shadow_hidden_size": 4}, "mirror-only overrides: shadow_hidden_size"),
        ({"r": 0}, "`r` should be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            sh.ShadowConfig(**fields)
        with pytest.raises(ValueError, match=message):  # PEFT says the same
            peft.get_peft_model(tiny("llama"), peft.ShadowConfig(**fields))
    model, value = small()
    with pytest.raises(NotImplementedError, match="backbones from checkpoints"):
        sh.shadow(model, sh.ShadowConfig(shadow_model="a/b"))
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        sh.merge(model, value)
    with pytest.raises(fa.AdapterError, match="has a loss for CAUSAL_LM and SEQ_CLS"):
        sh.auxiliary_loss(model, value.replace(config=sh.ShadowConfig(r=3)), IDS, IDS)
    other = tiny("gpt2").double()
    with pytest.raises(fa.SiteError, match=r"the shadow backbone has an unknown leaf|must have shape"):
        sh.call(other, value, IDS)
    elsewhere = value.replace(blocks={"model.layers.7": next(iter(value.blocks.values()))})
    with pytest.raises(fa.SiteError, match=r"no module 'model.layers.7'"):
        sh.call(model, elsewhere, IDS)
    path = "model.layers.0"
    wide = {**value.blocks[path], "shadow_up.weight": torch.zeros(1, 3, dtype=torch.float64)}  # would broadcast
    with pytest.raises(
        fa.SiteError, match=r"'shadow_up.weight' of 'model.layers.0' must have shape \(16, 3\), got \(1"
    ):
        sh.call(model, value.replace(blocks={**value.blocks, path: wide}), IDS)
    lacking = {name: leaf for name, leaf in value.backbone.items() if name != "norm.weight"}
    with pytest.raises(fa.SiteError, match=r"'norm.weight' of the shadow backbone must have shape .*, got none"):
        sh.call(model, value.replace(backbone=lacking), IDS)
    # files
    sh.save(value, tmp_path / "a")
    with pytest.raises(fa.AdapterFileError, match="Was it made for another model"):
        sh.load(tmp_path / "a", model=other)
    half = sh.load(tmp_path / "a", model=tiny("llama").bfloat16())
    assert {leaf.dtype for leaf in half.backbone.values()} == {torch.bfloat16}
    assert sh.call(tiny("llama").bfloat16(), half, IDS).logits.dtype == torch.bfloat16
    (tmp_path / "file").write_text("")
    with pytest.raises(fa.AdapterFileError, match="should be a directory"):
        sh.save(value, tmp_path / "file")
    fa.save(fa.init(model, fa.LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    with pytest.raises(fa.AdapterFileError, match="holds a LORA adapter, not Shadow"):
        sh.load(tmp_path / "lora")
    with pytest.raises(fa.AdapterFileError):
        fa.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(fa.AdapterFileError, match="truncated or malformed"):
        sh.load(tmp_path / "a")
    with pytest.raises(fa.SiteError, match="'x' is no key of a checkpoint"):
        sh.from_tensors({"x": torch.zeros(1)}, value.config)
    with pytest.raises(fa.SiteError, match="no shadow backbone among"):
        sh.from_tensors({k: t for k, t in sh.to_tensors(value).items() if "backbone" not in k}, value.config)


def test_it_is_a_value() -> None:
    model, value = small()
    leaves, spec = pytree.tree_flatten(value)
    assert len(leaves) == 2 * 10 + 10
    again = pytree.tree_unflatten(leaves, spec)
    assert again.config == value.config
    state = torch.random.get_rng_state()
    same(sh.call(model, again, IDS).logits, sh.call(model, value, IDS).logits, 0)
    sh.shadow(model, value.config)
    assert torch.equal(torch.random.get_rng_state(), state)
    bones = sh.skeleton(model, value.config, torch.float64)
    assert all(p.is_meta for p in bones.module.parameters())
    buffers = dict(bones.module.named_buffers())
    assert buffers
    assert all(torch.equal(b, model.model.get_buffer(name)) for name, b in buffers.items())
    assert sh.skeleton(model, value.config, torch.float64) is bones
