"""PEFT's enumerations: `PeftType` names the methods, `TaskType` the tasks."""

from __future__ import annotations

import enum
from typing import Any, NoReturn

PEFT_VERSION = "0.21.2"  # the release whose names and formats these are


class PeftType(str, enum.Enum):  # noqa: UP042 - PEFT's own is no StrEnum: str(PeftType.LORA) is "PeftType.LORA"
    """The methods that PEFT 0.21.2 knows. A member equals its name: `PeftType.LORA == "LORA"`."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, enum.Enum):  # noqa: UP042 - as above
    """The tasks that PEFT knows. A member equals its name."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def as_peft_type(name: str) -> PeftType | str:
    """The member of `PeftType` with a name; the name itself for a method that PEFT does not have.

    Args:
        name: the name, "LORA".

    Returns:
        The member, or the name.
    """
    return PeftType(name) if name in PeftType.__members__ else name


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> NoReturn:
    """PEFT's registration of a method. It always raises: here, methods are registered with `fa.register`.

    A method registered with `fa.register(Method(...))` is known to the shim by itself, under PEFT's kind of names.
    In PEFT, too, no call from outside succeeds: `name` must be a member of `PeftType`, and those are all taken.

    Args:
        name: the method's name in lower case.
        config_cls: its config class.
        model_cls: its tuner.
        prefix: what the names of its parts begin with.
        is_mixed_compatible: whether it can be in a mixed model.

    Raises:
        ValueError: if the name is not in lower case, ends in "_", or is no member of `PeftType`.
        KeyError: if the name is taken.

    Example:
        >>> register_peft_method(name="lora", config_cls=None, model_cls=None)
        Traceback (most recent call last):
        KeyError: "There is already PEFT method called 'lora', please choose a unique name...
    """
    how = "Define the method as a funcadapt.Method and register it with funcadapt.register(method)."
    if name.endswith("_"):
        raise ValueError(f"Please pass the name of the PEFT method without '_' suffix, got {name}.")
    if not name.islower():
        raise ValueError(f"The name of the PEFT method should be in lower case letters, got {name}.")
    if name.upper() not in PeftType.__members__:
        raise ValueError(f"Unknown PEFT type {name.upper()}, it is no member of PeftType. {how}")
    raise KeyError(f"There is already PEFT method called '{name}', please choose a unique name. {how}")
