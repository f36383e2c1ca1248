"""How code in the wild uses PEFT: training scripts, forks of models, tools that walk over modules."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import ids, llama, noise, out

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def model() -> Any:
    from peft import LoraConfig, get_peft_model

    return noise(get_peft_model(llama(), LoraConfig(**LORA, bias="none"))).eval()


def check_alpaca_lora(folder: Path) -> Any:
    """tloen/alpaca-lora's finetune.py: a replaced `state_dict`, resuming from tensors that torch has saved."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    one = model()
    old_state_dict = one.state_dict
    one.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old_state_dict())).__get__(one, type(one))
    found: dict[str, Any] = {"state": dict(one.state_dict())}
    one.save_pretrained(folder / "out")
    found["saved"] = tiny.adapter(folder / "out")
    torch.save(one.state_dict(), folder / "adapter_model.bin")
    weights = torch.load(folder / "adapter_model.bin")
    two = model()
    found["set"] = str(set_peft_model_state_dict(two, weights).unexpected_keys)
    found["out"], found["count"] = out(two), two.get_nb_trainable_parameters()
    return found


def check_qlora(folder: Path) -> Any:
    """artidoro/qlora's qlora.py: types of layers, casts by name, and counting."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.lora import LoraLayer

    base = prepare_model_for_kbit_training(llama(), use_gradient_checkpointing=False)
    one = get_peft_model(base, LoraConfig(**LORA, lora_dropout=0.05))
    for name, module in one.named_modules():
        if isinstance(module, LoraLayer):
            module = module.to(torch.bfloat16)
        if "norm" in name:
            module = module.to(torch.float32)
        if ("lm_head" in name or "embed_tokens" in name) and hasattr(module, "weight"):
            module = module.to(torch.bfloat16)
    dtypes: dict[str, int] = {}
    for p in one.parameters():
        dtypes[str(p.dtype)] = dtypes.get(str(p.dtype), 0) + p.numel()
    one.save_pretrained(folder / "adapter_model")
    two = PeftModel.from_pretrained(llama(), folder / "adapter_model", is_trainable=True)
    layers = [name for name, module in one.named_modules() if isinstance(module, LoraLayer)]
    return dtypes, layers, sorted(tiny.trained(two)), tiny.adapter(folder / "adapter_model")


def check_llama_factory(folder: Path) -> Any:
    """LLaMA-Factory's adapter.py: merging some adapters, resuming the last, with the hub's keywords."""
    from peft import LoraConfig, LoraModel, PeftModel, TaskType, get_peft_model

    model().save_pretrained(folder / "one")
    noise(model(), seed=3).save_pretrained(folder / "two")
    kwargs = {"subfolder": None, "offload_folder": str(folder), "cache_dir": None, "revision": "main", "token": None}
    base: Any = llama()
    for adapter in (folder / "one",):
        wrapped: LoraModel = PeftModel.from_pretrained(base, adapter, **kwargs)
        base = wrapped.merge_and_unload()
    resumed = PeftModel.from_pretrained(base, folder / "two", is_trainable=True, **kwargs)
    found = {"out": out(resumed), "trained": sorted(tiny.trained(resumed))}
    options = {"r": 2, "modules_to_save": ["embed_tokens"], "use_rslora": True, "use_dora": True}
    fresh = get_peft_model(llama(), LoraConfig(**{**LORA, "task_type": TaskType.CAUSAL_LM, **options}))
    for param in filter(lambda p: p.requires_grad, fresh.parameters()):
        param.data = param.data.to(torch.float32)
    return {**found, "fresh": out(fresh), "names": sorted(tiny.trained(fresh))}


def check_walking(folder: Path) -> Any:
    """Tools that read and write the parts of layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    one = model()
    layer = one.base_model.model.model.layers[0].self_attn.q_proj
    found: dict[str, Any] = {
        "shapes": [layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape, layer.weight.shape],
        "sizes": [layer.in_features, layer.out_features, layer.r, layer.lora_alpha, layer.scaling],
        "kind": [type(layer).__name__, type(layer.base_layer).__name__, isinstance(layer, torch.nn.Linear)],
        "delta": layer.get_delta_weight("default"),
        "active": [layer.active_adapter, layer.active_adapters, layer.merged, layer.disable_adapters],
        "contains": ["default" in layer.lora_A, list(layer.lora_A.keys())],
        "config": [one.config.hidden_size, one.peft_type, one.active_adapter, one.base_model.prefix],
        "device": [str(one.device), str(one.dtype)],
    }
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
        layer.scaling["default"] = 0.5
    found["changed"] = out(one)
    for module in one.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(0.5)
    found["scaled"] = out(one)
    for module in one.modules():
        if isinstance(module, BaseTunerLayer):
            module.unscale_layer()
    found["unscaled"] = out(one)
    hooked: list[str] = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: hooked.append("A"))
    handles = [handle, layer.register_forward_hook(lambda *_: hooked.append("layer"))]
    out(one)
    for each in handles:
        each.remove()
    found["layer hook"] = "layer" in hooked
    found["by name"] = {n: p.norm().item() for n, p in one.named_parameters() if "lora_" in n}
    return found


def check_copies(folder: Path) -> Any:
    one = model()
    two = copy.deepcopy(one)
    three = pickle.loads(pickle.dumps(one))
    buffer = io.BytesIO()
    torch.save(one, buffer)
    buffer.seek(0)
    four = torch.load(buffer, weights_only=False)
    noise(one, "lora_A", seed=7)
    found: dict[str, Any] = {"other": out(one), "copies": [out(m) for m in (two, three, four)]}
    two.load_state_dict(one.state_dict())
    found["loaded"] = out(two)
    found["merged"], found["kept"] = out(copy.deepcopy(one).merge_and_unload()), out(one)
    three.bfloat16()
    found["cast"] = sorted({str(p.dtype) for p in three.parameters()})
    found["config"] = pickle.loads(pickle.dumps(one.peft_config["default"])).to_dict()["r"]
    return found


def check_vision(folder: Path) -> Any:
    """The guide on image classification: ViT, its patches a convolution, a new head saved whole."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    def vit() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))

    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "query", "value", "projection"], lora_dropout=0.1,
        bias="lora_only", modules_to_save=["classifier"],
    )  # fmt: skip
    one = get_peft_model(vit(), config)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(one.parameters(), lr=5e-3)
    losses = []
    for _ in range(3):
        loss = one(pixel_values=images, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    one.save_pretrained(folder / "vit")
    two = PeftModel.from_pretrained(vit(), folder / "vit").eval()
    return losses, tiny.adapter(folder / "vit"), two(pixel_values=images).logits, sorted(tiny.trained(one))


def check_speech(folder: Path) -> Any:
    """A layer that multiplies with the kernel's weight itself, and asks whether there is a LoRA on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer

    config = Wav2Vec2Config(tdnn_dim=(6, 6), tdnn_kernel=(3, 3), tdnn_dilation=(1, 1))
    parent = torch.nn.Module()
    parent.layer = TDNNLayer(config, 1)
    one = get_peft_model(parent, LoraConfig(r=2, target_modules=["kernel"]))
    return sorted(tiny.tensors(one)), one.base_model.model.layer(torch.ones(2, 5, 6)).shape


def check_generation(folder: Path) -> Any:
    """Rows with adapters of their own, caches, prepared inputs, assisted and streamed generation."""
    from peft import LoraConfig
    from transformers import GenerationConfig

    one = model()
    one.add_adapter("other", LoraConfig(**{**LORA, "r": 2}))
    noise(one, ".other.")
    found: dict[str, Any] = {}
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0)
    found["mixed"] = one.generate(input_ids=ids(), generation_config=settings, adapter_names=["other", "__base__"])
    one.set_adapter("other")
    found["other"] = one.generate(inputs=ids(), generation_config=settings)
    found["scores"] = one.generate(
        input_ids=ids(), generation_config=settings, return_dict_in_generate=True, output_scores=True
    ).scores[-1]
    found["embeds"] = one(inputs_embeds=one.get_input_embeddings()(ids())).logits
    found["assisted"] = one.generate(input_ids=ids(1), generation_config=settings, assistant_model=llama())
    one.merge_adapter()
    found["merged"] = one.generate(input_ids=ids(), generation_config=settings)
    one.unmerge_adapter()
    with one.disable_adapter(), torch.inference_mode():
        found["base"] = one.generate(input_ids=ids(), generation_config=settings)
    return found
