"""More of how people use PEFT: parsers of arguments, compilers, offloading, initialisations, helpers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny
import torch
from on_code import LORA, model
from on_snippets import steps
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


def check_traced(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    one = noise(get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["seq.0", "conv"]))).eval()
    rows, other = torch.randn(3, 20), torch.linspace(-1, 1, 60).reshape(3, 20)
    with torch.no_grad():
        traced = torch.jit.trace(one, rows)
    return one(other), traced(other), torch.export.export(one, (rows,)).module()(other)


def check_sharded(folder: Path) -> Any:
    """FSDP2, and what accelerate saves and loads of it."""
    import torch.distributed as dist
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one = model()
    layers = one.base_model.model.model.layers
    query = layers[0].self_attn.q_proj
    policy = fsdp_auto_wrap_policy(one)
    parts = (query, query.lora_A["default"], query.base_layer, layers[0])
    found: dict[str, Any] = {"wrapped": [policy(module=p, recurse=False, nonwrapped_numel=0) for p in parts]}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(folder / "store"), 1))
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*layers, one):
            fully_shard(module, mesh=mesh)
        found["losses"] = steps(one)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        own = _get_model_state_dict(one, adapter_only=True, sd_options=options)
        one.save_pretrained(folder / "saved", state_dict=_get_model_state_dict(one, sd_options=options))
        halves = {key: value / 2 for key, value in own.items()}
        _set_model_state_dict(one, halves, adapter_only=True, sd_options=options)
        return {**found, "own": own, "saved": tiny.adapter(folder / "saved"), "halves": out(one)}
    finally:
        dist.destroy_process_group()


def defect_offloaded(folder: Path) -> Any:
    """A base of which a layer is on the disk, behind accelerate's hooks. PEFT removes them, and fails without a GPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(folder / "base")
    model().save_pretrained(folder / "adapter")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placed = {**parts, "model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", device_map=placed, offload_folder=folder / "weights")
    rows = {"input_ids": ids(), "max_new_tokens": 3, "do_sample": False}
    plain = PeftModel.from_pretrained(llama(), folder / "adapter").eval()
    truth = [out(plain), plain.generate(**rows)]
    try:
        one = PeftModel.from_pretrained(base, folder / "adapter", offload_folder=str(folder / "off")).eval()
        return {"truth": truth, "got": [out(one), one.generate(**rows)]}
    except NotImplementedError:
        return {"truth": truth, "got": []}


def check_encoder_decoder(folder: Path) -> Any:
    """Seq2Seq training with a frozen encoder, labels' shifting and the generation of the trainer's evaluation."""
    from peft import LoraConfig, PeftModelForSeq2SeqLM, get_peft_model
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    one = get_peft_model(tiny.t5(), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", lora_dropout=0.1))
    rows = [{"input_ids": row, "labels": row.flip(0)} for row in ids(8)]
    fields = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "predict_with_generate": True,
    }
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


def check_initialisations(folder: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    found = {}
    x = {"pissa": "pissa", "olora": "olora", "gaussian": "gaussian", "orthogonal": "orthogonal", "off": False}
    for name, how in x.items():
        torch.manual_seed(0)
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=how))
        found[name] = out(model), steps(model)
        if name in ("pissa", "olora"):
            model.peft_config["default"].init_lora_weights = True
            torch.manual_seed(0)
            again = get_peft_model(
                llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=how)
            )
            again.save_pretrained(folder / f"{name} start")
            model.peft_config["default"].init_lora_weights = how
            model.save_pretrained(folder / name, path_initial_model_for_weight_conversion=folder / f"{name} start")
            converted = tiny.adapter(folder / name)
            found[f"{name} config"] = {
                key: converted["config"][key] for key in ("r", "lora_alpha", "init_lora_weights")
            }
            found[f"{name} converted"] = out(PeftModel.from_pretrained(llama(), folder / name).eval())
            found[f"{name} trained"] = out(model.eval())
    return found


def check_helpers(folder: Path) -> Any:
    from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model, prepare_model_for_kbit_training
    from peft.helpers import check_if_peft_model, rescale_adapter_scale
    from peft.optimizers import create_loraplus_optimizer
    from peft.utils import infer_device

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    noise(model)
    found: dict[str, Any] = {"out": out(model)}
    with rescale_adapter_scale(model, 0.5):
        found["half"] = out(model)
    model.save_pretrained(folder / "saved")
    found["is"] = [check_if_peft_model(str(folder / "saved")), infer_device()]
    status = get_model_status(model)
    found["status"] = [status.total_params, status.trainable_params, status.active_adapters, status.requires_grad]
    found["layers"] = [layer.name for layer in get_layer_status(model)]
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=16)
    found["groups"] = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    prepared = prepare_model_for_kbit_training(llama().half(), use_gradient_checkpointing=True)
    found["prepared"] = sorted({str(p.dtype) for p in prepared.parameters()})
    return found
