"""LoRA in diffusers' models and pipelines, built from tiny random configs, with whatever `peft` is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import pipeline, unet
from torch import Tensor

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@torch.no_grad()
def image(pipe: Any, **kwargs: Any) -> Tensor:
    """What a pipeline makes of fixed tokens and noise."""
    embedded = [pipe.text_encoder(tiny.ids(1, 7, seed))[0] for seed in (0, 1)]
    made = pipe(
        prompt_embeds=embedded[0],
        negative_prompt_embeds=embedded[1],
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        num_inference_steps=2,
        output_type="latent",
        **kwargs,
    )
    return made.images


def written(folder: Path, name: str, seed: int, **changes: Any) -> Path:
    """LoRA weights of the UNet and the text encoder, as a training script writes them."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline()
    fields = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", **changes}
    pipe.unet.requires_grad_(False).add_adapter(LoraConfig(**fields, target_modules=ATTENTION))
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder.add_adapter(LoraConfig(**fields, target_modules=["q_proj", "v_proj", "fc1"]))
    tiny.noise(pipe.unet, seed=seed)
    tiny.noise(pipe.text_encoder, seed=seed)
    StableDiffusionPipeline.save_lora_weights(
        folder / name,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
    )
    return folder / name


def load(path: Path) -> dict[str, Any]:
    """A file of LoRA weights, with its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in metadata.items():
        if value.startswith("{"):
            metadata[key] = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(value).items()}
    return {"tensors": found, "metadata": metadata}


def check_pipeline(folder: Path) -> Any:
    one, two = written(folder, "one", 1), written(folder, "two", 2, r=2, lora_alpha=6)
    pipe = pipeline()
    found: dict[str, Any] = {"written": load(one / "pytorch_lora_weights.safetensors"), "base": image(pipe)}
    pipe.load_lora_weights(one, adapter_name="one")
    found["one"] = image(pipe)
    found["scaled"] = image(pipe, cross_attention_kwargs={"scale": 0.4})
    pipe.load_lora_weights(two, adapter_name="two")
    found["lists"] = [pipe.get_active_adapters(), pipe.get_list_adapters()]
    found["two"] = image(pipe)
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    found["both"], found["active"] = image(pipe), pipe.get_active_adapters()
    weights = {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_0": 0.4}}}
    pipe.set_adapters("one", weights)
    found["blocks"] = image(pipe)
    pipe.disable_lora()
    found["disabled"] = image(pipe)
    pipe.enable_lora()
    found["enabled"] = image(pipe)
    pipe.delete_adapters("one")
    found["deleted"], found["left"] = image(pipe), pipe.get_list_adapters()
    pipe.unload_lora_weights()
    found["unloaded"] = image(pipe)
    found["keys"] = sorted(pipe.unet.state_dict())
    pipe.load_lora_weights(one)
    found["again"], found["name"] = image(pipe), pipe.get_active_adapters()
    return found


def check_fuse(folder: Path) -> Any:
    one, two = written(folder, "one", 1), written(folder, "two", 2, r=2)
    pipe = pipeline()
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    found: dict[str, Any] = {}
    pipe.set_adapters(["one", "two"], [0.8, 1.5])
    found["before"] = image(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    found["fused"], found["count"] = image(pipe), pipe.num_fused_loras
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    found["unfused"] = image(pipe)
    pipe.set_adapters("two")
    pipe.fuse_lora(components=["unet"], lora_scale=0.6, safe_fusing=True, adapter_names=["two"])
    found["scaled"] = image(pipe)
    pipe.unload_lora_weights()
    found["kept"] = image(pipe)
    found["keys"] = sorted(pipe.unet.state_dict())
    return found


def check_text_encoder_fuse_of_one(folder: Path) -> Any:
    one = written(folder, "one", 1)
    pipe = pipeline()
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.fuse_lora(lora_scale=0.5)
    fused = image(pipe)
    pipe.unfuse_lora()
    pipe.set_lora_device(["one"], "cpu")
    return fused, image(pipe)


def check_hotswap(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    for name, r in (("one", 4), ("two", 2)):
        model = unet()
        model.add_adapter(LoraConfig(r=r, lora_alpha=3 * r, target_modules=ATTENTION))
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(tiny.noise(model, seed=r)))
        StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=layers)
    found = {}
    for target in (None, 6):
        pipe = pipeline()
        if target:
            pipe.enable_lora_hotswap(target_rank=target)
        pipe.load_lora_weights(folder / ("one" if target else "two"), adapter_name="a")
        found[f"{target} first"] = image(pipe)
        pipe.load_lora_weights(folder / "two", adapter_name="a", hotswap=True)
        found[f"{target} second"] = image(pipe)
    return found


def check_training(folder: Path) -> Any:
    """The loop of a training script: an adapter on the UNet with dropout and DoRA, saved with its config."""
    from peft import LoraConfig

    found = {}
    for name, changes in {"lora": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}.items():
        model = unet().requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=[*ATTENTION, "conv1", "proj_in"], **changes), "mine")
        model.train()
        model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            x, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
            loss = (model(x, torch.tensor([1, 7]), context).sample - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.save_lora_adapter(folder / name, adapter_name="mine")
        again = unet()
        again.load_lora_adapter(folder / name / "pytorch_lora_weights.safetensors", prefix=None, adapter_name="x")
        with torch.no_grad():
            y = again(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 16)).sample
        saved = load(folder / name / "pytorch_lora_weights.safetensors")
        found[name] = (
            losses,
            saved,
            y,
            again.active_adapters(),
            model.eval()(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 16)).sample,
        )
    return found


def check_training_script(folder: Path) -> Any:
    """What diffusers' own scripts do to save, and to go on from what they saved."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _set_state_dict_into_text_encoder, cast_training_params
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    state, _ = StableDiffusionPipeline.lora_state_dict(written(folder, "one", 1))
    pipe = pipeline()
    pipe.unet.requires_grad_(False).half().add_adapter(LoraConfig(r=4, target_modules=ATTENTION))
    pipe.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"]))
    cast_training_params(pipe.unet, dtype=torch.float32)
    own = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    result = set_peft_model_state_dict(pipe.unet, convert_unet_state_dict_to_peft(own), adapter_name="default")
    _set_state_dict_into_text_encoder(state, prefix="text_encoder.", text_encoder=pipe.text_encoder)
    return {
        "unexpected": result.unexpected_keys,
        "trained": tiny.trained(pipe.unet),
        "unet": get_peft_model_state_dict(pipe.unet),
        "text": get_peft_model_state_dict(pipe.text_encoder),
    }


def check_flux(folder: Path) -> Any:
    """A transformer of Flux: metadata, patterns of ranks and alphas, safe fusing, the methods of the model alone."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    def model() -> Any:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        ).eval()

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return model(
            hidden_states=torch.randn(1, 4, 4, generator=draw),
            encoder_hidden_states=torch.randn(1, 3, 16, generator=draw),
            pooled_projections=torch.randn(1, 16, generator=draw),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample

    first = model()
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 9}, "use_rslora": True}
    first.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "proj_mlp"], **patterns), "one")
    tiny.noise(first)
    first.save_lora_adapter(folder / "one", adapter_name="one")
    file = folder / "one" / "pytorch_lora_weights.safetensors"
    found = {"one": run(first), "saved": load(file)}
    second = model()
    for name in ("a", "b"):
        second.load_lora_adapter(file, prefix=None, adapter_name=name, low_cpu_mem_usage=name == "b")
    second.set_adapters(["a", "b"], [0.5, 0.25])
    found["loaded"] = run(second)
    found["config"] = {k: sorted(v) if isinstance(v, set) else v for k, v in second.peft_config["a"].to_dict().items()}
    second.fuse_lora(safe_fusing=True, adapter_names=["a"])
    found["fused"] = run(second)
    second.unfuse_lora()
    second.delete_adapters(["a"])
    found["deleted"] = run(second)
    second.unload_lora()
    found["unloaded"], found["attributes"] = run(second), hasattr(second, "peft_config")
    narrow = model().bfloat16()
    narrow.load_lora_adapter(file, prefix=None, adapter_name="a")
    found["dtypes"] = {str(p.dtype) for p in narrow.parameters()}
    cast = model()
    cast.load_lora_adapter(file, prefix=None, adapter_name="a")
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found["stored"] = sorted({f"{n.split('.')[-2]} {p.dtype}" for n, p in cast.named_parameters()})
    found["layerwise"] = run(cast)
    return found


def check_errors(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model_state_dict

    model = unet()
    model.add_adapter(LoraConfig(r=2, target_modules=ATTENTION), "one")
    weights = get_peft_model_state_dict(model, adapter_name="one")
    strange = {
        **weights,
        "no.such.layer.lora_A.weight": torch.ones(2, 2),
        "no.such.layer.lora_B.weight": torch.ones(2, 2),
    }
    wrong = {key: value[..., :-1].clone() for key, value in weights.items()}
    calls = {
        "twice": lambda m: m.add_adapter(LoraConfig(target_modules=ATTENTION), "one"),
        "no config": lambda m: m.add_adapter({"r": 2}, "two"),
        "unknown": lambda m: m.set_adapters("three"),
        "wrong shapes": lambda m: m.load_lora_adapter(dict(wrong), prefix=None, adapter_name="four"),
        "strange": lambda m: m.load_lora_adapter(dict(strange), prefix=None, adapter_name="five"),
        "hotswap": lambda m: m.load_lora_adapter(dict(weights), prefix=None, adapter_name="six", hotswap=True),
        "ranks": lambda m: m.enable_lora_hotswap(target_rank=4),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            found[name] = str(call(model))
        except Exception as error:
            found[name] = type(error).__name__
        found[f"{name} after"] = sorted(model.peft_config)
    return found
