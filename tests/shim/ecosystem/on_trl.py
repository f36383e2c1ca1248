"""Runs of trl's trainers with `peft_config`, with whatever `peft` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from on_trainer import curve
from tiny import llama

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
FIELDS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 3,
    "dataloader_pin_memory": False,
    "max_length": 16,
    "gradient_checkpointing": False,
}


def texts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": tiny.sentences(16)})


def base(folder: Path) -> Any:
    """A model that says where it was saved, as trl has to find its tokenizer and its card the name."""
    llama().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return type(llama()).from_pretrained(folder / "base")


def card(path: Path, folder: Path) -> str:
    return path.read_text().replace(str(folder.parent), "HERE")


def check_sft(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        base(folder),
        SFTConfig(str(folder / "run"), **FIELDS, save_strategy="steps", save_steps=4),
        train_dataset=texts(),
        eval_dataset=texts(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA, lora_dropout=0.05),
    )
    trainer.train()
    trainer.save_model(str(folder / "final"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "final").eval()
    trainer.model.eval()
    return {
        "type": type(trainer.model).__name__,
        "curve": curve(trainer),
        "eval": trainer.evaluate()["eval_loss"],
        "files": tiny.names(folder),
        "final": tiny.adapter(folder / "final"),
        "out": tiny.out(loaded),
        "same": tiny.out(trainer.model),
        "card": card(folder / "final" / "README.md", folder),
    }


def check_sft_parts(folder: Path) -> Any:
    """Packing, gradient checkpointing, a head trained in full, DoRA and IA3."""
    from peft import IA3Config, LoraConfig
    from trl import SFTConfig, SFTTrainer

    head = LoraConfig(**LORA, use_dora=True, modules_to_save=["lm_head"])
    rows = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    found = {}
    for name, config in {"head": head, "ia3": rows}.items():
        changes = {"gradient_checkpointing": True, "packing": False, "save_strategy": "no"}
        trainer = SFTTrainer(
            llama(),
            SFTConfig(str(folder / name), **{**FIELDS, **changes}),
            train_dataset=texts(),
            processing_class=tiny.tokenizer(),
            peft_config=config,
        )
        trainer.train()
        trainer.save_model(str(folder / name / "final"))
        found[name] = curve(trainer), tiny.adapter(folder / name / "final")
    return found


def check_sft_of_a_peft_model(folder: Path) -> Any:
    """The model is wrapped before, in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig, SFTTrainer

    model = get_peft_model(llama().bfloat16(), LoraConfig(**LORA), autocast_adapter_dtype=False)
    args = SFTConfig(str(folder / "run"), **FIELDS, save_strategy="no", loss_type="nll")
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tiny.tokenizer())
    trainer.train()
    losses = [line["loss"] for line in curve(trainer) if "loss" in line]
    return losses, {name: str(value.dtype) for name, value in tiny.trained(trainer.model).items()}


def check_dpo(folder: Path) -> Any:
    """The reference is the base model for a new adapter, and a copy of the adapter for one that is trained further."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer

    lines = [line.split() for line in tiny.sentences(8)]
    pairs = Dataset.from_dict({
        "prompt": [" ".join(line[:4]) for line in lines],
        "chosen": [" " + " ".join(line[4:]) for line in lines],
        "rejected": [" " + " ".join(reversed(line[4:])) for line in lines],
    })  # fmt: skip
    fields = {**FIELDS, "max_steps": 3}
    found = {}
    for name in ("new", "further"):
        model, config = llama(), LoraConfig(**LORA)
        if name == "further":
            model, config = tiny.noise(get_peft_model(model, config)), None
        trainer = DPOTrainer(
            model,
            args=DPOConfig(str(folder / name), **fields, save_strategy="no"),
            train_dataset=pairs,
            processing_class=tiny.tokenizer(),
            peft_config=config,
        )
        trainer.train()
        trainer.save_model(str(folder / name / "final"))
        logs = [{k: v for k, v in line.items() if "rewards" in k or "logps" in k} for line in trainer.state.log_history]
        found[name] = {
            "curve": curve(trainer),
            "logs": logs,
            "adapters": sorted(trainer.model.peft_config),
            "files": tiny.names(folder / name),
            "saved": tiny.adapter(folder / name / "final"),
        }
    return found


def check_reward(folder: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    lines = tiny.sentences(8)
    pairs = Dataset.from_dict({"chosen": lines, "rejected": [" ".join(reversed(line.split())) for line in lines]})
    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    trainer = RewardTrainer(
        LlamaForSequenceClassification(config),
        args=RewardConfig(str(folder / "run"), **{**FIELDS, "max_steps": 3}, save_strategy="no"),
        train_dataset=pairs,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(
            **{**LORA, "task_type": TaskType.SEQ_CLS, "modules_to_save": ["score"]}, init_lora_weights="gaussian"
        ),
    )
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return curve(trainer), tiny.adapter(folder / "final"), type(trainer.model).__name__


def check_grpo(folder: Path) -> Any:
    """Generation from the policy, and a reference that is the model with its adapter switched off."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count("a") + len(text.split())) for text in completions]

    options = {"num_generations": 4, "max_completion_length": 5, "beta": 0.1, "temperature": 1.0, "max_steps": 2}
    fields = {key: value for key, value in FIELDS.items() if key != "max_length"}
    trainer = GRPOTrainer(
        base(folder),
        reward_funcs=reward,
        args=GRPOConfig(str(folder / "run"), **{**fields, **options}, save_strategy="no"),
        train_dataset=Dataset.from_dict({"prompt": tiny.sentences(8, length=4)}),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    keys = ("loss", "reward", "kl", "grad_norm", "completions/mean_length")
    logs = [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history]
    return logs, tiny.trained(trainer.model)
