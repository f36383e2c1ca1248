"""What PEFT's README and guides show, as people write it; only the import line would differ."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import ids, llama, mlp, noise, out


def printed(call: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        call()
    return text.getvalue()


def steps(model: Any, count: int = 3, after: Any = None) -> list[float]:
    """A few steps of AdamW on the language model's loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(count):
        rows = ids(seed=step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_quicktour(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

    llama().save_pretrained(folder / "base")
    base = type(llama()).from_pretrained(folder / "base")
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(base, config)
    found: dict[str, Any] = {"print": printed(model.print_trainable_parameters), "losses": steps(model.train())}
    found["repr"] = repr(model)
    model.save_pretrained(folder / "out")
    found["files"], found["saved"] = tiny.names(folder / "out"), tiny.adapter(folder / "out")
    found["config"] = str(PeftConfig.from_pretrained(folder / "out").peft_type)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "out").eval()
    found["generated"] = loaded.generate(input_ids=ids(), max_new_tokens=5, do_sample=False)
    by_hand = PeftModel.from_pretrained(llama(), folder / "out", adapter_name="mine").eval()
    found["out"], found["modes"] = out(by_hand), [by_hand.active_adapter, by_hand.training]
    found["again"] = out(PeftModel.from_pretrained(llama(), folder / "out", is_trainable=True).eval())
    found["nobit"] = out(PeftModel.from_pretrained(llama(), folder / "out", low_cpu_mem_usage=True).eval())
    return found


def check_ia3(folder: Path) -> Any:
    from peft import IA3Config, PeftModel, TaskType, get_peft_model

    config = IA3Config(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    model = get_peft_model(tiny.t5(), config)
    found: dict[str, Any] = {"print": printed(model.print_trainable_parameters)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for step in range(3):
        loss = model(input_ids=ids(seed=step), labels=ids(seed=step + 1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = loss
    model.save_pretrained(folder / "ia3")
    found["saved"] = tiny.adapter(folder / "ia3")
    default = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM"))
    found["default"], found["targets"] = out(noise(default)), sorted(default.peft_config["default"].target_modules)
    loaded = PeftModel.from_pretrained(tiny.t5(), folder / "ia3").eval()
    found["generated"] = loaded.generate(input_ids=ids(), max_new_tokens=4)
    merged = loaded.merge_and_unload(safe_merge=True)
    found["merged"] = merged(input_ids=ids(), labels=ids(seed=1)).loss
    return found


def check_adalora(folder: Path) -> Any:
    from peft import AdaLoraConfig, PeftModel, get_peft_model

    config = AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], init_r=6, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=8,
        lora_alpha=16, task_type="CAUSAL_LM", orth_reg_weight=0.3,
    )  # fmt: skip
    model = get_peft_model(llama(), config).train()
    found: dict[str, Any] = {"print": printed(model.print_trainable_parameters)}
    found["losses"] = steps(model, 8, model.base_model.update_and_allocate)
    pattern = model.peft_config["default"].rank_pattern
    found["pattern"] = {key.removesuffix(".default"): kept for key, kept in pattern.items()}  # saving drops the suffix
    model.eval().save_pretrained(folder / "adalora")
    found["out"], found["saved"] = out(model), tiny.adapter(folder / "adalora")
    found["loaded"] = out(PeftModel.from_pretrained(llama(), folder / "adalora"))
    found["merged"] = out(model.merge_and_unload())
    return found


def check_merging_and_switching(folder: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    for name in ("one", "two"):
        noise(model, f".{name}.")
    model.save_pretrained(folder / "both")
    found: dict[str, Any] = {"files": tiny.names(folder)}
    model.eval()
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name], found[f"{name} trained"] = out(model), sorted(tiny.trained(model))
    with model.disable_adapter():
        found["base"] = out(model)
    found["mixed rows"] = out(model, adapter_names=["one", "__base__"])
    model.merge_adapter()
    found["merged"] = out(model)
    model.unmerge_adapter()
    found["unmerged"] = out(model)
    model.base_model.set_adapter(["one", "two"])
    found["together"], found["active"] = out(model), model.active_adapters
    found["status"] = printed(lambda: print(model.get_model_status(), len(model.get_layer_status())))
    model.delete_adapter("one")
    found["left"] = [list(model.peft_config), model.active_adapters]
    loaded = PeftModel.from_pretrained(llama(), folder / "both" / "one", adapter_name="one")
    found["load"] = str(loaded.load_adapter(folder / "both" / "two", adapter_name="two"))
    loaded.set_adapter("two")
    found["loaded"] = out(loaded)
    found["merged and unloaded"] = out(loaded.merge_and_unload(progressbar=False, adapter_names=["one", "two"]))
    found["unloaded"] = out(model.unload())
    return found


def check_weighted_adapters(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("three", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name in ("one", "two", "three"):
        noise(model, f".{name}.")
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "linear": {},
        "cat": {},
        "svd": {"svd_rank": 3},
        "ties": {"density": 0.5},
        "dare_linear": {"density": 0.5},
        "dare_ties": {"density": 0.5, "majority_sign_method": "frequency"},
        "magnitude_prune": {"density": 0.6},
        "ties_svd": {"density": 0.5},
        "magnitude_prune_svd": {"density": 0.5},
    }
    for kind, options in kinds.items():
        torch.manual_seed(1)
        names = ["one", "three"] if kind in ("cat", "svd") else ["one", "two"]
        model.add_weighted_adapter(names, [0.7, 0.4], kind, combination_type=kind, **options)
        model.set_adapter(kind)
        found[kind] = out(model)
    found["adapters"] = sorted(model.peft_config)
    found["ranks"] = {name: config.r for name, config in model.peft_config.items()}
    return found


def check_mixed_models(folder: Path) -> Any:
    from peft import AdaLoraConfig, LoraConfig, PeftMixedModel, get_peft_model

    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["seq.0"]), "one", mixed=True)
    model.add_adapter("two", AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["seq.0", "seq.3"]))
    for name in ("one", "two"):
        noise(model, f".{name}")
    model.set_adapter(["one", "two"])
    x = torch.linspace(-1, 1, 40).reshape(2, 20)
    found: dict[str, Any] = {"is": isinstance(model, PeftMixedModel), "both": model(x), "active": model.active_adapters}
    model.set_adapter("two")
    found["two"] = model(x)
    with model.disable_adapter():
        found["off"] = model(x)
    model.set_adapter(["one", "two"])
    found["merged"] = model.merge_and_unload()(x)
    return found


def check_inject(folder: Path) -> Any:
    """The low-level API on a module that nobody wraps."""
    from peft import (
        LoraConfig,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from safetensors.torch import save_file

    class Dummy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 10)
            self.linear = torch.nn.Linear(10, 10)
            self.lm_head = torch.nn.Linear(10, 10)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.linear(self.embedding(input_ids)))

    def made() -> Dummy:
        torch.manual_seed(0)
        return Dummy()

    config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=8, bias="none", target_modules=["linear", "embedding"])
    model = inject_adapter_in_model(config, made())
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    found: dict[str, Any] = {"train": model(rows), "repr": repr(model), "type": type(model).__name__}
    noise(model, "lora_").eval()
    weights = get_peft_model_state_dict(model)
    save_file(weights, folder / "adapter_model.safetensors")
    found["out"], found["weights"] = model(rows), weights
    other = inject_adapter_in_model(config, made(), low_cpu_mem_usage=True).eval()
    found["meta"] = sorted(name for name, p in other.named_parameters() if p.is_meta)
    result = set_peft_model_state_dict(other, load_peft_weights(str(folder)), low_cpu_mem_usage=True)
    found["set"], found["unexpected"] = other(rows), result.unexpected_keys
    third = LoraConfig(r=8, lora_alpha=16, target_modules=["linear", "embedding"])
    third = inject_adapter_in_model(third, made(), state_dict=weights).eval()
    set_peft_model_state_dict(third, weights)
    found["from keys"] = third(rows)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), third, adapter_name="two")
    found["several"], found["keys"] = third(rows), sorted(third.state_dict())
    return found


def check_custom_models(folder: Path) -> Any:
    """The guide on custom models: an MLP, and convolutions and norms as in timm's models, with a trained head."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, target_modules=["seq.0", "conv"], modules_to_save=["seq.5", "seq.2"])
    model = get_peft_model(mlp(), config)
    found: dict[str, Any] = {"print": printed(model.print_trainable_parameters), "names": sorted(tiny.tensors(model))}
    x = torch.linspace(-1, 1, 100).reshape(5, 20)
    y = torch.tensor([0, 1, 1, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        loss = torch.nn.functional.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = loss
    base = mlp()
    found["untouched"] = [(a == b).all() for a, b in zip(mlp().parameters(), base.parameters(), strict=True)]
    model.save_pretrained(folder / "mlp")
    found["saved"] = tiny.adapter(folder / "mlp")
    found["loaded"] = PeftModel.from_pretrained(mlp(), folder / "mlp")(x)
    found["merged"] = model.merge_and_unload()(x)
    found["regex"] = sorted(get_peft_model(mlp(), LoraConfig(target_modules=r".*seq\.[035]$")).targeted_module_names)
    found["all"] = sorted(get_peft_model(mlp(), LoraConfig(target_modules="all-linear")).targeted_module_names)
    return found


def check_new_tokens(folder: Path) -> Any:
    """New tokens: trained rows, or the whole embedding after a resize, with a tied head and without."""
    from peft import LoraConfig, PeftModel, get_peft_model

    found = {}
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for tied in (False, True):
        base = llama(tie_word_embeddings=tied)
        base.resize_token_embeddings(36)
        weights = {key: value.clone() for key, value in base.state_dict().items()}
        model = get_peft_model(base, LoraConfig(**fields, trainable_token_indices=[32, 33]))
        losses = steps(model)
        model.save_pretrained(folder / f"rows {tied}")
        again = llama(tie_word_embeddings=tied)
        again.resize_token_embeddings(36)
        again.load_state_dict(weights)
        loaded = PeftModel.from_pretrained(again, folder / f"rows {tied}").eval()
        found[f"rows {tied}"] = {
            "losses": losses,
            "saved": tiny.adapter(folder / f"rows {tied}"),
            "loaded": out(loaded),
            "print": printed(model.print_trainable_parameters),
            "merged": out(loaded.merge_and_unload()),
        }
    whole = get_peft_model(llama(), LoraConfig(**fields, modules_to_save=["embed_tokens", "lm_head"]))
    found["whole"] = steps(whole), sorted(tiny.trained(whole))
    whole.save_pretrained(folder / "whole")
    found["saved"] = tiny.adapter(folder / "whole")
    return found
