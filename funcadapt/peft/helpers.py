"""PEFT's small helpers: signatures, a check of a path, and context managers over adapter layers."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from funcadapt._torch import named_modules
from funcadapt.view.classes import family
from funcadapt.view.walking import layers


def update_forward_signature(model: nn.Module) -> None:
    """Give a `PeftModel`'s `forward` the signature and docstring of its base model's.

    Only this model's: PEFT wraps the function of the class (its `deepcopy` of a function is that function), so that
    there every other `PeftModel` changes, too.

    Args:
        model: the `PeftModel`. Nothing happens if its `forward` is not `(*args, **kwargs)`.
    """
    _take_signature(model, "forward", [{"args", "kwargs"}])


def update_generate_signature(model: nn.Module) -> None:
    """Give a `PeftModel`'s `generate` the signature and docstring of its base model's.

    Args:
        model: the `PeftModel`. Nothing happens if it has no `generate`, or one with named arguments.
    """
    if hasattr(model, "generate"):
        _take_signature(model, "generate", [{"args", "kwargs"}, {"kwargs"}])


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Give `forward`, `generate` or both the base model's signatures.

    Args:
        model: the `PeftModel`.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: if `method` is none of these.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _take_signature(model: Any, name: str, plain: Sequence[set[str]]) -> None:
    bound: Callable[..., Any] = getattr(model, name)
    if set(inspect.signature(bound).parameters.keys()) not in plain:
        return
    own: Callable[..., Any] = getattr(bound, "__func__")  # noqa: B009

    def forwarding(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    base: nn.Module = model.get_base_model()
    theirs: Callable[..., Any] = getattr(type(base), name)
    functools.update_wrapper(forwarding, theirs, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, types.MethodType(forwarding, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or a repository of the Hub holds an adapter.

    Args:
        model_name_or_path: the folder, or the repository's id.

    Returns:
        Whether its config can be read as an adapter's.

    Example:
        >>> check_if_peft_model("no/such/folder/at/all")
        False
    """
    from funcadapt.peft.config import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the Hub may raise
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Generator[None, None, None]:
    """Multiply the scaling of every LoRA layer, for the duration of a block.

    Args:
        model: any model with LoRA layers.
        multiplier: the factor; in [0, 1] this interpolates between the base model and the adapted one.

    Yields:
        Nothing.

    Raises:
        TypeError: if `multiplier` is no number.
        ValueError: if the model has no LoRA layer.
    """
    if not isinstance(multiplier, float | int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    found: list[Any] = [layer for _, layer in layers(model) if isinstance(layer, family("lora"))]
    if not found:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [dict(layer.scaling) for layer in found]
    try:
        for layer, values in zip(found, before, strict=True):
            for name, value in values.items():
                layer.scaling[name] = value * multiplier
        yield
    finally:
        for layer, values in zip(found, before, strict=True):
            for name, value in values.items():
                if name in layer.scaling:  # not deleted meanwhile
                    layer.scaling[name] = value


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Generator[None, None, None]:
    """Adapter layers do not cast their input to their own dtype, for the duration of a block.

    Diffusers' layerwise casting does it in hooks of its own, which a second cast would undo.

    Args:
        model: any model with adapter layers.
        active: False makes this do nothing.

    Yields:
        Nothing.
    """
    found: list[Any] = [layer for _, layer in layers(model)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in found]
    try:
        for layer in found:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, value in zip(found, before, strict=True):
            layer.cast_input_dtype_enabled = value


class DoraCaching:
    """PEFT's switch for caching DoRA's norms. Here it is accepted and does nothing: results are the same.

    Example:
        >>> with DoraCaching():
        ...     pass
        >>> DoraCaching()(enabled=False)
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, enabled: bool = True) -> None:
        """Accepted; nothing is cached."""
        self.enabled = enabled


class MontecloraTrainerMixin:
    """PEFT's mixin for a `Trainer`: adds the penalty of MonteCLoRA's samplers, see `funcadapt.methods.monteclora`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss and the mean of what the tuners of the model add to it.

        Args:
            model: the model that is trained.
            inputs: a batch.
            return_outputs: whether to return the model's outputs as well.
            **kwargs: further arguments of the trainer's method.

        Returns:
            The loss, or the loss and the outputs.
        """
        trainer: Any = super()
        found = trainer.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        tuners: list[Any] = [m for m in model.modules() if hasattr(type(m), "_get_monteclora_loss")]
        own = [tuner._get_monteclora_loss() for tuner in tuners]
        added = sum(own) / max(1, len(own))
        return (found[0] + added, *found[1:]) if return_outputs else found + added


_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Ranks the weights of a model by their condition number, the lowest first: KappaTune's targets for LoRA.

    Args:
        model: the model.
        max_dim_size_to_analyze: weights with a larger side are left out.
        moe_param_suffixes: the endings of 3-D expert parameters, or None for the usual ones.
        show_progress: PEFT's switch for a progress bar; accepted, nothing is shown.

    Example:
        >>> model = nn.ModuleDict({"good": nn.Linear(3, 3), "bad": nn.Linear(3, 3)})
        >>> with torch.no_grad():
        ...     model["good"].weight.copy_(torch.eye(3)), model["bad"].weight.copy_(torch.ones(3, 3))
        (...)
        >>> KappaTuneSelector(model).get_best_targets(num_modules=1)
        ['good']
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze = model, max_dim_size_to_analyze
        self.moe_param_suffixes, self.show_progress = moe_param_suffixes or _EXPERTS, show_progress

    @functools.cached_property
    def _modules(self) -> dict[str, float]:
        weights = {n: m.weight for n, m in named_modules(self.model) if isinstance(m, nn.Linear)}
        return {name: self._condition(weight) for name, weight in weights.items() if self._fits(weight)}

    @functools.cached_property
    def _parameters(self) -> dict[str, float]:
        named = ((n, p) for n, p in self.model.named_parameters() if n.endswith(self.moe_param_suffixes))
        return {name: self._condition(p) for name, p in named if p.ndim == 3 and self._fits(p[0])}

    def _fits(self, weight: torch.Tensor) -> bool:
        return all(size <= self.max_dim_size_to_analyze for size in weight.shape)

    @staticmethod
    def _condition(weight: torch.Tensor) -> float:
        """Largest over smallest singular value; of a stack of experts, the mean."""
        singular: Any = torch.linalg
        values: torch.Tensor = singular.svdvals(weight.detach().float())
        return float((values[..., 0] / (values[..., -1] + 1e-8)).mean())

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The best `nn.Linear` modules, for `target_modules`.

        Args:
            top_p: this fraction of them (at least one).
            num_modules: this many; goes before `top_p`.
            threshold: those whose condition number is at most this.

        Returns:
            Their paths, the lowest condition number first.
        """
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The best expert parameters, for `target_parameters`.

        Args:
            top_p: this fraction of them (at least one).
            num_modules: this many; goes before `top_p`.
            threshold: those whose mean condition number is at most this.

        Returns:
            Their names, the lowest condition number first.
        """
        return _best(self._parameters, top_p, num_modules, threshold)


def _best(numbers: Mapping[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    ranked = sorted(numbers, key=numbers.__getitem__)
    if count is not None:
        return ranked[:count]
    if top_p is not None:
        return ranked[: max(1, int(len(ranked) * top_p))]
    return [name for name in ranked if threshold is None or numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The best targets of a model by condition number, as keyword arguments for `LoraConfig`.

    Args:
        model: the model.
        top_p: the fraction of modules, and of expert parameters, to take.
        max_dim_size_to_analyze: weights with a larger side are left out.
        moe_param_suffixes: the endings of expert parameters, or None for the usual ones.
        show_progress: accepted, nothing is shown.

    Returns:
        `target_modules`, and `target_parameters` or None.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
