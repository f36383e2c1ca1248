"""LN tuning: copies of modules, usually norms, are trained in full.

    y = module(x), with its parameters replaced by the adapter's

Leaves: the module's own parameters under their own names (`weight`, `bias`), and its buffers. Init: copies: the
identity. Cost: as many parameters as the modules have, and nothing in a call. Dense form: the leaves themselves.
The targets may be modules of any kind; they are no sites, and there is nothing to hook.

Source: Zhao et al. 2023, arXiv:2312.11420. Differs from PEFT: several adapters may act in a call, each replaces what
the ones before it have put there (weighted, if they have weights), and adapters can be grouped and routed row by row.
The in-place model is as PEFT's: one adapter acts, and takes the module's place while it is merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site

_BLOCK = ("input_layernorm", "post_attention_layernorm")
TARGETS: targets.Targets = {
    **dict.fromkeys(("llama", "mistral", "gemma"), (*_BLOCK, "norm")),
    **dict.fromkeys(("bloom", "falcon"), (*_BLOCK, "ln_f")),
    "llava": ("multi_modal_projector", *_BLOCK, "norm", "embed_tokens", "lm_head"),
    **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
    "gptj": ("ln_1", "ln_f"),
    "phi": ("input_layernorm", "final_layernorm"),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), (*_BLOCK, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")
    ),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """Config of LN tuning, with PEFT's fields.

    Attributes:
        target_modules: names or a regular expression, or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: other modules that are trained in full and saved with the adapter.
    """

    peft_type: str = "LN_TUNING"
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | str | None = None

    target_table: ClassVar[targets.Targets] = TARGETS


def init(site: Site, config: LNTuningConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """There are no sites."""
    raise SiteError(f"LN tuning trains modules in full, and has no site at {site.path!r}.")


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """There are no sites."""
    return weight, bias


METHOD = register(
    Method(
        name="ln_tuning",
        config=LNTuningConfig,
        kinds=frozenset(),
        keys={},
        whole="ln_tuning_layers",
        init=init,
        weight=weight,
        view=View("ln_tuning", "LNTuning", "ln_tuning_", label="ln_tuning."),
    )
)
