"""A real model, SmolLM2-135M-Instruct, trained by transformers' Trainer and generating, with whatever `peft` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from on_trainer import arguments, curve

from funcadapt.recipes import pretrained

TEXTS = [
    "Adapters add a few numbers to a model that stays as it is.",
    "The base weights are frozen, and the update has a small rank.",
    "A merged adapter costs nothing at inference time.",
    "Several adapters can be combined, or switched for every row of a batch.",
]
PROMPT = "A low-rank adapter is"


def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pretrained.smollm2(), dtype=torch.float32)


def check_smollm2(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer

    tokenizer = AutoTokenizer.from_pretrained(pretrained.smollm2())
    tokenizer.pad_token = tokenizer.eos_token
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    rows = [tokenizer(text, truncation=True, max_length=24) for text in TEXTS]
    trainer = Trainer(
        model,
        arguments(folder, per_device_train_batch_size=2, max_steps=10, learning_rate=3e-4),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model(folder / "final")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32).eval()
    with torch.inference_mode():
        found = {
            "curve": [line["loss"] for line in curve(trainer) if "loss" in line],
            "files": tiny.names(folder / "final"),
            "text": tokenizer.decode(model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)[0]),
            "loaded": loaded.generate(**prompt, max_new_tokens=12, do_sample=False),
            "beams": loaded.generate(**prompt, max_new_tokens=6, num_beams=2, do_sample=False),
            "logits": loaded(**prompt).logits[0, -1],
        }
    found["merged"] = loaded.merge_and_unload()(**prompt).logits[0, -1].detach()
    return found
