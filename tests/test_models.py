"""Tiny random Hugging Face models: a call equals the merged model, per-adapter gradients run, and PEFT is no leaner."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from cases import stacked, tree_close
from oracles import Snapshot
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa

IDS = torch.tensor([[1, 5, 9, 2, 4], [7, 3, 3, 11, 6]])


def _llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=39,
            initializer_range=0.2,
        )
    )


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
        )
    )


def _bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
    )


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def _vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
        )
    )


def _convnext() -> nn.Module:
    return tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, initializer_range=0.2)
    )


def _mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            bos_token_id=None,
            eos_token_id=39,
            initializer_range=0.2,
        )
    )


TEXT: dict[str, Any] = {"input_ids": IDS}
IMAGE: dict[str, Any] = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()}
LARGE: dict[str, Any] = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "llama": (_llama, TEXT, ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]),
    "gpt2": (_gpt2, TEXT, ["c_attn", "c_fc", "wpe"]),
    "bert": (_bert, TEXT, ["query", "dense"]),
    "t5": (_t5, {**TEXT, "decoder_input_ids": IDS[:, :3]}, ["q", "v", "wi", "relative_attention_bias"]),
    "vit": (_vit, IMAGE, ["projection", "q_proj", "query", "fc1"]),
    "convnext": (_convnext, LARGE, ["patch_embeddings", "pwconv1", "pwconv2"]),
}

CONFIGS: dict[str, Callable[[list[str]], fa.AdapterConfig]] = {
    "lora": lambda targets: fa.LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
    "dora": lambda targets: fa.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=True),
    "ia3": lambda targets: fa.IA3Config(target_modules=targets, feedforward_modules=[]),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def targets_of(model: nn.Module, wanted: list[str]) -> list[str]:
    """The names that this release of transformers has."""
    present = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in wanted if name in present]


def perturbed(adapter: fa.Adapter, seed: int = 0) -> fa.Adapter:
    torch.manual_seed(10 + seed)
    return adapter.replace(params=pytree.tree_map(lambda t: t + 0.1 * torch.randn_like(t), adapter.params))


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_call_equals_the_merged_model(name: str, method: str) -> None:
    make, inputs, wanted = MODELS[name]
    model = build(make)
    adapter = perturbed(fa.init(model, CONFIGS[method](targets_of(model, wanted))))
    before = Snapshot(model)
    with torch.no_grad():
        out = fa.functional_call(model, adapter, (), inputs, strict=True)["logits"]
        before.check()
        assert (out - model(**inputs).logits).abs().max() > 1e-2
    merged = fa.merge_(copy.deepcopy(model), adapter)
    with torch.no_grad():
        expected = merged(**inputs).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_per_adapter_equal_a_loop(name: str) -> None:
    make, inputs, wanted = MODELS[name]
    model = build(make)
    config = CONFIGS["lora"](targets_of(model, wanted))
    adapters = [perturbed(fa.init(model, config, seed=seed), seed) for seed in range(2)]

    def one(adapter: fa.Adapter) -> Any:
        def loss(params: Any) -> Tensor:
            more = {"use_cache": False} if name in ("llama", "gpt2", "t5") else {}
            return (
                fa.functional_call(model, adapter.replace(params=params), (), {**inputs, **more})["logits"]
                .pow(2)
                .mean()
            )

        return grad(loss)(adapter.params)

    # the math kernel, as torch has no batching rule for the fused attention kernels on the CPU
    with fa.math_attention():
        expected = pytree.tree_map(lambda *t: torch.stack(t), *[one(a) for a in adapters])
        out = vmap(one)(stacked(adapters))
    scale = max(t.abs().max().item() for t in pytree.tree_leaves(expected))
    assert scale > 0
    tree_close(out, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_mixture_of_experts(implementation: str, use_dora: bool) -> None:
    model: Any = build(_mixtral)
    model.set_experts_implementation(implementation)
    config = fa.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        use_dora=use_dora,
        init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapter = perturbed(fa.init(model, config, expect=6))
    before = Snapshot(model)
    with torch.no_grad():
        out = fa.functional_call(model, adapter, (IDS,), strict=True).logits
        before.check()
        assert (out - model(IDS).logits).abs().max() > 1e-2
        expected = fa.merge_(copy.deepcopy(model), adapter)(IDS).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-4 * max(1.0, expected.abs().max().item()))
    leaves = adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
    fa.functional_call(model, leaves, (IDS,)).logits.pow(2).mean().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in pytree.tree_leaves(leaves.params))


# -- generate, second order, memory -----------------------------------------------------------------------


def lora(model: nn.Module, seed: int = 0, **fields: Any) -> fa.Adapter:
    config = fa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **fields)
    return fa.init(model, config, seed=seed)


def test_generate_inside_a_block(llama: Any, ids: Tensor) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    adapter, before = lora(llama), Snapshot(llama)
    plain = llama.generate(ids, attention_mask=mask, **options)
    before = Snapshot(llama)
    with fa.applied(llama, adapter):
        text = llama.generate(ids, attention_mask=mask, **options)
    before.check()
    merged: Any = fa.merge_(copy.deepcopy(llama), adapter)
    assert torch.equal(text, merged.generate(ids, attention_mask=mask, **options))
    assert not torch.equal(text, plain)


@pytest.mark.parametrize(("name", "accuracy"), [("gpt2", 1e-12), ("llama", 1e-5)])
def test_second_order_through_attention(name: str, accuracy: float) -> None:
    """Hessian-vector products: forward over reverse, and reverse over reverse. Llama's norms compute in float32."""
    model = build(MODELS[name][0]).double()
    adapter = lora(model)

    def loss(params: Any) -> Tensor:
        return (
            fa.functional_call(model, adapter.replace(params=params), (IDS,), {"use_cache": False}).logits.pow(2).mean()
        )

    v = pytree.tree_map(torch.randn_like, adapter.params)

    def slope(params: Any) -> Tensor:
        g = grad(loss)(params)
        return sum((a * b).sum() for a, b in zip(pytree.tree_leaves(g), pytree.tree_leaves(v), strict=True))  # pyright: ignore

    loss(adapter.params)
    with fa.math_attention():
        forward = jvp(grad(loss), (adapter.params,), (v,))[1]
        reverse = grad(slope)(adapter.params)
        scale = max(t.abs().max().item() for t in pytree.tree_leaves(forward))
        tree_close(forward, reverse, rtol=0, atol=accuracy * scale)
        if name == "gpt2":  # exact enough for a difference of gradients
            h = 1e-6
            up, down = (grad(loss)(pytree.tree_map(lambda p, d, s=s: p + s * d, adapter.params, v)) for s in (h, -h))
            numeric = pytree.tree_map(lambda a, b: (a - b) / (2 * h), up, down)
            tree_close(forward, numeric, rtol=0, atol=1e-6 * scale)


def test_forward_mode_without_the_math_kernel_says_what_to_do(llama: Any, ids: Tensor) -> None:
    adapter = lora(llama)
    before = Snapshot(llama)
    with pytest.raises(NotImplementedError) as error:
        jvp(
            lambda p: fa.functional_call(llama, adapter.replace(params=p), (ids,), {"use_cache": False}).logits,
            (adapter.params,),
            (adapter.params,),
        )
    assert "fa.math_attention()" in "".join([str(error.value), *getattr(error.value, "__notes__", [])])
    before.check()


def saved_bytes(run: Callable[[], Tensor], excluded: set[int]) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters and adapter leaves."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # holds the graph, so that no storage is reused
    del out
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autograd_keeps_no_more_than_peft(llama: Any, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama).train()
    adapter = lora(model, lora_dropout=dropout)
    adapter = adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).train()
    own = (*model.parameters(), *model.buffers(), *adapter.tensors(), *theirs.parameters(), *theirs.buffers())
    excluded = {t.untyped_storage().data_ptr() for t in own}

    def ours(ids: Tensor) -> Tensor:
        return fa.functional_call(model, adapter, (ids,), {"use_cache": False}).logits

    few, many = (torch.arange(2 * n).reshape(2, n) % 40 for n in (4, 64))
    ours(few)  # the engine learns in a first call what it can fuse
    kept = [saved_bytes(lambda ids=ids: ours(ids), excluded) for ids in (few, many)]
    peft_kept = [saved_bytes(lambda ids=ids: theirs(ids, use_cache=False).logits, excluded) for ids in (few, many)]
    # What grows with the tokens: the activations.
    assert 0 < kept[1] - kept[0] <= peft_kept[1] - peft_kept[0]
    # What does not: down-projections that were joined, and the scalings. At most the adapter once more.
    assert kept[0] - peft_kept[0] <= sum(t.nbytes for t in adapter.tensors())
