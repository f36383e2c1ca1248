"""The wrappers of modules that are trained beside the adapters, against PEFT's and against the dense truth."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from typing import Any

import peft.utils.other as peft_other
import pytest
import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict as PeftBufferDict
from torch import nn

from funcadapt.binding import TOKENS
from funcadapt.view import auxiliary as ours
from funcadapt.view.auxiliary import BufferDict, ModulesToSaveWrapper, TrainableTokensWrapper

BOTH = pytest.mark.parametrize("lib", [ours, peft_other], ids=["funcadapt", "peft"])
IDS = torch.tensor([[0, 3, 5, 1], [5, 2, 2, 4]])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def embedding(**options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(6, 4, **options)


def seen(wrapper: Any) -> tuple[Any, ...]:
    """What can be observed of a wrapper from outside."""
    return (
        sorted(wrapper._adapters),
        list(wrapper.active_adapters),
        wrapper.disable_adapters,
        sorted(wrapper._get_available_adapters()),
        list(wrapper.state_dict()),
        [(name, p.requires_grad) for name, p in wrapper.named_parameters()],
        repr(wrapper),
    )


def saved_script(lib: Any, steps: str) -> list[Any]:
    """A life of a ModulesToSaveWrapper, and what is seen of it on the way."""
    wrapper = lib.ModulesToSaveWrapper(linear(), "a")
    wrapper.set_adapter("a")
    x, log = torch.ones(2, 4), [seen(wrapper)]
    for step in steps.split():
        name, _, argument = step.partition(":")
        if name == "update":
            wrapper.update(argument)
        elif name == "train":
            with torch.no_grad():
                for p in wrapper.modules_to_save[argument].parameters():
                    p += 1 if argument == "a" else 2
        elif name == "set":
            wrapper.set_adapter(argument.split(",") if argument else [])
        elif name == "frozen":
            wrapper.set_adapter(argument, inference_mode=True)
        elif name == "enable":
            wrapper.enable_adapters(bool(int(argument)))
        elif name == "grad":
            wrapper.set_requires_grad(argument[1:], argument[0] == "+")
        elif name == "delete":
            gone, _, new = argument.partition(">")
            wrapper.delete_adapter(gone, new_active_adapters=new.split(",") if new else [])
        log += [seen(wrapper), wrapper(x).tolist(), wrapper.weight.sum().item(), wrapper.bias.tolist()]
        state = wrapper.state_dict()
        log += [wrapper.adapter_state_dict_load_map(n) for n in ("a", "b", "c")]
        log += [{k: v.tolist() for k, v in wrapper.adapter_state_dict(n, state).items()} for n in ("a", "b")]
    log.append(repr(wrapper.unload_and_optionally_merge_module(True, False, None)))
    return log


@pytest.mark.parametrize(
    "steps",
    [
        "train:a",
        "train:a update:b set:b train:b set:a",
        "update:b train:b set:b delete:b>a",
        "update:b train:a delete:a>b",
        "train:a delete:a",
        "update:b set:b delete:b>c",
        "train:a enable:0 enable:1",
        "train:a set: update:b set:b",
        "train:a frozen:a grad:+a grad:-a grad:+zz",
        "update:a train:a update:a",
        "delete:zz update:b delete:b>a",
    ],
)
def test_modules_to_save_lives_like_pefts(steps: str) -> None:
    assert saved_script(ours, steps) == saved_script(peft_other, steps)


@BOTH
@pytest.mark.parametrize("module", [nn.ModuleDict(), nn.ModuleList(), nn.ParameterDict(), nn.ParameterList()])
def test_containers_are_refused(lib: Any, module: nn.Module) -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        lib.ModulesToSaveWrapper(module, "a")


@BOTH
def test_one_module_at_a_time(lib: Any) -> None:
    wrapper = lib.ModulesToSaveWrapper(linear(), "a")
    wrapper.update("b")
    with pytest.raises(ValueError, match="multiple"):
        wrapper.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrapper.check_set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="at least one adapter"):
        wrapper.check_set_adapter([])
    with pytest.raises(ValueError, match="not found"):
        wrapper.set_adapter("zz")
    with pytest.raises(ValueError, match="multiple"):
        wrapper.delete_adapter("a", ["b", "c"])
    assert wrapper.check_set_adapter(["zz", "b"]) == "b"
    assert wrapper.check_set_adapter(["zz"]) is None


@BOTH
def test_rows_choose_their_module(lib: Any) -> None:
    wrapper = lib.ModulesToSaveWrapper(linear(), "a")
    wrapper.update("b")
    for i, name in enumerate("ab"):
        nn.init.constant_(wrapper.modules_to_save[name].weight, i + 1.0)
    x = torch.randn(4, 4)
    y = wrapper(x, adapter_names=["b", "__base__", "a", "b"])
    rows = [wrapper.modules_to_save["b"], wrapper.original_module, wrapper.modules_to_save["a"]]
    torch.testing.assert_close(y, torch.stack([m(row) for m, row in zip([*rows, rows[0]], x, strict=True)]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        wrapper(x, adapter_names=["a"])


def test_saved_values_are_put_in_place() -> None:
    """What PEFT's constructor lacks: the copy's values, of nested modules and buffers too."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    values = {"0.weight": torch.randn(3, 4), "1.running_mean": torch.ones(3)}
    wrapper = ModulesToSaveWrapper(module, "a", values=values)
    held = wrapper.modules_to_save["a"]
    assert torch.equal(held.get_parameter("0.weight"), values["0.weight"])
    assert torch.equal(held.get_buffer("1.running_mean"), torch.ones(3))
    assert torch.equal(held.get_parameter("0.bias"), module[0].bias)
    assert not torch.equal(module[0].weight, values["0.weight"])
    with pytest.raises(ValueError, match="no parameter or buffer 'scale'"):
        ModulesToSaveWrapper(module, "a", values={"scale": torch.ones(1)})


def test_hooks_of_accelerate_are_copied() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Twice(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    bare, module = linear(), linear()
    add_hook_to_module(module, Twice())
    wrapper = ModulesToSaveWrapper(module, "a")
    with torch.no_grad():
        wrapper.modules_to_save["a"].weight.zero_()
        wrapper.modules_to_save["a"].bias.fill_(3)
    x = torch.randn(2, 4)
    torch.testing.assert_close(wrapper(x), torch.full((2, 3), 6.0))
    torch.testing.assert_close(wrapper.original_module(x), 2 * bare(x))


def test_tied_copy_shares_the_weight() -> None:
    table = embedding()
    for lib in (ours, peft_other):
        wrapper = lib.ModulesToSaveWrapper(nn.Linear(4, 6, bias=False), "a", tied_module=table)
        assert wrapper.modules_to_save["a"].weight is table.weight
        if lib is ours:  # PEFT has in_features and out_features the wrong way round
            assert repr(wrapper.modules_to_save["a"]) == "Linear(in_features=4, out_features=6, bias=False)"
        assert wrapper(torch.ones(1, 4)).shape == (1, 6)


@pytest.mark.parametrize("make", [lambda: ModulesToSaveWrapper(linear(), "a"), lambda: tokens(ours, embedding())])
def test_copies_and_pickles(make: Any) -> None:
    wrapper = make()
    wrapper.set_adapter("a")
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert repr(twin) == repr(wrapper)
        assert list(twin.state_dict()) == list(wrapper.state_dict())
        assert twin.weight.shape == wrapper.weight.shape
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapper.nonsense


# -- trained rows -----------------------------------------------------------------------------------------


def tokens(lib: Any, module: nn.Module, indices: tuple[int, ...] = (1, 5), **options: Any) -> Any:
    return lib.TrainableTokensWrapper(module, "a", token_indices=list(indices), **options)


def trained(wrapper: Any, name: str = "a") -> torch.Tensor:
    rows = wrapper.token_adapter.trainable_tokens_delta[name]
    torch.manual_seed(1)
    with torch.no_grad():
        rows.copy_(torch.randn_like(rows))
    return rows


class Scaled(nn.Embedding):
    """As in Gemma 3."""

    embed_scale = torch.tensor(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


@pytest.mark.parametrize(
    "module",
    [
        embedding(),
        embedding(padding_idx=5),
        embedding(padding_idx=2),
        embedding(max_norm=0.5),
        embedding(scale_grad_by_freq=True),
        Scaled(6, 4),
        nn.Linear(4, 6, bias=False),
    ],
    ids=["plain", "padding row", "other padding", "max_norm", "by frequency", "scaled", "head"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_act_and_train_like_pefts(module: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, dtype=dtype) if isinstance(module, nn.Linear) else IDS
    results = []
    for lib in (ours, peft_other):
        wrapper = tokens(lib, copy.deepcopy(module).to(dtype))
        rows = trained(wrapper)
        y = wrapper(x)
        y.square().sum().backward()
        results.append((y, rows.grad, wrapper.original_module.weight.grad, wrapper.weight))
    for ours_, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_rows_under_double_backward_and_gradcheck() -> None:
    wrapper = tokens(ours, embedding().double())
    rows = trained(wrapper)

    def f(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(wrapper, {f"token_adapter.{TOKENS}.a": value}, (IDS,))

    assert torch.autograd.gradcheck(f, rows)
    assert torch.autograd.gradgradcheck(f, rows)


def test_a_tied_head_keeps_its_bias() -> None:
    """PEFT drops it without a word."""
    outputs = {}
    for lib in (ours, peft_other):
        table, head = embedding(), nn.Linear(4, 6)
        head.weight = table.weight
        nn.init.ones_(head.bias)
        first = tokens(lib, table)
        second = tokens(lib, head, tied_adapter=first.token_adapter)
        dense = table.weight.index_copy(0, torch.tensor([1, 5]), trained(first))
        x = torch.randn(3, 4)
        outputs[lib] = second(x) - F.linear(x, dense, head.bias)
    assert outputs[ours].abs().max() < 1e-6
    torch.testing.assert_close(outputs[peft_other], -torch.ones(3, 6))


def test_tied_heads_share_rows_like_pefts() -> None:
    logs = []
    for lib in (ours, peft_other):
        table, head = embedding(), nn.Linear(4, 6, bias=False)
        head.weight = table.weight
        model = nn.ModuleDict({"table": tokens(lib, table)})
        model["head"] = tokens(lib, head, tied_adapter=model["table"].token_adapter)
        for part in model.values():
            part.set_adapter("a")
        rows = trained(model["table"])
        y = model["head"](model["table"](IDS))
        y.sum().backward()
        state = {k.removeprefix("head."): v for k, v in model.state_dict().items() if k.startswith("head.")}
        log = [repr(model), list(model.state_dict()), y.tolist(), rows.grad.tolist()]
        log += [model["head"].adapter_state_dict("a", state), model["head"].adapter_state_dict_load_map("a")]
        model["table"].update("b", token_indices=[2])
        model["head"].update("b", token_indices=[2], tied_adapter=model["table"].token_adapter)
        log += [sorted(part._get_available_adapters()) for part in model.values()]
        for part in model.values():
            with pytest.warns(UserWarning, match="Setting active adapter to b"):
                part.delete_adapter("a", ["b"])
        log += [sorted(part._get_available_adapters()) for part in model.values()]
        log += [part.active_adapters for part in model.values()]
        logs.append(log)
    y, theirs = logs[0].pop(2), logs[1].pop(2)
    torch.testing.assert_close(torch.tensor(y), torch.tensor(theirs))
    grad, their_grad = logs[0].pop(2), logs[1].pop(2)
    torch.testing.assert_close(torch.tensor(grad), torch.tensor(their_grad))
    assert logs[0] == logs[1]


def token_script(lib: Any, steps: str) -> list[Any]:
    wrapper = tokens(lib, embedding())
    wrapper.set_adapter("a")
    trained(wrapper)
    log = [seen(wrapper)]
    for step in steps.split():
        name, _, argument = step.partition(":")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if name == "update":
                    wrapper.update(argument, token_indices=[{"b": 2, "c": 5}[argument]])
                    trained(wrapper, argument)
                elif name == "set":
                    wrapper.set_adapter(argument.split(",") if argument else [])
                elif name == "frozen":
                    wrapper.set_adapter(argument, inference_mode=True)
                elif name == "enable":
                    wrapper.enable_adapters(bool(int(argument)))
                elif name == "grad":
                    wrapper.set_requires_grad(argument[1:], argument[0] == "+")
                elif name == "merge":
                    wrapper.token_adapter.merge(adapter_names=argument.split(",") if argument else None)
                elif name == "unmerge":
                    wrapper.token_adapter.unmerge()
                elif name == "delete":
                    gone, _, new = argument.partition(">")
                    wrapper.delete_adapter(gone, new_active_adapters=new.split(",") if new else [])
                log += [wrapper(IDS).tolist(), wrapper.weight.tolist()]
            except (ValueError, TypeError) as error:
                log.append((type(error), str(error)[:60]))
        log += [str(w.message) for w in caught] + [seen(wrapper), wrapper.token_adapter.merged_adapters[:]]
        state = wrapper.state_dict()
        log += [
            {k: v.tolist() for k, v in wrapper.adapter_state_dict("a", state).items()} if "delete" not in steps else 0
        ]
    with warnings.catch_warnings(record=True), contextlib.suppress(ValueError):
        warnings.simplefilter("always")
        wrapper.unload_and_optionally_merge_module(True, False, None)
    return [*log, wrapper.token_adapter.base_layer.weight.tolist()]


@pytest.mark.parametrize(
    "steps",
    [
        "set:a",
        "update:b set:b set:a,b",
        "update:c set:a,c",
        "update:c merge:a,c",
        "update:b merge:a merge:a,b unmerge",
        "merge: merge: unmerge unmerge",
        "enable:0 enable:1",
        "merge: enable:0",
        "set: enable:1",
        "frozen:a grad:+a grad:-a grad:+zz",
        "update:b set:b delete:b>a",
        "update:b delete:a>b",
        "delete:a",
    ],
)
def test_trained_rows_live_like_pefts(steps: str) -> None:
    assert token_script(ours, steps) == token_script(peft_other, steps)


def test_unmerging_restores_a_base_that_was_loaded_later() -> None:
    """PEFT puts back the rows that were there when the adapter was made."""
    later = torch.ones(6, 4)
    for lib, right in ((ours, True), (peft_other, False)):
        wrapper = tokens(lib, embedding())
        wrapper.original_module.weight.data.copy_(later)
        wrapper.token_adapter.merge()
        wrapper.token_adapter.unmerge()
        assert torch.equal(wrapper.original_module.weight, later) is right


def test_safe_merge_refuses_before_writing() -> None:
    wrapper = tokens(ours, embedding())
    before = wrapper.original_module.weight.clone()
    wrapper.token_adapter.trainable_tokens_delta["a"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        wrapper.token_adapter.merge(safe_merge=True)
    with pytest.raises(TypeError, match="list of strings"):
        wrapper.token_adapter.merge(adapter_names="a")
    assert torch.equal(wrapper.original_module.weight, before)
    assert not wrapper.token_adapter.merged


@pytest.mark.parametrize("indices", [(1, 6), (-1,), (2, 2)])
def test_bad_indices_are_errors(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be distinct and in \[0, 6\)"):
        tokens(ours, embedding(), indices)


def test_row_values_are_put_in_place() -> None:
    rows = torch.randn(2, 4)
    wrapper = tokens(ours, embedding(), values={TOKENS: rows})
    assert torch.equal(wrapper(torch.tensor([5, 1])), rows[[1, 0]])
    with pytest.raises(ValueError, match=r"has shape \(1, 4\), expected \(2, 4\)"):
        tokens(ours, embedding(), values={TOKENS: rows[:1]})


def test_other_layers_have_no_rows() -> None:
    """PEFT raises AttributeError when the adapter is made, or ValueError in the first call."""
    with pytest.raises(ValueError, match=r"unknown layer type.* It is a Conv1d"):
        tokens(ours, nn.Conv1d(4, 6, 1))


@pytest.mark.parametrize("module", [embedding(), Scaled(6, 4), nn.Linear(4, 6)], ids=["plain", "scaled", "head"])
def test_rows_compile_in_one_frame(module: nn.Module) -> None:
    wrapper = tokens(ours, module)
    rows = trained(wrapper)
    x = torch.randn(2, 4) if isinstance(module, nn.Linear) else IDS
    expected = wrapper(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), rows)
    y = torch.compile(wrapper, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.square().sum(), rows)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_saved_module_compiles_in_one_frame() -> None:
    wrapper = ModulesToSaveWrapper(linear(), "a")
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(wrapper, fullgraph=True, backend="eager")(x), wrapper(x))


def test_rows_of_a_mixed_batch() -> None:
    wrapper = tokens(ours, embedding())
    wrapper.update("b", token_indices=[0])
    trained(wrapper), trained(wrapper, "b")
    x = IDS.repeat(2, 1)
    y = wrapper(x, adapter_names=["b", "a", "__base__", "a"])
    for i, names in enumerate((["b"], ["a"], [], ["a"])):
        torch.testing.assert_close(y[i], wrapper.token_adapter.forward_adapters(x[i], names))


# -- BufferDict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_buffer_dict_is_pefts(persistent: bool) -> None:
    logs = []
    for cls in (BufferDict, PeftBufferDict):
        held = cls({"a": torch.zeros(2, 3), "b": torch.ones(1)}, persistent=persistent)
        log: list[Any] = [repr(held), list(held), len(held), "a" in held, "c" in held, list(held.state_dict())]
        held["c"] = torch.arange(2)
        held.update([("d", torch.ones(2))])
        log += [held.pop("a").tolist(), list(held.keys()), [v.tolist() for v in held.values()], repr(held)]
        del held["b"]
        log += [[k for k, _ in held.items()], [n for n, _ in nn.Sequential(held).named_buffers()]]
        for bad in (3, [3], [("x",)]):
            with pytest.raises((TypeError, ValueError)) as caught:
                held.update(bad)
            log.append(caught.type)
        with pytest.raises(RuntimeError, match="should not be called"):
            held(1)
        with pytest.raises(KeyError):
            held["zz"]
        held.clear()
        logs.append([*log, len(held)])
    assert logs[0] == logs[1]


def test_peft_has_the_same_attributes() -> None:
    """Everything public that PEFT's wrappers have on their classes and instances, ours have too."""
    for name in ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper"):
        theirs = {a for a in dir(getattr(peft_other, name)) if not a.startswith("_")}
        assert theirs - set(dir(getattr(ours, name))) <= {"check_module", "init_modules"}
    pairs = [(tokens(lib, embedding()).token_adapter) for lib in (ours, peft_other)]
    theirs = {a for a in dir(pairs[1]) if not a.startswith("_")}
    missing = theirs - set(dir(pairs[0]))
    assert missing <= {"frozen_peft_weight_names", "get_base_weight", "quantization_backend", "set_base_weight"} | {
        "supports_lora_conversion",
        "kwargs",
    }
    assert isinstance(TrainableTokensWrapper.adapter_layer_names, tuple)
