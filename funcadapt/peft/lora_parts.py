"""What `LoraConfig` has in PEFT beside plain fields: nested configs, and adjustments that warn.

The nested classes are data. Whether a part is implemented is decided where the funcadapt config is built, which raises
NotImplementedError if it is not.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Literal


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


@dataclass
class LoraRuntimeConfig:
    """Settings that are not saved with an adapter.

    Attributes:
        ephemeral_gpu_offload: without effect here; PEFT moves DoRA's weights to the GPU for its norm with it.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """Bits and iterations of the LoftQ init."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class VeloraConfig:
    """VeLoRA: groups, scale and init of the compressed activations."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        _require(self.num_groups > 0, f"`num_groups` should be positive, got {self.num_groups}.")
        _require(self.scale > 0, f"`scale` should be positive, got {self.scale}.")
        known = ("batch_average_once", "batch_average", "random")
        _require(self.init_type in known, f"Unsupported `init_type` {self.init_type!r}. It is one of {known}.")


@dataclass
class ArrowConfig:
    """Arrow: routing among task adapters."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = dataclasses.field(default=None, init=False)
    gks_adapter_names: list[str] | None = dataclasses.field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.top_k > 0, "top_k cannot be negative.")
        _require(self.router_temperature > 0, "router_temperature must be greater than 0.")


@dataclass
class BdLoraConfig:
    """BD-LoRA: which modules have a block-diagonal A or B."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        a, b = self.target_modules_bd_a or [], self.target_modules_bd_b or []
        _require(not set(a) & set(b), f"Found overlapping modules in target_modules_bd lists: {a} (A) and {b} (B).")


@dataclass
class EvaConfig:
    """The EVA init."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _require(self.rho >= 1.0, "`rho` must be >= 1.0")
        _require(0.0 <= self.tau <= 1.0, "`tau` must be between 0.0 and 1.0.")


@dataclass
class KasaConfig:
    """KaSA: the weights of its two penalties."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        _require(self.beta >= 0, f"`beta` must be non-negative, got {self.beta}.")
        _require(self.gamma >= 0, f"`gamma` must be non-negative, got {self.gamma}.")


@dataclass
class CordaConfig:
    """The CorDA init."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """The LoRA-GA init."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class MontecloraConfig:
    """MonteCLoRA: sampling of the weights."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _require(getattr(self, name) > 0, f"`{name}` must be greater than 0.")


# field of LoraConfig -> the class of its value
NESTED: dict[str, type[Any]] = {
    "velora_config": VeloraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
    "monteclora_config": MontecloraConfig,
}
CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in (LoraRuntimeConfig, LoftQConfig, *NESTED.values())}


def nested(value: Any, cls: type[Any]) -> Any:
    """A nested config from what a file or a caller has: None, an instance, or a dict.

    Args:
        value: the value.
        cls: the class that it is to be of.

    Returns:
        None or an instance of the class.

    Raises:
        TypeError: if the value is something else.
    """
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, dict):
        values: dict[str, Any] = {str(k): v for k, v in value.items()}  # pyright: ignore
        known: dict[str, bool] = {f.name: f.init for f in dataclasses.fields(cls)}
        made = cls(**{k: v for k, v in values.items() if known.get(k)})
        for k, v in values.items():
            if known.get(k) is False:
                setattr(made, k, v)  # PEFT drops it: the names of a router's experts
        return made
    raise TypeError(f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None, got {value!r}.")


def adjust_lora(config: Any) -> None:
    """Fill in and clear LoRA's fields that depend on each other, as PEFT does on construction.

    Args:
        config: the config; it is changed.

    Raises:
        ValueError: if the init is LoftQ without a `loftq_config`.
    """
    for name, cls in NESTED.items():
        setattr(config, name, nested(getattr(config, name), cls))
    config._custom_modules = None
    how = config.init_lora_weights
    if how == "loftq":
        if not config.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if not isinstance(config.loftq_config, dict):
            config.loftq_config = vars(config.loftq_config)
    elif config.loftq_config:
        config.loftq_config = {}
        _warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
    for kind, field, title in (("eva", "eva_config", "EVA"), ("corda", "corda_config", "CorDA")):
        given = getattr(config, field)
        if how == kind and given is None:
            _warn(f"`init_lora_weights` is {kind!r} but `{field}` is not specified. Using default {title} config.")
            setattr(config, field, NESTED[field]())
        elif how != kind and given is not None:
            _warn(f"`{field}` specified but will be ignored when `init_lora_weights` is not {kind!r}.")
    if getattr(config.runtime_config, "ephemeral_gpu_offload", False):
        _warn("`ephemeral_gpu_offload` has no effect in funcadapt.")
    if config.alora_invocation_tokens is not None and config.task_type != "CAUSAL_LM":
        _warn("aLoRA is currently only supported for CAUSAL_LM task.")
    changes_base = isinstance(how, str) and (how.startswith("pissa") or how in ("olora", "corda", "lora_ga"))
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern) and changes_base:
        _warn(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified base "
            "weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
            "`path_initial_model_for_weight_conversion` to `save_pretrained` to restore the initial values of the base "
            "weights; if you intend to do this, please ensure not to use rslora or rank_pattern/alpha_pattern."
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
