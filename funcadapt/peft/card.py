"""The model card of an adapter: README.md, with PEFT's fields."""

from __future__ import annotations

import os
from typing import Any

from funcadapt.peft.config import PEFT_VERSION
from funcadapt.peft.tuner import BaseTuner

_PROCEDURE, _VERSIONS = "## Training procedure", "### Framework versions"
_QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"


def write_model_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the README.md of a folder, or complete the one that is there. Without huggingface_hub there is none.

    Args:
        model: the `PeftModel`.
        folder: the folder.
    """
    try:
        import huggingface_hub
    except ImportError:  # the adapter's own files do not need it
        return
    hub: Any = huggingface_hub
    path = os.path.join(folder, "README.md")
    card = hub.ModelCard.load(path) if os.path.exists(path) else hub.ModelCard.from_template(hub.ModelCardData())
    card.data["library_name"] = "peft"
    if tags := _tags(model):
        card.data["tags"] = tags
    if not card.data.pipeline_tag and any(c.__name__ == "PeftModelForCausalLM" for c in type(model).__mro__):
        card.data.pipeline_tag = "text-generation"
    config: dict[str, Any] = BaseTuner.get_model_config(model) or {}
    if "_name_or_path" in config:
        card.data["base_model"] = config["_name_or_path"]
    lines: list[str] = card.text.splitlines()
    quantization: Any = config.get("quantization_config")
    if quantization is not None and _QUANTIZED not in lines:
        values: dict[str, Any] = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
        text = "\n".join(["", _QUANTIZED, *(f"- {name}: {value}" for name, value in values.items()), ""])
        _under(lines, _PROCEDURE, text, "")
    if f"- PEFT {PEFT_VERSION}" not in lines:
        _under(lines, _VERSIONS, f"- PEFT {PEFT_VERSION}", "\n")
    card.text = "\n".join(lines)
    card.save(path)


def _under(lines: list[str], heading: str, text: str, gap: str) -> None:
    if heading in lines:
        lines.insert(lines.index(heading) + 2, text)
    else:
        lines.append(f"{heading}\n{gap}{text}")


def _tags(model: Any) -> list[str]:
    base = model.get_base_model()
    tags: set[str] = set(getattr(base, "model_tags", None) or ())
    if any(c.__name__ == "PreTrainedModel" for c in type(base).__mro__):
        tags.add("transformers")
    if any(config.peft_type == "LORA" for config in model.peft_config.values()):
        tags.add("lora")
    if hasattr(model.base_model, "name_or_path"):
        tags.add(f"base_model:adapter:{model.base_model.name_or_path}")
    return sorted(tags)
