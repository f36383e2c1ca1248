"""What PEFT 0.21.2 has and funcadapt does not (yet): names that can be imported and say so when they are used."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn


class OutOfScopeError(NotImplementedError, ValueError):
    """Something of PEFT that funcadapt does not do, by design.

    A ValueError as well, because that is what PEFT raises where it refuses prompt learning.
    """


class Row(NamedTuple):
    """One method of PEFT.

    Attributes:
        peft_type: the member of `PeftType`.
        package: the package under `peft.tuners`.
        config: the name of the config class.
        model: the name of the tuner.
        layer: the name of the class of its layers; None for prompt learning, which has no layers.
        base: the config class that the config derives from.
        prefix: what the names of its parts begin with.
    """

    peft_type: str
    package: str
    config: str
    model: str
    layer: str | None
    base: str
    prefix: str


# package and name; the classes are <name>Config, <name>Model, <name>Layer
_INJECTED = {
    "lora": "Lora",
    "adalora": "AdaLora",
    "adamss": "Adamss",
    "beft": "Beft",
    "boft": "BOFT",
    "c3a": "C3A",
    "deft": "Deft",
    "delora": "Delora",
    "fourierft": "FourierFT",
    "frod": "Frod",
    "glora": "Glora",
    "gralora": "Gralora",
    "hira": "Hira",
    "hra": "HRA",
    "ia3": "IA3",
    "lily": "Lily",
    "ln_tuning": "LNTuning",
    "loha": "LoHa",
    "lokr": "LoKr",
    "miss": "Miss",
    "oft": "OFT",
    "osf": "OSF",
    "peanut": "Peanut",
    "poly": "Poly",
    "psoft": "Psoft",
    "pvera": "Pvera",
    "randlora": "RandLora",
    "road": "Road",
    "shadow": "Shadow",
    "shira": "Shira",
    "supertuning": "Supertuning",
    "tinylora": "TinyLora",
    "trainable_tokens": "TrainableTokens",
    "unilora": "UniLora",
    "vblora": "VBLoRA",
    "vera": "Vera",
    "waveft": "WaveFT",
    "xlora": "XLora",
}
_PREFIXES = {"adalora": "lora_", "loha": "hada_", "pvera": "pvera_lambda_", "vera": "vera_lambda_"}
_PROMPTS = (
    ("prompt_tuning", "PromptTuningConfig", "PromptEmbedding", "PromptLearningConfig"),
    ("multitask_prompt_tuning", "MultitaskPromptTuningConfig", "MultitaskPromptEmbedding", "PromptTuningConfig"),
    ("p_tuning", "PromptEncoderConfig", "PromptEncoder", "PromptLearningConfig"),
    ("prefix_tuning", "PrefixTuningConfig", "PrefixEncoder", "PromptLearningConfig"),
    ("cpt", "CPTConfig", "CPTEmbedding", "PromptLearningConfig"),
    ("cartridge", "CartridgeConfig", "CartridgeEncoder", "PromptLearningConfig"),
    ("adaption_prompt", "AdaptionPromptConfig", "AdaptionPromptModel", "PeftConfig"),
)

ROWS: tuple[Row, ...] = (
    *(
        Row(package.upper(), package, f"{name}Config", f"{name}Model", f"{name}Layer", "PeftConfig", prefix)
        for package, name in _INJECTED.items()
        for prefix in (_PREFIXES.get(package, f"{package}_"),)
    ),
    *(
        Row(package.upper(), package, config, model, None, base, f"{package}_")
        for package, config, model, base in _PROMPTS
    ),
)

# functions and layer classes that have no counterpart here, by package
_OTHERS: dict[str, tuple[str, ...]] = {
    "cartridge": (
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "adaption_prompt": ("AdaptedAttention",),
    "lokr": ("factorization",),
    "lora": ("GPTQLoraLinear",),
    "adalora": ("RankAllocator", "SVDConv2d", "SVDLinear", "SVDQuantLinear"),
    "shadow": ("ShadowCache", "ShadowCarrier"),
}

# enumerations that are arguments of prompt learning's configs, by package
ENUMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "PromptTuningInit": ("prompt_tuning", ("TEXT", "SAMPLE_VOCAB", "RANDOM")),
    "MultitaskPromptTuningInit": (
        "multitask_prompt_tuning",
        ("TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"),
    ),
    "PromptEncoderReparameterizationType": ("p_tuning", ("MLP", "LSTM")),
}


@functools.cache
def enumeration(name: str) -> type[enum.Enum]:
    """One of the enumerations of `ENUMS`, whose members equal their names."""
    make: Any = enum.Enum
    return make(name, {member: member for member in ENUMS[name][1]}, type=str, module=__name__)


def __getattr__(name: str) -> Any:
    if name in ENUMS:  # where pickle looks for it
        return enumeration(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def row_of(package: str) -> Row | None:
    """The row of a package, if PEFT has it."""
    return next((row for row in ROWS if row.package == package), None)


def others(package: str) -> tuple[str, ...]:
    """The names of a package, besides its config, tuner and layer, that have no counterpart here."""
    return _OTHERS.get(package, ())


def stand_in(name: str, package: str, bases: tuple[type, ...] = (), **attributes: Any) -> Any:
    """A class, or a function if the name is in lower case, that raises when it is used.

    Nothing is ever an instance of such a class, so `isinstance` tests in existing code answer as they should.

    Args:
        name: its name in PEFT.
        package: the package under `peft.tuners` that has it.
        bases: the classes that it derives from.
        **attributes: further class attributes.

    Returns:
        The class or the function.

    Example:
        >>> stand_in("BOFTModel", "boft")(None)
        Traceback (most recent call last):
        NotImplementedError: BOFTModel is not implemented in funcadapt yet...
    """
    row = row_of(package)
    prompt = row is not None and row.layer is None

    def refuse(*_: Any, **__: Any) -> NoReturn:
        if prompt:
            raise OutOfScopeError(
                f"{name}: prompt learning is out of funcadapt's scope. It prepends virtual tokens to a transformer's "
                "input instead of adapting layers; use Hugging Face's PEFT for it."
            )
        raise NotImplementedError(f"{name} is not implemented in funcadapt yet (PEFT has it in peft.tuners.{package}).")

    if name[:1].islower():
        function: Callable[..., NoReturn] = refuse
        function.__name__ = function.__qualname__ = name
        function.__doc__ = f"PEFT's `{name}`, which funcadapt does not have: raises."
        return function
    body = {"__init__": refuse, "__doc__": f"PEFT's `{name}`, which funcadapt does not have: raises.", **attributes}
    return type(name, bases, {"__qualname__": name, **body})
