"""PEFT's modules and public names: every one can be imported, those of methods are generated from the registry."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import peft
import pytest
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.config import _configs
from funcadapt.method import methods, unregister
from funcadapt.peft import absent
from funcadapt.peft.targets import check_target_module_exists
from funcadapt.view.classes import family, layer_class, packages
from funcadapt.view.holding import view_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.switches import TunerLayer

# what other libraries import from PEFT's modules (transformers 5.23, diffusers 0.42, trl 1.16, accelerate 1.15)
IMPORTS = {
    "peft.functional": "cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model "
    "set_adapter set_peft_model_state_dict set_requires_grad",
    "peft.helpers": "disable_input_dtype_casting rescale_adapter_scale check_if_peft_model",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.tuners.lora": "LoraLayer LoraModel LoraConfig Linear Embedding Conv2d Conv3d ParamWrapper",
    "peft.tuners.lora.layer": "LoraLayer Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper",
    "peft.tuners.lora.model": "LoraModel",
    "peft.tuners.lora.config": "LoraConfig LoftQConfig EvaConfig CordaConfig LoraGAConfig LoraRuntimeConfig",
    "peft.tuners.adalora": "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDLinear",
    "peft.tuners.ia3": "IA3Config IA3Layer IA3Model Linear Conv2d Conv3d",
    "peft.tuners.tuners_utils": "BaseTuner BaseTunerLayer check_target_module_exists",
    "peft.tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensLayer",
    "peft.tuners.mixed": "MixedModel COMPATIBLE_TUNER_TYPES",
    "peft.tuners._buffer_dict": "BufferDict",
    "peft.utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict AuxiliaryTrainingWrapper "
    "infer_device",
    "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter prepare_model_for_compiled_hotswap "
    "hotswap_adapter_from_state_dict",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy",
    "peft.utils.peft_types": "PeftType TaskType register_peft_method",
    "peft.utils.incremental_pca": "IncrementalPCA",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
    "peft.optimizers": "create_loraplus_optimizer create_lorafa_optimizer",
    "peft.peft_model": "PeftModel PeftModelForCausalLM get_layer_status get_model_status",
    "peft.mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING get_peft_config inject_adapter_in_model",
    "peft.mapping_func": "get_peft_model",
    "peft.mixed_model": "PeftMixedModel",
    "peft.auto": "AutoPeftModel AutoPeftModelForCausalLM MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "peft.config": "PeftConfig PeftConfigMixin PromptLearningConfig",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available",
}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_of_other_libraries(module: str) -> None:
    found = importlib.import_module(f"funcadapt.{module}")
    theirs = importlib.import_module(module)
    for name in IMPORTS[module].split():
        assert hasattr(theirs, name), "the table is about PEFT"
        thing = getattr(found, name)
        assert getattr(found, name) is thing
        if isinstance(getattr(theirs, name), type):
            assert isinstance(thing, type)


@pytest.mark.parametrize("name", peft.__all__)
def test_every_public_name(name: str) -> None:
    theirs, ours = getattr(peft, name), getattr(shim, name)
    assert callable(ours) == callable(theirs)
    assert isinstance(ours, type) == isinstance(theirs, type)
    assert name in dir(shim)
    if isinstance(theirs, type) and not issubclass(theirs, Exception):  # those are funcadapt's own
        assert ours.__name__ == theirs.__name__


@pytest.mark.parametrize("row", absent.ROWS, ids=lambda row: row.package)
def test_the_table_of_names_is_peft_s(row: absent.Row) -> None:
    theirs = importlib.import_module(f"peft.tuners.{row.package}")
    config = getattr(theirs, row.config)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[row.peft_type] is config
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[row.peft_type] is getattr(theirs, row.model)
    assert config.__base__.__name__ == row.base or row.base == "PeftConfig"
    if row.package == "ln_tuning":
        theirs = importlib.import_module("peft.tuners.ln_tuning.layer")
    if row.layer and row.package != "xlora":
        assert getattr(theirs, row.layer).__name__ == row.layer
    for module in ("", ".model", ".config", ".layer"):
        ours = importlib.import_module(f"funcadapt.peft.tuners.{row.package}{module}")
        assert (ours.__name__, ours.__package__) == (f"funcadapt.peft.tuners.{row.package}{module}",) * 2
        assert {row.config, row.model} <= set(dir(ours)) == set(dir(ours)) | set(ours.__all__)


def test_there_is_no_method_of_peft_beside_the_table() -> None:
    assert {row.peft_type for row in absent.ROWS} == {t.value for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("package", packages())
def test_classes_come_from_the_registry(package: str) -> None:
    module = importlib.import_module(f"funcadapt.peft.tuners.{package}.layer")
    base = family(package)
    assert getattr(module, base.__name__) is base
    assert issubclass(base, TunerLayer)
    for method in methods():
        for kind in method.kinds if view_of(method).package == package else ():
            cls = layer_class(method, kind)
            assert issubclass(cls, base)
            assert getattr(module, cls.__name__) is cls
            assert pickle.loads(pickle.dumps(cls)) is cls


def test_base_tuner_layer() -> None:
    assert issubclass(AdapterLayer, shim.tuners.tuners_utils.BaseTunerLayer)
    assert issubclass(shim.tuners.lora.layer.Linear, shim.tuners.tuners_utils.BaseTunerLayer)
    assert issubclass(shim.LoraModel, shim.tuners.tuners_utils.BaseTuner)
    assert pickle.loads(pickle.dumps(shim.LoraModel)) is shim.LoraModel


def test_stand_ins() -> None:
    from funcadapt.peft.tuners.shadow import ShadowCarrier

    layer = absent.stand_in("SomeLayer", "shadow", adapter_layer_names=())
    assert not isinstance(nn.Linear(1, 1), ShadowCarrier)
    assert layer.adapter_layer_names == ()
    for use in (ShadowCarrier, layer, shim.tuners.lora.GPTQLoraLinear):
        with pytest.raises(NotImplementedError, match=f"^{use.__name__} is not implemented"):
            use(nn.Linear(1, 1), adapter_name="a")
    for use in (shim.PromptEmbedding, shim.compose_cartridge_adapters, shim.AdaptionPromptModel):
        with pytest.raises(absent.OutOfScopeError, match=f"^{use.__name__}: prompt learning is out of"):
            use()


MISSPELT = [
    ("funcadapt.peft", "LoraConfg", "LoraConfig"),
    ("funcadapt.peft", "PeftModul", "PeftModel"),
    ("funcadapt.peft.tuners", "LoraModell", "LoraModel"),
    ("funcadapt.peft.tuners.lora", "LoraLayr", "LoraLayer"),
    ("funcadapt.peft.tuners.lora.layer", "Lineer", "Linear"),
    ("funcadapt.peft.tuners.tuners_utils", "BaseTunerLayers", "BaseTunerLayer"),
    ("funcadapt.peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPIN", "PEFT_TYPE_TO_CONFIG_MAPPING"),
]


@pytest.mark.parametrize(("module", "name", "near"), MISSPELT)
def test_unknown_names_have_near_matches(module: str, name: str, near: str) -> None:
    found = importlib.import_module(module)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'. Did you mean.*'{near}'"):
        getattr(found, name)
    assert not hasattr(found, name)
    if module != "funcadapt.peft.mapping":  # a file, for which Python has its own message
        with pytest.raises(ImportError, match=f"cannot import name '{name}' from '{module}'. Did you mean.*'{near}'"):
            exec(f"from {module} import {name}")


def test_unknown_modules() -> None:
    for name in ("tuners.nothing", "tuners.lora.nothing", "nothing", "tuners.lora.layer.nothing", "tuners.shadow.eva"):
        assert importlib.util.find_spec(f"funcadapt.peft.{name}") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"funcadapt.peft.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = shim.nothing
    with pytest.raises(AttributeError, match="__nothing__"):
        _ = shim.__nothing__
    with pytest.raises(AttributeError, match="__nothing__"):
        _ = shim.tuners.__nothing__


def test_modules_as_attributes() -> None:
    for path in ("tuners.lora.layer", "tuners.tuners_utils", "utils.other", "helpers", "functional", "optimizers"):
        module: Any = shim
        for part in path.split("."):
            module = getattr(module, part)
        assert isinstance(module, ModuleType)
        assert module is sys.modules[f"funcadapt.peft.{path}"]


def test_star_import() -> None:
    names: dict[str, Any] = {}
    exec("from funcadapt.peft import *", names)
    assert set(peft.__all__) <= names.keys()


def test_import_is_light() -> None:
    """Neither the method modules' users nor transformers are imported with the package."""
    code = (
        "import sys, funcadapt; before = set(sys.modules); import funcadapt.peft as p; p.LoraConfig(r=2)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(new & {'transformers', 'huggingface_hub', 'accelerate', 'peft', 'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_import_utils() -> None:
    from funcadapt.peft.import_utils import is_bnb_available, is_diffusers_available

    assert is_bnb_available() == peft.import_utils.is_bnb_available()
    assert is_diffusers_available() == peft.import_utils.is_diffusers_available()


def test_version() -> None:
    assert shim.__version__ == peft.__version__


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q", "layers.1.v"]},
    {"target_modules": r".*\.q"},
    {"target_modules": ["q"], "exclude_modules": ["layers.0.q"]},
    {"target_modules": ["q"], "exclude_modules": r".*1.*"},
    {"target_modules": ["q"], "layers_to_transform": [1]},
    {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q", "head"], "modules_to_save": ["head"]},
    {"target_modules": ["head"], "target_parameters": ["q.weight"]},
]


@pytest.mark.parametrize("kwargs", TARGETS)
def test_check_target_module_exists(kwargs: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists as theirs

    for path in ("q", "model.layers.0.q", "model.layers.1.q", "layers.1.v", "layers.2.v", "head", "a.head.q", "xq"):
        expected = bool(theirs(peft.LoraConfig(**kwargs), path))
        assert check_target_module_exists(shim.LoraConfig(**kwargs), path) is expected, path


def test_a_method_of_a_third_party_has_its_modules() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ThirdConfig(fa.AdapterConfig):
        """A config."""

        peft_type: str = "THIRD"
        target_modules: Any = None

    lora = fa.method_of(fa.LoraConfig())
    fa.register(dataclasses.replace(lora, name="third", config=ThirdConfig, view=None, keys={"lora_A": "third_A"}))
    try:
        module = importlib.import_module("funcadapt.peft.tuners.third.layer")
        assert module.ThirdLayer.__name__ == "ThirdLayer"
        assert shim.ThirdConfig is module.ThirdConfig is shim.tuners.ThirdConfig
        assert shim.ThirdConfig(target_modules=["q"]).peft_type == "THIRD"
        assert shim.PeftConfig.from_peft_type(peft_type="THIRD").to_funcadapt() == ThirdConfig(peft_version="0.21.2")
    finally:
        unregister("third")
        del _configs["THIRD"]
    with pytest.raises(AttributeError):
        _ = shim.ThirdConfig
