"""LoRA of experts made for transformers 4, in the models of transformers 5: against PEFT, and against dense weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import peft.utils.transformers_weight_conversion as peft_conversion
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming

import funcadapt.peft.utils.transformers_weight_conversion as conversion
from funcadapt.peft.utils.expert_operations import StackFactors

# PEFT warns of every pattern for a parameter, and asks transformers under names that these warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing.*deprecated:FutureWarning"),
]

SIZES: Any = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 39,
    "initializer_range": 0.2,
}
EXPERTS, WIDTH = 3, 12
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def moe(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=WIDTH, num_local_experts=EXPERTS)).eval()
    if kind == "deepseek_v3":  # layer 0 is dense, layer 1 has experts, one of them shared
        config: Any = DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 2},
            intermediate_size=24,
            moe_intermediate_size=WIDTH,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
        return DeepseekV3ForCausalLM(config).eval()
    classes: Any = {
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    }
    config_class, model_class = classes[kind]
    sizes = SIZES | {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    sizes |= {"intermediate_size": 24, "head_dim": 8}
    return model_class(config_class(**sizes)).eval()


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields)


def changed(config: Any) -> tuple[Any, ...]:
    return config.target_modules, config.target_parameters or set(), config.rank_pattern, config.alpha_pattern


# -- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "one", "two", "three"],
        ["one", "two"],
        ["three"],
        ["gate", "q_proj"],
        ["q_proj", "v_proj"],
        "all-linear",
        r".*\.(q_proj|one|two|three)",
        r".*(gate|three)",
        [],
    ],
)
def test_configs_become_what_peft_makes_of_them(kind: str, targets: Any) -> None:
    names = dict(zip(("one", "two", "three"), NAMES[kind], strict=True))
    if isinstance(targets, str):
        targets = re.sub(r"one|two|three", lambda match: names[match[0]], targets)
    else:
        targets = [names.get(target, target) for target in targets]
    model, ours, theirs = moe(kind), lora(target_modules=targets), lora(target_modules=targets)
    conversion.convert_peft_config_for_transformers(ours, model)
    peft_conversion.convert_peft_config_for_transformers(theirs, model, None)
    assert changed(ours) == changed(theirs)
    before = copy.deepcopy(changed(ours))
    conversion.convert_peft_config_for_transformers(ours, model)
    assert changed(ours) == before


@pytest.mark.parametrize("kind", ["qwen2_moe", "llama"])
def test_other_models_are_left_alone(kind: str, llama: nn.Module) -> None:
    """Of qwen2_moe PEFT adapts the shared experts only, and so its checkpoints mean that."""
    model, config = llama if kind == "llama" else moe(kind), lora(target_modules=["gate_proj", "up_proj"])
    before = copy.deepcopy(config)
    conversion.convert_peft_config_for_transformers(config, model)
    assert config == before
    ia3 = peft.IA3Config(target_modules=["w2"], feedforward_modules=["w2"])
    for other in (moe("mixtral"), nn.Linear(2, 2)):
        conversion.convert_peft_config_for_transformers(ia3, other)
    assert ia3.target_modules == {"w2"}


def test_parts_of_a_parameter_are_refused_alone() -> None:
    for library in (conversion, peft_conversion):
        with pytest.raises(ValueError, match="w1 without also targeting w3"):
            library.convert_peft_config_for_transformers(lora(target_modules=["w1", "q_proj"]), moe("mixtral"), None)
    model = moe("mixtral")
    with pytest.raises(ValueError, match=r"expert\(s\) 1 alone"):
        conversion.convert_peft_config_for_transformers(lora(target_modules=["experts.1.w2"]), model)
    with pytest.raises(ValueError, match="different scalings"):
        conversion.convert_peft_config_for_transformers(
            lora(target_modules=["w1", "w3"], rank_pattern={"w1": 2}), model
        )
    with pytest.raises(ValueError, match="different values for the experts"):
        conversion.convert_peft_config_for_transformers(
            lora(target_modules=["w2"], rank_pattern={"experts.0.w2": 2}), model
        )


GATE_UP = r".*\.gate_up_proj"
FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # PEFT: "q_proj" of all layers
        ({"target_modules": r".*layers\.0\.self_attn\.q_proj"}, (r".*layers\.0\.self_attn\.q_proj", set(), {}, {})),
        # PEFT: both layers
        (
            {"target_modules": r".*layers\.0\..*(q_proj|w1|w3)"},
            ({"model.layers.0.self_attn.q_proj"}, {FIRST}, {GATE_UP: 8}, {GATE_UP: 12}),
        ),
        # PEFT: matches nothing
        ({"target_modules": r".*block_sparse_moe\.experts\.\d+\.w2"}, (set(), {"down_proj"}, {}, {})),
        # PEFT: both layers
        ({"target_modules": ["w1", "w3"], "layers_to_transform": [0]}, (set(), {FIRST}, {GATE_UP: 8}, {GATE_UP: 12})),
        # PEFT: not excluded
        ({"target_modules": ["q_proj", "w2"], "exclude_modules": ["w2"]}, ({"q_proj", "w2"}, set(), {}, {})),
        # PEFT: an alpha of 12, and so another scaling
        (
            {"target_modules": ["w1", "w3"], "use_rslora": True},
            (set(), {"gate_up_proj"}, {GATE_UP: 8}, {GATE_UP: 6 * 2**0.5}),
        ),
        # PEFT: ranks 8 and 4
        (
            {"target_modules": ["w1", "w2", "w3"], "rank_pattern": {"w[13]": 3, "w2": 2}, "alpha_pattern": {"w2": 5}},
            (
                set(),
                {"gate_up_proj", "down_proj"},
                {GATE_UP: 6, r".*\.down_proj": 2, "w[13]": 3, "w2": 2},
                {GATE_UP: 12, r".*\.down_proj": 5, "w2": 5},
            ),
        ),
        (
            {"target_modules": ["w1", "w3"], "rank_pattern": {r"layers\.0.*": 2}, "alpha_pattern": {r"layers\.0.*": 3}},
            (
                set(),
                {"gate_up_proj"},
                {re.escape(FIRST): 4, re.escape(FIRST.replace("0", "1")): 8, r"layers\.0.*": 2},
                {re.escape(FIRST): 6, re.escape(FIRST.replace("0", "1")): 12, r"layers\.0.*": 3},
            ),
        ),
        # PEFT fails: "No `target_modules` passed"
        ({"target_modules": None}, (None, set(), {}, {})),
    ],
)
def test_configs_that_peft_changes_the_meaning_of(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    model, ours, theirs = moe("mixtral"), lora(**fields), lora(**copy.deepcopy(fields))
    peft_conversion.convert_peft_config_for_transformers(theirs, model, None)
    assert changed(theirs) != expected
    for _ in range(2):
        conversion.convert_peft_config_for_transformers(ours, model)
        got = changed(ours)
        assert got[:3] == expected[:3]
        assert got[3] == pytest.approx(expected[3])


def resolved(config: Any, path: str) -> tuple[int, float]:
    """PEFT's rule, by which a pattern may match the end of a path."""
    found: list[Any] = []
    for table, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)):
        keys = (key for key in table if re.match(rf"(.*\.)?({key})$", path))
        found.append(table.get(next(keys, ""), default))
    return found[0], found[1]


def test_ranks_of_experts_are_not_those_of_dense_layers() -> None:
    """Which end with the same name. PEFT forgets the pattern."""
    fields: dict[str, Any] = {"target_modules": ["down_proj"], "rank_pattern": {r".*experts\.\d+\.down_proj": 2}}
    config, model = lora(**fields), moe("deepseek_v3")
    conversion.convert_peft_config_for_transformers(config, model, None)
    assert resolved(config, "model.layers.1.mlp.experts.down_proj")[0] == 2
    assert resolved(config, "model.layers.0.mlp.down_proj")[0] == 4
    assert resolved(config, "model.layers.1.mlp.shared_experts.down_proj")[0] == 4


def test_a_path_with_which_others_end() -> None:
    """A model in a model: the patterns for the outer one's layers must not hold for the inner one's."""
    model = moe("mixtral")
    model.draft = moe("mixtral")
    config = lora(
        target_modules=["w1", "w2", "w3"],
        rank_pattern={r"^model\.layers\.0\..*": 2, r"draft\.model\.layers\.0\..*": 3},
        alpha_pattern={r"^model\.layers\.0\..*": 3, r"draft\.model\.layers\.0\..*": 9},
    )
    conversion.convert_peft_config_for_transformers(config, model, None)
    down, both = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"
    assert [resolved(config, path) for path in (down, f"draft.{down}")] == [(2, 3), (3, 9)]
    assert [resolved(config, path) for path in (both, f"draft.{both}")] == [(4, 6), (6, 18)]
    assert resolved(config, both.replace("0", "1", 1)) == (8, 12)


def test_dense_layers_and_shared_experts_stay_targets() -> None:
    """PEFT takes their names for those of experts: it drops them, or refuses a path of theirs."""
    model, targets = moe("deepseek_v3"), ["gate_proj", "up_proj", "down_proj"]
    ours, theirs = lora(target_modules=targets), lora(target_modules=targets)
    conversion.convert_peft_config_for_transformers(ours, model)
    peft_conversion.convert_peft_config_for_transformers(theirs, model, None)
    assert theirs.target_modules == set()
    assert changed(ours) == (set(targets), *changed(theirs)[1:])
    config = lora(target_modules=["model.layers.0.mlp.up_proj"])
    conversion.convert_peft_config_for_transformers(config, model)
    assert config.target_modules == {"model.layers.0.mlp.up_proj"}
    with pytest.raises(ValueError, match="without also targeting"):
        peft_conversion.convert_peft_config_for_transformers(config, model, None)


# -- weights ----------------------------------------------------------------------------------------------------


def checkpoint(kind: str, config: Any) -> dict[str, torch.Tensor]:
    """A checkpoint as PEFT wrote it with transformers 4, where each expert's weights were modules."""
    generator, hidden = torch.Generator().manual_seed(1), SIZES["hidden_size"]
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    first, second, down = NAMES[kind]
    sizes = {first: (hidden, WIDTH), second: (hidden, WIDTH), down: (WIDTH, hidden)}
    layers: dict[str, tuple[int, int]] = {}
    for i in range(SIZES["num_hidden_layers"]):
        layers[f"model.layers.{i}.self_attn.q_proj"] = (hidden, 16)
        layers[f"model.layers.{i}.{block}.gate"] = (hidden, EXPERTS)
        for expert in range(EXPERTS):
            layers |= {f"model.layers.{i}.{block}.experts.{expert}.{n}": size for n, size in sizes.items()}
    tensors: dict[str, torch.Tensor] = {}
    for path, (columns, rows) in layers.items():
        if path.rpartition(".")[2] not in config.target_modules:
            continue
        rank = next((r for end, r in config.rank_pattern.items() if path.endswith(end)), config.r)
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        tensors |= {f"base_model.model.{path}.lora_A.weight": a / 3, f"base_model.model.{path}.lora_B.weight": b / 3}
    return tensors


def dense(kind: str, tensors: dict[str, torch.Tensor], config: Any) -> Any:
    """The model with every update added to the weight that it is for."""
    model = moe(kind)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, a in tensors.items():
            if not key.endswith("lora_A.weight"):
                continue
            b = tensors[key.replace("lora_A", "lora_B")]
            alpha = next((x for end, x in config.alpha_pattern.items() if f"{end}.lora" in key), config.lora_alpha)
            delta = alpha / (len(a) ** 0.5 if config.use_rslora else len(a)) * b @ a
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            path = path.replace("block_sparse_moe", "mlp")
            if ".experts." not in path:
                parameters[f"{path}.weight"] += delta
                continue
            container, expert, name = path.rsplit(".", 2)
            position = NAMES[kind].index(name)
            if position == 2:
                parameters[f"{container}.down_proj"][int(expert)] += delta
            else:
                rows = slice(position * WIDTH, (position + 1) * WIDTH)
                parameters[f"{container}.gate_up_proj"][int(expert), rows] += delta
    return model


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT, with these functions in place of its own."""
    for name in conversion.__all__:
        monkeypatch.setattr(peft_conversion, name, getattr(conversion, name))


CASES = [
    ((0, 1, 2), {}),
    ((0, 1), {}),
    ((2,), {}),
    ((0, 1, 2), {"use_rslora": True}),
    ((0, 1, 2), {"rank_pattern": {0: 3, 1: 3, 2: 2}, "alpha_pattern": {2: 5}}),
    ((0, 1), {"rank_pattern": {0: 2, 1: 6}, "alpha_pattern": {0: 3, 1: 9}}),
]


def old_adapter(kind: str, which: tuple[int, ...], fields: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    names = NAMES[kind]
    named = {k: {names[i]: x for i, x in v.items()} if k.endswith("pattern") else v for k, v in fields.items()}
    config = lora(target_modules=["q_proj", "gate", *(names[i] for i in which)], **named)
    return config, checkpoint(kind, config)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("how", ["peft", "transformers"])
@pytest.mark.parametrize(("which", "fields"), CASES)
def test_an_old_checkpoint_means_what_it_meant(
    tmp_path: Path, kind: str, how: str, which: tuple[int, ...], fields: dict[str, Any], ids: torch.Tensor
) -> None:
    config, tensors = old_adapter(kind, which, fields)
    want = dense(kind, tensors, config)(ids).logits
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = moe(kind)
    assert not torch.allclose(model(ids).logits, want, atol=1e-2)
    if how == "peft":
        model = peft.PeftModel.from_pretrained(model, tmp_path, adapter_name="mine")
    else:
        info = model.load_adapter(tmp_path, adapter_name="mine")
        assert not info.missing_keys
        assert not info.unexpected_keys
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("which", "fields"), CASES[1:2] + CASES[3:5])
def test_what_peft_makes_of_it(which: tuple[int, ...], fields: dict[str, Any], tmp_path: Path, ids: Any) -> None:
    """Without "down_proj" nothing is loaded; with rsLoRA the scaling is wrong; patterns make the shapes not fit."""
    config, tensors = old_adapter("mixtral", which, fields)
    want = dense("mixtral", tensors, config)(ids).logits
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if "rank_pattern" in fields:
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path)
        return
    with pytest.warns() if fields == {} else _nothing():
        model = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path)
    assert (model(ids).logits - want).abs().max() > 1e-2


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.usefixtures("patched")
def test_a_saved_adapter_is_loaded_again(tmp_path: Path, ids: torch.Tensor) -> None:
    config, tensors = old_adapter("mixtral", (0, 1, 2), {})
    config.save_pretrained(tmp_path / "old")
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    again = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path / "new")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_that_fits_is_the_same_dict() -> None:
    model = peft.get_peft_model(moe("mixtral"), lora(target_modules=["q_proj", "w2"], use_dora=False))
    tensors = peft.get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    assert conversion.convert_peft_adapter_state_dict_for_transformers(model, config, tensors) is tensors
    unknown = tensors | {"base_model.model.elsewhere.lora_A.weight": torch.zeros(1), "score.weight": torch.zeros(1)}
    got = conversion.convert_peft_adapter_state_dict_for_transformers(model, config, unknown)
    assert got == unknown
    for other, other_config in ((nn.Linear(2, 2), config), (model, peft.IA3Config())):
        got = conversion.convert_peft_adapter_state_dict_for_transformers(other, other_config, unknown)
        assert got is unknown


def test_fused_weights_must_all_be_there() -> None:
    model = peft.get_peft_model(moe("mixtral"), config := lora(target_modules=["w1", "w3", "w2"]))
    tensors = checkpoint("mixtral", lora(target_modules=["w1", "w2"]))
    with pytest.raises(ValueError, match="fused with"):
        conversion.convert_peft_adapter_state_dict_for_transformers(model, config, tensors)


def test_the_mapping_of_names() -> None:
    assert conversion.build_peft_weight_mapping(None, "x") == []
    base = [WeightRenaming("old.", "new.")]
    for config in (lora(), None):
        mapping = conversion.build_peft_weight_mapping(base, "my.x", config)
        cases = {
            "base_model.model.old.q.lora_A.weight": "new.q.lora_A.my.x.weight",
            "base_model.model.my_lora_block.lora_stuff.q.lora_B.bias": "my_lora_block.lora_stuff.q.lora_B.my.x.bias",
            "base_model.model.q.lora_embedding_A": "q.lora_embedding_A.my.x",
            "base_model.model.q.lora_magnitude_vector": "q.lora_magnitude_vector.my.x.weight",
            "base_model.model.q.ia3_l": "q.ia3_l" if config else "q.ia3_l.my.x",
        }
        for key, want in cases.items():
            for renaming in mapping:
                key, _ = renaming.rename_source_key(key)
            assert key == want


@pytest.mark.parametrize(
    ("config", "nested"),
    [
        (None, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["w1", "w3"]}, False),
        ({"target_modules": ["w1", "w2", "w3"]}, True),
        ({"target_modules": r".*\.w[13]"}, False),
        ({"target_modules": r".*\.w\d"}, True),
        ({"target_modules": [], "target_parameters": ["gate_up_proj"]}, False),
        ({"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]}, True),
    ],
)
def test_where_the_fused_factors_are(config: dict[str, Any] | None, nested: bool) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    base = get_checkpoint_conversion_mapping("mixtral")
    mapping = conversion.build_peft_weight_mapping(base, "x", None if config is None else lora(**config))
    targets = {t for c in mapping if isinstance(c, WeightConverter) for t in c.target_patterns}
    want = {".experts.lora_A.x.weight", ".experts.lora_B.x.weight"}
    assert targets == want | {t.replace("experts", "experts.base_layer") for t in want if nested}


def test_operations_that_are_not_understood_are_left_out() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    base = get_checkpoint_conversion_mapping("qwen3_vl_moe")  # transposes stacked experts
    assert any(isinstance(c, WeightConverter) for c in base)
    assert not any(isinstance(c, WeightConverter) for c in conversion.build_peft_weight_mapping(base, "x", lora()))


def test_factors_of_fused_experts() -> None:
    ranks, e, rows, columns = (2, 3), 4, 5, 6
    a = [[torch.randn(r, columns) for _ in range(e)] for r in ranks]
    b = [[torch.randn(rows, r) for _ in range(e)] for r in ranks]
    patterns = ["one", "two"]
    stacked_a, stacked_b = (
        next(iter(StackFactors(f).convert(dict(zip(patterns, x, strict=True)), patterns, ["t"]).values()))
        for f, x in (("lora_A", a), ("lora_B", b))
    )
    big_a, big_b = stacked_a.reshape(e, 5, columns), stacked_b.reshape(2 * rows, 5, e)
    for i in range(e):
        want = torch.cat([b[j][i] @ a[j][i] for j in range(2)])
        torch.testing.assert_close(big_b[..., i] @ big_a[i], want)
    with pytest.raises(NotImplementedError):
        _ = StackFactors("lora_A").reverse_op
    assert repr(StackFactors("lora_A")) == "StackFactors('lora_A')"


def test_magnitudes_are_loaded_by_transformers(tmp_path: Path, monkeypatch: Any, ids: torch.Tensor) -> None:
    """PEFT's mapping renames a magnitude to a name that the model does not have, and so it is not loaded."""
    make = lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24)).eval()  # noqa: E731
    torch.manual_seed(0)
    base = make()
    model = peft.get_peft_model(copy.deepcopy(base), lora(target_modules=["q_proj"], use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= torch.rand_like(parameter) + 1
    want = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    info = theirs.load_adapter(tmp_path)
    assert all("magnitude" in key for key in info.missing_keys)
    assert len(info.missing_keys) == 2
    assert (theirs(ids).logits - want).abs().max() > 1e-3
    monkeypatch.setattr(peft_conversion, "build_peft_weight_mapping", conversion.build_peft_weight_mapping)
    info = ours.load_adapter(tmp_path)
    assert not info.missing_keys
    torch.testing.assert_close(ours(ids).logits, want)
