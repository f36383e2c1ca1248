"""Which modules a config selects: PEFT's rules exactly, and an error where PEFT stays silent."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_tools import configs, layer_model, our_sites, peft_sites, tiny, wrap
from torch import nn

import funcadapt as fa
from funcadapt.targeting import names_match

NAMES = ["llama", "llama_tied", "llama_cls", "gpt2", "bert", "bert_cls", "t5", "mixtral", "opt"]


@cache
def ours_on(name: str) -> nn.Module:
    return tiny(name)


def peft_s_answer(name: str, config: Any) -> dict[str, tuple[int, float]] | Exception:
    try:
        return peft_sites(wrap(tiny(name), config))
    except (ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        return error


def compare(name: str, method: str, fields: dict[str, Any]) -> None:
    """The same sites, ranks and scalings; or errors on both sides; or a name that is unused, which PEFT ignores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_config, ours_config = configs(method, **fields)
        theirs = peft_s_answer(name, theirs_config)
    try:
        ours: Any = our_sites(ours_on(name), ours_config)
    except fa.TargetError as error:
        if isinstance(theirs, Exception):
            return
        text = str(error)
        assert any(part in text for part in ("matches no", "excludes nothing", "one tied weight")), text
        return
    except (fa.SiteError, ValueError):
        assert isinstance(theirs, Exception), theirs
        return
    assert not isinstance(theirs, Exception), (theirs, sorted(ours))
    assert sorted(ours) == sorted(theirs)
    for path, (rank, scaling) in theirs.items():
        assert ours[path][0] == rank, path
        assert ours[path][1] == pytest.approx(scaling, rel=1e-6), path


GRID: list[tuple[str, str, dict[str, Any]]] = [
    # defaults of every model type
    *((name, method, {}) for name in NAMES for method in ("lora", "ia3") if (name, method) != ("mixtral", "lora")),
    # all-linear, with output embeddings and classification heads left out
    *((name, "lora", {"target_modules": "all-linear"}) for name in NAMES if name != "mixtral"),
    ("gpt2", "lora", {"target_modules": "All-LINEAR"}),
    *((name, "lora", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}) for name in ("llama_cls", "bert_cls")),
    ("llama", "dora", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]}),
    ("llama", "lora", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("bert", "ia3", {"target_modules": "all-linear", "feedforward_modules": ["output.dense"]}),
    # exact paths, endings, regular expressions
    ("llama", "lora", {"target_modules": ["model.layers.0.mlp.up_proj", "k_proj"]}),
    ("llama", "lora", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", "lora", {"target_modules": ["proj"]}),
    ("llama", "lora", {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"}),
    ("llama", "lora", {"target_modules": r"q_proj"}),
    ("llama", "lora", {"target_modules": r".*q_pro"}),
    ("llama", "lora", {"target_modules": []}),
    ("bert", "lora", {"target_modules": ["output.dense"]}),
    ("llama", "lora", {"target_modules": ["self_attn"]}),
    ("llama", "lora", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    ("llama", "lora", {"target_modules": ["q_proj"], "exclude_modules": "model.layers.0.self_attn.q_proj"}),
    ("llama", "lora", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", "lora", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    # layers
    ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
    ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
    ("llama", "lora", {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]}),
    ("llama", "lora", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}),
    ("gpt2", "lora", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"}),
    ("gpt2", "lora", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": ["nope", "h"]}),
    ("gpt2", "lora", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "nope"}),
    ("gpt2", "lora", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": []}),
    ("t5", "lora", {"target_modules": ["q"], "layers_to_transform": [1]}),
    # ranks and alphas
    ("llama", "lora", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, ".*layers.1.*": 3}}),
    ("llama", "lora", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {".*layers.1.*": 3, "q_proj": 2}}),
    ("llama", "lora", {"target_modules": ["q_proj"], "alpha_pattern": {"proj": 2, "q_proj": 5}, "use_rslora": True}),
    ("llama", "lora", {"target_modules": ["q_proj"], "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5}}),
    ("llama", "lora", {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5}}),
    # parameters
    ("mixtral", "lora", {"target_parameters": ["gate_up_proj"]}),
    ("mixtral", "lora", {"target_parameters": ["experts.gate_up_proj", "down_proj"], "target_modules": ["k_proj"]}),
    ("mixtral", "lora", {"target_parameters": ["model.layers.0.mlp.experts.down_proj"]}),
    ("mixtral", "lora", {"target_parameters": ["down_proj"], "rank_pattern": {"experts.down_proj": 3}, "r": 2}),
    ("mixtral", "lora", {"target_parameters": ["down_proj"], "rank_pattern": {"experts": 3}, "r": 2}),
    ("mixtral", "lora", {"target_parameters": ["nothing"]}),
    ("mixtral", "dora", {"target_parameters": ["nothing"], "target_modules": ["nope"]}),
    ("llama", "lora", {"target_parameters": ["q_proj.weight"], "target_modules": []}),
    ("llama", "lora", {"target_parameters": ["input_layernorm.weight"]}),
    ("llama", "lora", {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}),
    # feed-forward layers of IA3
    ("bert", "ia3", {"target_modules": ["key", "dense"], "feedforward_modules": ["dense"]}),
    ("bert", "ia3", {"target_modules": ["key"], "feedforward_modules": []}),
    ("bert", "ia3", {"target_modules": r".*(key|dense)", "feedforward_modules": r".*output\.dense"}),
    ("bert", "ia3", {"target_modules": ["LayerNorm"], "feedforward_modules": []}),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "method", "fields"), GRID)
def test_peft_s_sites(name: str, method: str, fields: dict[str, Any]) -> None:
    compare(name, method, fields)


# Drawn from few names, so that they often meet.
_names = st.sampled_from(
    ["q_proj", "proj", "self_attn.v_proj", "down_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "lm_head"]
)
_fields = st.fixed_dictionaries(
    {
        "target_modules": st.one_of(
            st.lists(_names, min_size=1, max_size=4),
            st.sampled_from(["all-linear", r".*\.(q|k)_proj", r".*layers\.[01]\.(mlp|self_attn)\.\w+_proj", "none"]),
        ),
        "r": st.integers(1, 4),
    },
    optional={
        "exclude_modules": st.one_of(st.lists(_names, min_size=1, max_size=2), st.sampled_from([r".*1.*", r".*q_p.*"])),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "mlp", "model.norm"]), min_size=1, max_size=2),
        "layers_to_transform": st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
        "layers_pattern": st.sampled_from(["layers", "h"]),
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", ".*mlp.*", "layers.0.*j", "proj"]), st.integers(1, 6)
        ),
        "alpha_pattern": st.dictionaries(st.sampled_from(["v_proj", ".*1.*", "self_attn.q_proj"]), st.integers(1, 9)),
        "use_rslora": st.booleans(),
    },
)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=_fields)
def test_peft_s_sites_for_any_config(fields: dict[str, Any]) -> None:
    try:
        peft.LoraConfig(**fields)
    except ValueError:
        with pytest.raises(ValueError, match="layers"):
            fa.LoraConfig(**fields)
        return
    compare("llama", "lora", fields)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_where_peft_treats_mixtures_of_experts_differently() -> None:
    """PEFT reads a Mixtral config as one for transformers 4, where the experts were linear layers.

    So its "all-linear" adapts the experts too, and its default adapts nothing, an error. Here "all-linear" is the
    linear layers that there are, and the default is the one of the table.
    """
    theirs, ours = configs("lora", target_modules="all-linear")
    got, peft_s = our_sites(ours_on("mixtral"), ours), peft_sites(wrap(tiny("mixtral"), theirs))
    assert set(got) < set(peft_s)
    assert all(".experts." in path or path.endswith(".gate.weight") for path in set(peft_s) - set(got))
    theirs, ours = configs("lora")
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        wrap(tiny("mixtral"), theirs)
    assert {path.rpartition(".")[2] for path in our_sites(ours_on("mixtral"), ours)} == {"q_proj", "v_proj"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_parameters_alone_mean_parameters_alone() -> None:
    """PEFT adds the model type's default modules unless target_modules=[]; the config that we write says []."""
    fields: dict[str, Any] = {"target_parameters": ["up_proj.weight"]}
    theirs, ours = configs("lora", **fields)
    assert any(path.endswith("q_proj") for path in peft_sites(wrap(tiny("llama"), theirs)))
    got = our_sites(ours_on("llama"), ours)
    assert list(got) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert fa.init(ours_on("llama"), ours).config.to_dict()["target_modules"] == []
    assert got == peft_sites(wrap(tiny("llama"), peft.LoraConfig(**fields, target_modules=[])))


def test_layers_need_a_component_before_the_list() -> None:
    """PEFT: `model.layers.1.x` has a layer index, a top-level `layers.1.x` has none."""

    def make() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"x": nn.Linear(2, 2)}) for _ in range(2))})

    fields: dict[str, Any] = {"target_modules": ["x"], "layers_to_transform": [1]}
    theirs, ours = configs("lora", **fields)
    with pytest.raises(ValueError, match="layers_to_transform"):
        wrap(make(), theirs)
    with pytest.raises(fa.TargetError, match=r"'layers_to_transform': \(1,\)"):
        fa.sites(make(), ours)
    theirs, ours = configs("lora", **fields, layers_pattern="layers")
    assert list(peft_sites(wrap(make(), theirs))) == [s.path for s in fa.sites(make(), ours)] == ["layers.1.x"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias(bias: str) -> None:
    theirs, ours = configs("lora", target_modules=["query"], bias=bias)
    wrapped = wrap(tiny("bert"), theirs)
    parameters = wrapped.named_parameters(remove_duplicate=False)  # tied biases are in PEFT's file under both names
    trained = {n for n, p in parameters if p.requires_grad and n.endswith("bias")}
    expected = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in trained}
    adapter = fa.init(ours_on("bert"), ours)
    assert {f"{path}.bias" for path, p in adapter.params.items() if "bias" in p} == expected
    assert bool(expected) == (bias != "none")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "wanted", "path"),
    [
        ("llama", [3, 1], "model.embed_tokens"),
        ("gpt2", [3, 1], "transformer.wte"),
        ("bert", [3], "bert.embeddings.word_embeddings"),
        ("t5", [3], "shared"),
        ("opt", {"embed_tokens": [5]}, "model.decoder.embed_tokens"),
        ("gpt2", {"wpe": [2]}, "transformer.wpe"),
    ],
)
def test_trainable_tokens(name: str, wanted: Any, path: str) -> None:
    target = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q", "opt": "q_proj"}[name]
    theirs, ours = configs("lora", target_modules=[target], trainable_token_indices=wanted)
    wrapped = wrap(tiny(name), theirs)
    adapter = fa.init(ours_on(name), ours)
    rows = next(iter(wanted.values())) if isinstance(wanted, dict) else wanted
    assert [p for p, leaves in adapter.params.items() if "trainable_tokens_delta" in leaves] == [path]
    assert adapter.buffers[path]["token_indices"].tolist() == rows
    keys = peft.get_peft_model_state_dict(wrapped)
    assert [k for k in keys if "token" in k.rsplit(".", 1)[1]] == [
        f"base_model.model.{path}.token_adapter.trainable_tokens_delta"
    ]


def test_token_errors() -> None:
    model = ours_on("llama")
    for wanted, message in (
        ([99], r"in \[0, 32\), got \[99\]"),
        ([1, 1], "distinct"),
        ({"embed_token": [1]}, "matches no module.*embed_tokens"),
    ):
        with pytest.raises(fa.TargetError, match=message):
            fa.init(model, fa.LoraConfig(target_modules=["q_proj"], trainable_token_indices=wanted))
    with pytest.raises(ValueError, match="both trainable_token_indices and modules_to_save"):
        fa.init(
            model,
            fa.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
        )


STRICT: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": ["q_proj", "v_prj"]}, r"'v_prj', which matches no module.*Did you mean 'v_proj'"),
    ("llama", {"target_modules": ["attention"]}, r"not found in the base model"),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["o_prj"]}, r"excludes nothing.*'o_proj'"),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": r"q_proj"}, r"excludes nothing"),
    (
        "llama",
        {"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 2}},
        r"rank_pattern has the key 'q_prj'.*q_proj",
    ),
    ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, r"alpha_pattern has the key 'v_proj'"),
    (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_heads"]},
        r"'lm_heads', which matches no .*lm_head",
    ),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers"]}, r"'model.layers', which is a ModuleList"),
    ("llama", {"target_modules": ["down_proj"], "modules_to_save": ["proj"]}, r"trained twice"),
    ("mixtral", {"target_parameters": ["gate_up_prj", "down_proj"]}, r"'gate_up_prj'.*no parameter.*gate_up_proj"),
    ("llama_tied", {"target_modules": ["lm_head", "embed_tokens"]}, r"share one tied weight.*exclude_modules"),
    ("llama", {"target_modules": "q_proj"}, r"regular expression for a module's whole path.*list: \['q_proj'\]"),
    ("llama", {"target_modules": ".*q_prj"}, r"not found in the base model\. Please.*again\. Did you mean 'q_proj'"),
    ("gpt2", {"target_modules": ["wte", "lm_head"]}, r"share one tied weight"),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"'layers_to_transform': \(9,\)"),
]


@pytest.mark.parametrize(("name", "fields", "message"), STRICT)
def test_what_peft_ignores_is_an_error(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fa.TargetError, match=message):
        fa.init(ours_on(name), fa.LoraConfig(**fields))


def test_no_default_for_this_model() -> None:
    with pytest.raises(fa.TargetError, match="Please specify `target_modules`"):
        fa.init(nn.Linear(2, 2), fa.LoraConfig())

    class Odd(nn.Module):
        config = {"model_type": "lama"}

    with pytest.raises(fa.TargetError, match=r"no default for model type 'lama'\. Did you mean 'llama'"):
        fa.sites(Odd(), fa.LoraConfig())


def test_lenient_on_request() -> None:
    config = fa.LoraConfig(target_modules=["q_proj", "nope"], exclude_modules=["nope"], rank_pattern={"nope": 2})
    assert len(fa.sites(ours_on("llama"), config, strict=False)) == 2


def test_the_table_prints() -> None:
    table = fa.sites(ours_on("llama_tied"), fa.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    lines = repr(table).splitlines()
    assert lines[0].split() == ["path", "kind", "shape", "parameters", "tied", "with"]
    assert lines[1].split() == ["model.embed_tokens", "embedding", "16x32", "512", "lm_head.weight"]
    assert lines[2].split() == ["model.layers.0.self_attn.q_proj", "linear", "16x16", "256"]
    assert lines[-1] == "3 sites, 1,024 base parameters"
    assert repr(table[:2]).splitlines()[-1] == "2 sites, 768 base parameters"
    assert repr(table[1:2]).splitlines()[-1] == "1 site, 256 base parameters"
    experts = fa.sites(ours_on("mixtral"), fa.LoraConfig(target_parameters=["down_proj"]))
    assert repr(experts).splitlines()[1].split()[1:3] == ["experts", "3x16x24"]


def test_expect() -> None:
    config = fa.LoraConfig(target_modules=["q_proj"])
    assert len(fa.sites(ours_on("llama"), config, expect=2)) == 2
    with pytest.raises(fa.TargetError, match=r"Expected 3 sites, got 2:\npath .*\n.*q_proj"):
        fa.sites(ours_on("llama"), config, expect=3)
    with pytest.raises(fa.TargetError, match="Expected 3 sites"):
        fa.init(ours_on("llama"), config, expect=3)


def test_layers_that_a_method_cannot_adapt() -> None:
    with pytest.raises(fa.SiteError, match=r"cannot adapt 'model\.layers\.0\.self_attn'.*LlamaAttention"):
        fa.sites(ours_on("llama"), fa.LoraConfig(target_modules=["self_attn"]))
    with pytest.raises(fa.SiteError, match="max_norm"):
        fa.sites(nn.ModuleDict({"e": nn.Embedding(4, 2, max_norm=1.0)}), fa.LoraConfig(target_modules=["e"]))
    split = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(fa.SiteError, match=r"target_parameters=\['a.q_proj_weight'"):
        fa.sites(split, fa.LoraConfig(target_modules=["a"]))
    with pytest.raises(fa.SiteError, match="is an embedding: it has no input to scale"):
        fa.init(layer_model("embedding")[0], fa.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]))


@pytest.mark.parametrize(
    ("names", "path", "feedforward"),
    [
        (["output.dense"], "a.output.dense", True),
        (["dense"], "a.my_dense", True),  # PEFT: no dot needed, unlike target_modules
        (["dense"], "a.dense.b", False),
        (r".*dense", "a.dense", True),
        (r"dense", "a.dense", False),
        ([], "dense", False),
    ],
)
def test_feedforward_rule(names: Any, path: str, feedforward: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            at: nn.Module = self
            *owners, name = path.split(".")
            for owner in owners:
                setattr(at, owner, nn.Module())
                at = getattr(at, owner)
            setattr(at, name, nn.Linear(2, 3))

    # a regular expression selects the layer in PEFT and here, whatever feedforward_modules says
    theirs, ours = configs("ia3", target_modules=".*" + path.rpartition(".")[2], feedforward_modules=names)
    key = f"{path}.ia3_l.default"
    shape = dict(wrap(Model(), theirs).base_model.model.named_parameters())[key].shape
    assert tuple(fa.init(Model(), ours).params[path]["ia3_l"].shape) == tuple(shape)
    assert (tuple(shape) == (1, 2)) == feedforward


def test_names_match() -> None:
    assert names_match(["q"], "a.q")
    assert names_match(["a.q"], "a.q")
    assert not names_match(["q"], "a.xq")
    assert names_match("a.q", "axq")
    assert not names_match("q", "a.q")
