"""Runs of transformers' Trainer and of accelerate's loops on a PeftModel, with whatever `peft` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import ids, llama
from torch import Tensor

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tokens that are their own labels."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        self.rows = ids(count, 8, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder / "run"), **{**fields, **changes})


def trainer(folder: Path, model: Any, **changes: Any) -> Any:
    from transformers import Trainer

    return Trainer(model, arguments(folder, **changes), train_dataset=Rows(), eval_dataset=Rows(6, seed=9))


def curve(runner: Any) -> list[dict[str, float]]:
    """What was logged, without how long it took."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "step")
    return [{key: line[key] for key in keys if key in line} for line in runner.state.log_history]


def lora(**changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(**{**LORA, **changes}))


def _ddp(folder: str) -> None:
    """What each of two processes does: some steps on its half of the rows."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).tolist())
    bare = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        bare.save_pretrained(folder)
        torch.save((type(model).__name__, losses), Path(folder) / "losses.pt")


def check_two_processes(folder: Path) -> Any:
    from accelerate import debug_launcher

    debug_launcher(_ddp, (str(folder),), num_processes=2)
    return torch.load(folder / "losses.pt"), tiny.adapter(folder)


def check_run(folder: Path) -> Any:
    runner = trainer(
        folder, lora(lora_dropout=0.1), eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=6
    )
    result = runner.train()
    runner.save_model(folder / "final")
    found = {"curve": curve(runner), "loss": result.training_loss, "eval": runner.evaluate()["eval_loss"]}
    found["predicted"] = torch.tensor(runner.predict(Rows(4, seed=5)).predictions)
    found["files"] = tiny.names(folder)
    found["final"] = tiny.adapter(folder / "final")
    found["checkpoint"] = tiny.adapter(folder / "run" / "checkpoint-6")
    found["labels"] = runner.label_names
    found["card"] = (folder / "final" / "README.md").read_text()
    runner.create_model_card(model_name="m", tags=["t"])
    return {**found, "made card": (folder / "run" / "README.md").read_text()}


def check_gradient_checkpointing(folder: Path) -> Any:
    found = {}
    for reentrant in (False, True):
        model = lora(lora_dropout=0.1)
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        runner = trainer(folder, model, max_steps=3, **kwargs)
        runner.train()
        found[str(reentrant)] = {"curve": curve(runner), "trained": tiny.trained(model)}
    return found


def check_resume(folder: Path) -> Any:
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer(folder, lora(), **changes)
    whole.train()
    found = {"whole": curve(whole)}
    for checkpoint in (True, str(folder / "run" / "checkpoint-2")):
        model = lora(init_lora_weights="gaussian")
        resumed = trainer(folder, model, **changes)
        resumed.train(resume_from_checkpoint=checkpoint)
        found[Path(str(checkpoint)).name] = {"curve": curve(resumed), "trained": tiny.trained(model)}
    return found


def check_best_model(folder: Path) -> Any:
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    model = lora(r=8)
    runner = trainer(
        folder, model, **changes, learning_rate=0.5, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        save_total_limit=2,
    )  # fmt: skip
    runner.train()
    return {
        "curve": curve(runner),
        "trained": tiny.trained(model),
        "best": Path(runner.state.best_model_checkpoint).name,
        "files": tiny.names(folder),
        "loss": runner.evaluate()["eval_loss"],
    }


def check_several_adapters(folder: Path) -> Any:
    """An active adapter that is not the default one is saved below the checkpoint, and found there again."""
    from peft import LoraConfig

    def made() -> Any:
        model = lora()
        model.add_adapter("other", LoraConfig(**{**LORA, "r": 2}))
        model.set_adapter("other")
        return model

    model = made()
    runner = trainer(folder, model, save_strategy="steps", save_steps=2, max_steps=4)
    runner.train()
    again = made()
    resumed = trainer(folder, again, save_strategy="no", max_steps=4)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    return {"curves": [curve(runner), curve(resumed)], "files": tiny.names(folder), "trained": tiny.trained(again)}


def check_parts(folder: Path) -> Any:
    """Whole modules, some tokens, biases, DoRA and bfloat16 bases train and are saved as PEFT does it."""
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        "tokens": {"trainable_token_indices": [3, 4, 5], "target_modules": ["q_proj"]},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        "rslora": {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1],
        },
    }
    for name, changes in variants.items():
        model = lora(**changes)
        runner = trainer(folder / name, model, max_steps=3)
        runner.train()
        runner.save_model(folder / name / "final")
        found[name] = {"curve": curve(runner), "final": tiny.adapter(folder / name / "final")}
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama().bfloat16(), LoraConfig(**LORA))
    runner = trainer(folder / "narrow", model, max_steps=3, bf16=True)
    runner.train()
    found["narrow"] = {"curve": curve(runner), "trained": tiny.trained(model)}
    return found


def check_injected(folder: Path) -> Any:
    """A plain transformers model with an adapter added in place trains and saves only the adapter."""
    from peft import LoraConfig

    model = llama()
    model.add_adapter(LoraConfig(**LORA))
    runner = trainer(folder, model, save_strategy="steps", save_steps=3, max_steps=3)
    runner.train()
    return curve(runner), tiny.names(folder), tiny.adapter(folder / "run" / "checkpoint-3")


def check_mixed(folder: Path) -> Any:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True, adapter_name="one")
    model.add_adapter("two", AdaLoraConfig(target_modules=["v_proj", "q_proj"], init_r=3, target_r=2, total_step=9))
    model.set_adapter(["one", "two"])
    runner = trainer(folder, model, max_steps=3)
    runner.train()
    return {"curve": curve(runner), "trained": tiny.trained(model)}


def check_adalora(folder: Path) -> Any:
    """The callback of PEFT's documentation, which calls `update_and_allocate` before the gradients go."""
    from peft import AdaLoraConfig, PeftModel, get_peft_model
    from transformers import TrainerCallback

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    fields = {"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
    config = AdaLoraConfig(**fields, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    runner = trainer(folder, get_peft_model(llama(), config))
    runner.add_callback(Allocate())
    runner.train()
    runner.save_model(folder / "final")
    again = tiny.out(PeftModel.from_pretrained(llama(), folder / "final"))
    return curve(runner), tiny.adapter(folder / "final"), again


def check_optimizers(folder: Path) -> Any:
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from transformers import Trainer

    found = {}
    for name in ("plus", "fa"):
        model = lora()
        if name == "plus":
            made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)
        else:
            made = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
        args = arguments(folder / name, max_steps=3, neftune_noise_alpha=5)
        runner = Trainer(model, args, train_dataset=Rows(), optimizers=(made, None))
        runner.train()
        found[name] = curve(runner), tiny.trained(model)
    return found


def check_accelerate(folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import extract_model_from_parallel, is_peft_model
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(Rows(), batch_size=4))
    losses: list[float] = []

    def epoch() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())

    epoch()
    accelerator.save_state(str(folder / "state"))
    epoch()
    accelerator.load_state(str(folder / "state"))
    epoch()
    bare = accelerator.unwrap_model(model)
    bare.save_pretrained(folder / "saved", state_dict=accelerator.get_state_dict(model), save_function=accelerator.save)
    only = _get_model_state_dict(model, adapter_only=True)
    fresh = lora(init_lora_weights=False)
    result = _set_model_state_dict(fresh, only, adapter_only=True)
    return {
        "losses": losses,
        "is": [is_peft_model(model), is_peft_model(bare), is_peft_model(bare.get_base_model())],
        "same": extract_model_from_parallel(model) is bare,
        "only": only,
        "unexpected": result.unexpected_keys,
        "fresh": tiny.trained(fresh),
        "files": [name for name in tiny.names(folder) if "random_states" not in name],
        "saved": tiny.adapter(folder / "saved"),
    }
