"""More of how code in the wild uses PEFT: parsers of arguments, compilers, offloading, hooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny
import torch
from on_code import LORA, model
from tiny import ids, llama, noise, out


def check_configs(folder: Path) -> Any:
    from peft import IA3Config, LoraConfig, PeftConfig, get_peft_config
    from transformers import HfArgumentParser

    config = LoraConfig(**LORA)
    found: dict[str, Any] = {"fields": [sorted(f.name for f in dataclasses.fields(c)) for c in (LoraConfig, IA3Config)]}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in dataclasses.asdict(config).items()}
    found["asdict"] = {key: str(value) for key, value in plain.items() if key != "runtime_config"}
    config.save_pretrained(folder)
    again = LoraConfig.from_pretrained(folder)
    found["again"] = [again == config, again.r, type(PeftConfig.from_pretrained(folder)).__name__]
    found["json"] = LoraConfig.from_json_file(folder / "adapter_config.json")["lora_alpha"]
    found["typed"] = [PeftConfig.from_peft_type(peft_type="IA3", task_type="CAUSAL_LM").peft_type.value]
    found["dict"] = get_peft_config({"peft_type": "LORA", "r": 3}).r
    config.target_modules = {"q_proj"}
    config.r += 1
    found["replaced"] = [dataclasses.replace(config, lora_alpha=5).lora_alpha, config.r, config.is_prompt_learning]

    @dataclasses.dataclass
    class Arguments:
        lora_r: int = 4
        lora_target_modules: str = "q_proj,v_proj"

    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(["--lora_r", "2"])
    made = LoraConfig(r=parsed.lora_r, target_modules=parsed.lora_target_modules.split(","))
    found["parsed"] = sorted(made.target_modules), repr(made.task_type), str(config.peft_type)
    calls = {
        "unknown": lambda: LoraConfig(rank=3),
        "both": lambda: LoraConfig(target_modules="all-linear", layers_to_transform=[0]),
        "bias": lambda: LoraConfig(lora_bias=True, init_lora_weights="pissa"),
        "task": lambda: LoraConfig(task_type="NOTHING"),
        "no folder": lambda: PeftConfig.from_pretrained(str(folder / "nothing")),
    }
    for name, call in calls.items():
        try:
            found[name] = type(call()).__name__
        except Exception as error:
            found[name] = type(error).__name__
    return found


def check_compiled(folder: Path) -> Any:
    from peft import get_peft_model_state_dict

    one = model()
    plain = out(one)
    compiled = torch.compile(one, backend="eager")
    found = {"plain": plain, "compiled": out(compiled), "keys": sorted(compiled.state_dict())}
    found["state"] = get_peft_model_state_dict(compiled, unwrap_compiled=True)
    compiled.save_pretrained(folder / "saved")
    found["saved"] = tiny.adapter(folder / "saved")
    return found


def check_offloaded(folder: Path) -> Any:
    """A base of which a layer is on the disk, behind accelerate's hooks."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(folder / "base")
    model().save_pretrained(folder / "adapter")
    found = {}
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    for place in ("cpu", "disk"):
        placed = {**parts, "model.layers.0": "cpu", "model.layers.1": place}
        base = AutoModelForCausalLM.from_pretrained(
            folder / "base", device_map=placed, offload_folder=str(folder / "weights")
        )
        one = PeftModel.from_pretrained(base, folder / "adapter", device_map=placed, offload_dir=str(folder / "off"))
        found[place] = out(one.eval()), one.generate(input_ids=ids(), max_new_tokens=3, do_sample=False)
    return found


def check_replicated(folder: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**LORA, layer_replication=[[0, 2], [1, 2]])
    one = noise(get_peft_model(llama(), config)).eval()
    one.save_pretrained(folder / "saved")
    again = PeftModel.from_pretrained(llama(), folder / "saved").eval()
    layers = one.base_model.model.model.layers
    shared = layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    return len(layers), shared, out(one), out(again), tiny.adapter(folder / "saved")


def check_encoder_decoder(folder: Path) -> Any:
    """Seq2Seq training with a frozen encoder, labels' shifting and the generation of the trainer's evaluation."""
    from peft import LoraConfig, PeftModelForSeq2SeqLM, get_peft_model
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    one = get_peft_model(tiny.t5(), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", lora_dropout=0.1))
    rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids(8)]
    fields = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "predict_with_generate": True}
    args = Seq2SeqTrainingArguments(str(folder / "run"), **fields, **quiet, dataloader_pin_memory=False)
    trainer = Seq2SeqTrainer(one, args, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    predicted = torch.tensor(trainer.predict(rows[:2], max_length=5).predictions)
    return isinstance(one, PeftModelForSeq2SeqLM), losses, predicted, sorted(tiny.trained(one))


def check_embeddings_and_heads(folder: Path) -> Any:
    """Adapters at the embedding and the head, tied and not, and resized ones that are saved."""
    from peft import LoraConfig, PeftModel, get_peft_model

    found = {}
    for tied in (False, True):
        base = llama(tie_word_embeddings=tied)
        fields = {**LORA, "target_modules": ["embed_tokens", "q_proj"]}
        one = noise(get_peft_model(base, LoraConfig(**fields)), "lora_").eval()
        one.save_pretrained(folder / f"{tied}")
        again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), folder / f"{tied}").eval()
        found[f"{tied}"] = out(one), out(again), tiny.adapter(folder / f"{tied}")
    base = llama()
    base.save_pretrained(folder / "base")
    grown = type(base).from_pretrained(folder / "base")
    grown.resize_token_embeddings(34)
    one = get_peft_model(grown, LoraConfig(**LORA))
    one.save_pretrained(folder / "grown")
    found["grown"] = sorted(tiny.adapter(folder / "grown")["tensors"])
    one.save_pretrained(folder / "without", save_embedding_layers=False)
    found["without"] = sorted(tiny.adapter(folder / "without")["tensors"])
    return found
