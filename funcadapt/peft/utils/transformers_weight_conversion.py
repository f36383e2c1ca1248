"""LoRA checkpoints from before transformers 5, in the names and shapes of its present models.

Transformers converts the weights of a base model when it loads them: modules were renamed, experts stacked, some
weights fused. The same has to happen to an adapter's. See also `moe_targets`, for its config.

Differs from PEFT:

* An adapter that has the fused weights of experts and not "down_proj" is loaded. PEFT looks for the names that it has
  if both are adapted, finds none, and the adapter has no effect.
* DoRA's magnitudes are loaded by transformers' `load_adapter`. PEFT leaves them at their initial values.
* A key that has the name of a method's part in an earlier place ("my_lora_block.lora_A.weight") is renamed right.
* A key that fits the model as it is stays as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from funcadapt.peft.utils.moe_targets import convert_peft_config_for_transformers, may_target
from funcadapt.targeting import model_type

__all__ = [
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]

_PREFIX = "base_model.model."


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Transformers' conversions for the keys of an adapter, from those for the base model.

    Keys lose PEFT's prefix and get the adapter's name; what renames modules of the base model applies to them, too; and
    the factors of LoRA for experts are stacked and fused like the experts.

    Args:
        weight_conversions: the `WeightRenaming` and `WeightConverter` of the base model.
        adapter_name: the adapter's name.
        peft_config: its config; without one, the parts of all methods are renamed.

    Returns:
        The list; empty if there are no conversions.
    """
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [
        WeightRenaming(r"^base_model\.model\.", ""),
        *_namings(adapter_name, peft_config),
        *(
            converted
            for conversion in weight_conversions
            for converted in (
                [conversion]
                if isinstance(conversion, WeightRenaming)
                else _of_experts(conversion, adapter_name, peft_config)
            )
        ),
    ]


def _namings(adapter_name: str, peft_config: Any) -> list[Any]:
    """Renamings that put the adapter's name behind a part's: behind the last one, if the path has several."""
    from transformers.core_model_loading import WeightRenaming

    from funcadapt.peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    peft_type = getattr(peft_config, "peft_type", None)
    known: Any = PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes: list[str] = [known[peft_type]] if peft_type in known else sorted(set(known.values()))
    renamings: list[Any] = []
    for prefix in prefixes:
        start = rf"(?<![^.]){re.escape(prefix)}"
        renamings.append(WeightRenaming(rf"({start}[^.]*)(?!.*\.{re.escape(prefix)})", rf"\1.{adapter_name}"))
    if "lora_" in prefixes:  # the file has the vector itself, the model a module with it
        vector = f"lora_magnitude_vector.{adapter_name}"
        renamings.append(WeightRenaming(rf"{re.escape(vector)}$", f"{vector}.weight"))
    return renamings


def _of_experts(conversion: Any, adapter_name: str, peft_config: Any) -> list[Any]:
    """The conversions of A and B, if a conversion stacks the weights of experts and at most concatenates them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    from funcadapt.peft.utils.expert_operations import StackFactors

    kinds: list[Any] = [(type(operation), getattr(operation, "dim", None)) for operation in conversion.operations]
    is_stack = kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    target = conversion.target_patterns[0]
    end = target.rpartition(".")[2]
    if not is_stack or end not in ("gate_up_proj", "down_proj"):
        return []
    # The layer of the second parameter is around that of the first.
    container = target.removesuffix(f".{end}")
    inner = end == "gate_up_proj" and may_target(peft_config, ("down_proj", "w2"))
    place = f"{container}.base_layer" if inner else container
    sources = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
    return [
        conversion.copy(
            [rf"{source}.{factor}.{re.escape(adapter_name)}.weight" for source in sources],
            [f"{place}.{factor}.{adapter_name}.weight"],
            operations=[StackFactors(factor)],
        )
        for factor in ("lora_A", "lora_B")
    ]


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """A LoRA checkpoint in the names and shapes of a model of transformers 5, into which its config was injected.

    Args:
        model: the model, with the adapter in it, or a `PeftModel`.
        peft_config: the adapter's config.
        adapter_state_dict: the checkpoint.
        adapter_name: the adapter's name in the model.

    Returns:
        The checkpoint; the same dict if there is nothing to convert. Keys that fit nothing are in it unchanged.
    """
    if peft_config.peft_type != "LORA" or (kind := model_type(model)) is None:
        return adapter_state_dict
    own = {
        _file_key(name, adapter_name)
        for name in (*dict(model.named_parameters()), *dict(model.named_buffers()))
        if ".lora_" in name and adapter_name in name.split(".")
    }
    strange = [k for k in adapter_state_dict if ".lora_" in k and _file_key(k) not in own]
    if not strange or not _is_converted(kind):
        return adapter_state_dict
    converted = _converted(model, {k: adapter_state_dict[k] for k in strange}, adapter_name, peft_config, own)
    return {k: v for k, v in adapter_state_dict.items() if k not in converted.used} | converted.tensors


def _file_key(name: str, adapter_name: str | None = None) -> str:
    """The key that a parameter of LoRA has in a file, without PEFT's prefix."""
    name = name.removeprefix(_PREFIX)
    if adapter_name is not None:
        name = re.sub(rf"(.*\.lora_[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", name)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _is_converted(kind: str) -> bool:
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers before 5
        return False
    return conversion_mapping.get_checkpoint_conversion_mapping(kind) is not None  # pyright: ignore


class _Converted:
    """What was made of keys.

    Attributes:
        tensors: the new keys and values.
        used: the old keys.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.used: set[str] = set()


def _converted(
    model: Any, tensors: Mapping[str, Tensor], adapter_name: str, peft_config: Any, own: set[str]
) -> _Converted:
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    loading: Any = core_model_loading
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(base), adapter_name, peft_config)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result = _Converted()
    pending: dict[str, tuple[Any, str]] = {}
    for key in sorted(tensors, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(key, renamings, converters)
        place = _fitting(_file_key(renamed, adapter_name), own)
        if place is None:
            continue
        result.used.add(key)
        target = (_PREFIX if key.startswith(_PREFIX) else "") + place
        if pattern is None:
            result.tensors[target] = tensors[key]
            continue
        converter, _ = pending.setdefault(target, (copy.deepcopy(by_pattern[pattern]), renamed))
        converter.add_tensor(renamed, key, pattern, tensors[key])
    for target, (converter, renamed) in pending.items():
        (result.tensors[target],) = converter.convert(renamed, model=base, config=base.config).values()
    return result


def _fitting(key: str, own: set[str]) -> str | None:
    """The key, or the same for the only layer where it says the inner of two, if the model has that."""
    flat = key.replace(".base_layer.lora_", ".lora_")
    return next((name for name in (key, flat) if name in own), None)
