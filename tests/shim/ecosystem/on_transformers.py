"""What transformers' own adapter methods, AutoPeft classes and pipelines do, with whatever `peft` is."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import bert, ids, llama, noise, out, tensors

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
HEAD = {**LORA, "r": 2, "modules_to_save": ["lm_head"]}


def prepared(folder: Path, *kinds: str) -> list[Path]:
    """The adapters of some kinds that the test has written with both packages."""
    return sorted(path for path in (folder.parents[1] / "adapters").iterdir() if path.name.endswith(kinds))


def state(model: Any) -> dict[str, Any]:
    """What transformers says about the adapters of a model."""
    return {
        "out": out(model),
        "active": model.active_adapters(),
        "configs": sorted(model.peft_config),
        "trained": sorted(name for name, p in model.named_parameters() if p.requires_grad),
        "training": model.training,
    }


def check_load_adapter(folder: Path) -> Any:
    found = {}
    for path in prepared(folder, "lora", "head", "tokens"):
        for trainable in (False, True):
            model = llama()
            info = model.load_adapter(str(path), adapter_name="one", is_trainable=trainable)
            keys = {"missing": sorted(info.missing_keys), "unexpected": sorted(info.unexpected_keys)}
            found[f"{path.name} {trainable}"] = {**state(model), **keys, "tensors": tensors(model)}
    return found


def defect_dora_through_load_adapter(folder: Path) -> Any:
    """With PEFT's table of names, transformers does not find the magnitudes, and leaves them as they were drawn."""
    from peft import PeftModel

    found: dict[str, Any] = {"got": {}, "truth": {}}
    for path in prepared(folder, "dora"):
        model = llama()
        info = model.load_adapter(str(path))
        found["got"][path.name] = out(model), sorted(info.missing_keys)
        found["truth"][path.name] = out(PeftModel.from_pretrained(llama(), path)), []
    return found


def check_several_loaded(folder: Path) -> Any:
    first, second = prepared(folder, "lora")
    model = llama()
    model.load_adapter(str(first))
    model.load_adapter(str(second), adapter_name="second")
    found = {"loaded": state(model)}
    for names in ("second", ["default", "second"], "default"):
        model.set_adapter(names)
        found[str(names)] = state(model)
    model.disable_adapters()
    found["disabled"] = out(model)
    model.enable_adapters()
    found["enabled"] = out(model)
    model.delete_adapter("default")
    found["deleted"] = state(model)
    model.delete_adapter("second")
    found["none"] = {"out": out(model), "has": hasattr(model, "peft_config")}
    model.load_adapter(str(first))
    found["again"] = state(model)
    return found


def check_errors(folder: Path) -> Any:
    from peft import LoraConfig

    path = prepared(folder, "lora")[0]
    model = llama()
    model.add_adapter(LoraConfig(**LORA), adapter_name="one")
    calls = {
        "twice": lambda: model.add_adapter(LoraConfig(**LORA), adapter_name="one"),
        "load twice": lambda: model.load_adapter(str(path), adapter_name="one"),
        "no config": lambda: model.add_adapter({"r": 2}, adapter_name="two"),
        "unknown": lambda: model.set_adapter("three"),
        "delete": lambda: model.delete_adapter("three"),
        "no targets": lambda: model.add_adapter(LoraConfig(target_modules=["nothing"]), adapter_name="four"),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = type(error).__mro__[-4].__name__ if name == "no targets" else type(error).__name__
    return found, out(model)


def check_add_adapter(folder: Path) -> Any:
    from peft import IA3Config, LoraConfig

    model = llama()
    model.add_adapter(LoraConfig(**HEAD), adapter_name="one")
    found = {"one": state(model)}
    model.add_adapter(LoraConfig(**{**HEAD, "r": 3}), adapter_name="two")
    found["two"] = state(model)
    noise(model, "two")
    model.set_adapter("one")
    model.set_adapter("two")
    found["noise"] = state(model)
    model.set_adapter("one")
    found["set one"] = state(model)
    found["state"] = model.get_adapter_state_dict("two")
    model.set_adapter("two")
    model.save_pretrained(folder / "two")
    found["files"] = tiny.names(folder)
    found["saved"] = tiny.adapter(folder / "two")
    other = llama()
    other.load_adapter(str(folder / "two"))
    found["loaded"] = out(other)
    plain = llama()
    plain.add_adapter(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    found["ia3"] = state(noise(plain))
    return found


def check_training_through_add_adapter(folder: Path) -> Any:
    from peft import LoraConfig

    model = llama().requires_grad_(False)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, lora_dropout=0.2, target_modules="all-linear", use_rslora=True))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        loss = model(input_ids=ids(seed=step), labels=ids(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, tiny.trained(model)


def check_from_pretrained(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    found = {}
    for path in prepared(folder, "lora", "head", "tokens"):
        model = AutoModelForCausalLM.from_pretrained(path)
        config = PeftConfig.from_pretrained(str(path))
        found[path.name] = {
            "auto": state(model),
            "config": type(config).__name__,
            "auto peft": out(AutoPeftModelForCausalLM.from_pretrained(path)),
            "trainable": sorted(
                tiny.trained(AutoPeftModelForCausalLM.from_pretrained(path, adapter_name="x", is_trainable=True))
            ),
            "by hand": out(PeftModel.from_pretrained(llama(), path)),
            "dtype": str(AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).dtype),
            "resaved": None,
        }
        model.save_pretrained(folder / path.name)
        found[path.name]["resaved"] = tiny.adapter(folder / path.name)
    return found


def check_hotswap(folder: Path) -> Any:
    first, second = prepared(folder, "lora")
    model = llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(first))
    before = out(model)
    model.load_adapter(str(second), adapter_name="default", hotswap=True)
    return before, out(model)


def check_pipeline(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import pipeline

    model = noise(get_peft_model(llama(), LoraConfig(**LORA, task_type="CAUSAL_LM"))).eval()
    pipe = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer())
    texts = ["a b c", "k"]
    found = {"greedy": pipe(texts, max_new_tokens=6, do_sample=False)}
    found["beams"] = pipe(texts, max_new_tokens=6, num_beams=3, do_sample=False, num_return_sequences=2)
    torch.manual_seed(1)
    found["sampled"] = pipe(texts, max_new_tokens=6, do_sample=True, top_k=5)
    found["ids"] = model.generate(ids(), max_new_tokens=5, num_beams=2, do_sample=False)
    found["keyword"] = model.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, use_cache=False)
    with model.disable_adapter():
        found["disabled"] = model.generate(input_ids=ids(), max_new_tokens=5, do_sample=False)
    for path in prepared(folder, "head", "tokens"):
        loaded = pipeline("text-generation", model=str(path), tokenizer=tiny.tokenizer())
        found[path.name] = loaded(texts, max_new_tokens=6, do_sample=False)
    merged = model.merge_and_unload()
    found["merged"] = pipeline("text-generation", model=merged, tokenizer=tiny.tokenizer())(
        texts, max_new_tokens=6, do_sample=False
    )
    return found


def check_bert(folder: Path) -> Any:
    from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, TaskType, get_peft_model

    base = bert()
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.FEATURE_EXTRACTION)
    loaded = type(base).from_pretrained(folder / "base")
    model = noise(get_peft_model(loaded, config)).eval()
    mask = torch.ones_like(ids())
    mask[0, 4:] = 0

    def embed(model: Any) -> torch.Tensor:
        hidden = model(input_ids=ids(), attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    model.save_pretrained(folder / "adapter")
    found = {"type": type(model).__name__, "embed": embed(model), "saved": tiny.adapter(folder / "adapter")}
    found["auto"] = embed(AutoPeftModelForFeatureExtraction.from_pretrained(folder / "adapter").eval())
    found["loaded"] = embed(PeftModel.from_pretrained(bert(), folder / "adapter").eval())
    found["merged"] = embed(PeftModel.from_pretrained(bert(), folder / "adapter").eval().merge_and_unload())
    found["card"] = (folder / "adapter" / "README.md").read_text().replace(str(folder), "")
    return found


def check_tasks(folder: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    found = {}
    kinds = {
        "SEQ_CLS": ("BertForSequenceClassification", torch.tensor([0, 1])),
        "TOKEN_CLS": ("BertForTokenClassification", ids() % 2),
        "QUESTION_ANS": ("BertForQuestionAnswering", None),
    }
    for task, (kind, labels) in kinds.items():
        model = get_peft_model(bert(kind), LoraConfig(r=2, target_modules=["query"], task_type=task))
        noise(model).eval()
        span = {"start_positions": ids()[:, 0] % 6, "end_positions": ids()[:, 1] % 6}
        kwargs = span if labels is None else {"labels": labels}
        loss = model(input_ids=ids(), **kwargs).loss
        loss.backward()
        model.save_pretrained(folder / task)
        again = PeftModel.from_pretrained(bert(kind), folder / task)
        found[task] = {
            "type": type(model).__name__,
            "loss": loss,
            "trained": tiny.trained(model),
            "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            "saved": tiny.adapter(folder / task),
            "again": again(input_ids=ids(), **kwargs).loss,
        }
    seq2seq = get_peft_model(tiny.t5(), LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    noise(seq2seq).eval()
    found["t5"] = seq2seq(input_ids=ids(), labels=ids(seed=1)).loss
    found["t5 generate"] = seq2seq.generate(input_ids=ids(), max_new_tokens=5, num_beams=2)
    del seq2seq
    gc.collect()
    return found
