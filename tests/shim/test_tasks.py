"""The task classes, generation, rows with adapters of their own, weighted and mixed adapters, beside PEFT's."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import peft
import pytest
import torch
from both import equal, files, fill, flags, on_both, same, same_error, state
from peft_tools import layer_model, logits, tiny, tokens
from test_peft_model import CONFIGS, make, wrapped
from torch import nn

import funcadapt.peft as shim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")  # PEFT's advice

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def base(task: str) -> nn.Module:
    import transformers as tf

    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"):
        model = tiny({"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5", "SEQ_CLS": "llama_cls"}[task])
        if task == "SEQ_2_SEQ_LM":
            model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
        return model
    name = {"TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering"}.get(task, "Model")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = getattr(tf, f"Bert{name}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def inputs(task: str) -> dict[str, torch.Tensor]:
    ids = tokens("llama")["input_ids"]
    labels = {
        "SEQ_CLS": {"labels": torch.tensor([0, 1])},
        "TOKEN_CLS": {"labels": ids % 2},
        "QUESTION_ANS": {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
        "FEATURE_EXTRACTION": {},
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels.get(task, {"labels": ids})}


def target(task: str) -> list[str]:
    return {"SEQ_2_SEQ_LM": ["q", "v"], "CAUSAL_LM": ["q_proj", "v_proj"], "SEQ_CLS": ["q_proj"]}.get(task, ["query"])


def model_for(package: Any, task: str, **fields: Any) -> Any:
    values = {"r": 2, "target_modules": target(task), "task_type": task, **fields}
    return package.get_peft_model(base(task), package.LoraConfig(**copy.deepcopy(values)))


def first(output: Any) -> torch.Tensor:
    return next(v for k, v in output.items() if k != "loss").detach()


@pytest.mark.parametrize("task", TASKS)
def test_a_task(task: str, tmp_path: Any) -> None:
    def scenario(package: Any) -> Any:
        model = fill(model_for(package, task)).eval()
        seen: dict[str, Any] = {"class": type(model).__name__, "state": state(model), "flags": flags(model)}
        output = model(**inputs(task))
        seen["output"] = {k: v for k, v in output.items() if isinstance(v, torch.Tensor)}
        seen["tuple"] = model(**inputs(task), return_dict=False)[0]
        if "loss" in output:
            output["loss"].backward()
            seen["grads"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.add_adapter("second", package.LoraConfig(r=2, target_modules=target(task), task_type=task))
        seen["saved"] = model.modules_to_save, [c.modules_to_save for c in model.peft_config.values()]
        model.set_adapter("second")
        seen["second"], seen["second flags"] = first(model(**inputs(task))), flags(model)
        model.save_pretrained(tmp_path / package.__name__)
        seen["files"] = files(tmp_path / package.__name__)
        loaded = package.PeftModel.from_pretrained(base(task), tmp_path / package.__name__)
        seen["loaded"] = type(loaded).__name__, first(loaded(**inputs(task)))
        seen["signature"] = list(inspect.signature(model.forward).parameters)
        return seen

    same(scenario, tolerance=1e-4)


def test_the_ids_of_question_answering_reach_the_model() -> None:
    """PEFT names `token_type_ids` and `position_ids` in its forward, and drops them."""
    ids = {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), "position_ids": torch.arange(6)[None] + 3}

    def scenario(package: Any) -> Any:
        model = model_for(package, "QUESTION_ANS").eval()
        return first(model(input_ids=inputs("QUESTION_ANS")["input_ids"], **ids))

    theirs, ours = on_both(scenario)
    model = base("QUESTION_ANS")
    equal(first(model(input_ids=inputs("QUESTION_ANS")["input_ids"])), theirs.value)
    equal(first(model(input_ids=inputs("QUESTION_ANS")["input_ids"], **ids)), ours.value)


def test_a_head_among_the_targets_is_trained_in_full() -> None:
    """PEFT adapts it first, and then cannot wrap what it made."""

    def scenario(package: Any) -> Any:
        return type(model_for(package, "TOKEN_CLS", target_modules="all-linear").base_model.model.classifier).__name__

    theirs, ours = on_both(scenario)
    assert isinstance(theirs.error, TypeError)
    assert ours.value == "ModulesToSaveWrapper"


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", None])
def test_generation(task: str | None, settings: dict[str, Any]) -> None:
    def scenario(package: Any) -> Any:
        kind = task or "CAUSAL_LM"
        values = {"r": 2, "target_modules": target(kind), "task_type": task}
        model = fill(package.get_peft_model(base(kind), package.LoraConfig(**values))).eval()
        torch.manual_seed(4)
        return model.generate(input_ids=inputs(kind)["input_ids"], max_new_tokens=5, pad_token_id=0, **settings)

    same(scenario)


def test_adalora_in_training(tmp_path: Any) -> None:
    """Its penalty is in the loss of the task classes, and its ranks are allocated in training."""

    def scenario(package: Any) -> Any:
        config = package.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=5, target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM", orth_reg_weight=0.5,
        )  # fmt: skip
        model = fill(package.get_peft_model(tiny("llama"), config)).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        batch, seen = tokens("llama"), []
        for step in range(1, 6):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            seen.append(loss.detach())
        model.eval()
        truth = logits(model(**batch)).detach()
        model.save_pretrained(tmp_path / package.__name__)
        loaded = package.PeftModel.from_pretrained(tiny("llama"), tmp_path / package.__name__)
        return seen, truth, logits(loaded(**batch)).detach()

    same(scenario, tolerance=1e-3, warn=False)  # PEFT warns of the rank pattern that it wrote itself


def test_adalora_is_evaluated_after_loading(tmp_path: Any) -> None:
    """PEFT's looks for the adapter in training, and raises AttributeError once there are labels."""
    config = shim.AdaLoraConfig(total_step=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    shim.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    batch = tokens("llama")

    def scenario(package: Any) -> Any:
        model = package.PeftModel.from_pretrained(tiny("llama"), tmp_path)
        return model(**batch, labels=batch["input_ids"]).loss.detach()

    theirs, ours = on_both(scenario)
    assert isinstance(theirs.error, AttributeError)
    equal(tiny("llama")(**batch, labels=batch["input_ids"]).loss.detach(), ours.value, 1e-3)


# -- rows with adapters of their own ------------------------------------------------------------------------

NAMES = ["default", "__base__", "second", "default"]


def rowed(package: Any, name: str, **fields: Any) -> Any:
    model = package.get_peft_model(tiny("llama"), make(package, name, **fields))
    more = {"target_modules": ["k_proj", "q_proj"], **({"r": 2} if name not in ("ia3", "patterns") else {})}
    model.add_adapter("second", make(package, name, **{**fields, **more}))
    return fill(model).eval()


def four_rows() -> torch.Tensor:
    return torch.randint(2, 32, (4, 6), generator=torch.Generator().manual_seed(2))


def by_hand(model: Any, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits(model(input_ids=row[None])).detach())
        else:
            model.set_adapter(name)
            rows.append(logits(model(input_ids=row[None])).detach())
    return torch.cat(rows)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("pissa", "olora", "bias", "saved")])
def test_each_row_has_its_adapter(name: str, task: str | None) -> None:
    """For every method. PEFT refuses DoRA, and takes the active adapter for all rows of IA3 (defect B10)."""
    model = rowed(shim, name, task_type=task)
    ids = four_rows()
    found = logits(model(input_ids=ids, adapter_names=NAMES)).detach()
    equal(by_hand(model, ids, NAMES), found, 1e-4)
    if name not in ("dora", "ia3"):
        theirs = logits(rowed(peft, name, task_type=task)(input_ids=ids, adapter_names=NAMES)).detach()
        equal(theirs, found, 1e-4)
    if name == "ia3":
        theirs = rowed(peft, name, task_type=task)
        active = logits(theirs(input_ids=ids)).detach()
        equal(active, logits(theirs(input_ids=ids, adapter_names=NAMES)).detach())
        assert not torch.allclose(active, found, atol=1e-3)


def test_rows_with_saved_modules_and_tokens() -> None:
    def scenario(package: Any) -> Any:
        model = model_for(package, "SEQ_CLS", trainable_token_indices=[3, 5])
        model.add_adapter(
            "second",
            package.LoraConfig(r=2, target_modules=["v_proj"], task_type="SEQ_CLS", trainable_token_indices=[4]),
        )
        fill(model, seed=7).eval()
        model.set_adapter("second")
        fill(model, seed=8)
        ids = torch.randint(2, 8, (4, 6), generator=torch.Generator().manual_seed(2))
        return logits(model(input_ids=ids, adapter_names=NAMES)).detach()

    same(scenario, tolerance=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_rows_in_generation(task: str, settings: dict[str, Any]) -> None:
    def scenario(package: Any) -> Any:
        model = model_for(package, task)
        model.add_adapter("second", package.LoraConfig(r=2, target_modules=target(task), task_type=task))
        fill(model).eval()
        out = model.generate(
            input_ids=four_rows(), adapter_names=NAMES, max_new_tokens=6, pad_token_id=0, eos_token_id=99, **settings
        )
        return [row.tolist() for row in out]

    same(scenario)


def test_rows_of_returned_sequences() -> None:
    """PEFT repeats the names for `num_beams` alone, and fails here for their number."""

    def scenario(package: Any) -> Any:
        model = rowed(package, "lora", task_type="CAUSAL_LM")
        settings = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 99}
        torch.manual_seed(1)
        many = model.generate(
            input_ids=four_rows(), adapter_names=NAMES, num_return_sequences=2, do_sample=True, top_k=1, **settings
        )
        return many[::2], many[1::2], model.generate(input_ids=four_rows(), adapter_names=NAMES, **settings)

    theirs, ours = on_both(scenario)
    assert isinstance(theirs.error, ValueError)
    assert ours.error is None, ours.error
    equal(ours.value[0], ours.value[2])
    equal(ours.value[1], ours.value[2])


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("non-existing adapter", lambda m, x: m(input_ids=x, adapter_names=["default", "typo", "default", "default"])),
        ("", lambda m, x: m(input_ids=x, adapter_names=["default"] * 3)),
        ("training mode", lambda m, x: m.train()(input_ids=x, adapter_names=NAMES)),
        ("", lambda m, x: (m.merge_adapter(), m(input_ids=x, adapter_names=NAMES))),
    ],
)
def test_rows_that_cannot_be(text: str, call: Any) -> None:
    same_error(lambda package: call(rowed(package, "lora"), four_rows()), text)


def test_after_a_failed_call_nothing_is_left() -> None:
    """PEFT's hooks stay (defect B13), and the rows of later calls have the adapters of the failed one."""

    def scenario(package: Any) -> Any:
        model = rowed(package, "lora")
        with pytest.raises(RuntimeError, match="Expected"):
            model(input_ids=four_rows().double(), adapter_names=NAMES)
        return logits(model(input_ids=four_rows())).detach()

    truth = logits(rowed(shim, "lora")(input_ids=four_rows())).detach()
    theirs, ours = on_both(scenario)
    assert ours.error is None, ours.error
    equal(truth, ours.value)
    assert not torch.allclose(truth, theirs.value, atol=1e-3)


def test_disabled_rows_are_the_base_models() -> None:
    def scenario(package: Any) -> Any:
        model = rowed(package, "lora")
        with model.disable_adapter():
            return logits(model(input_ids=four_rows(), adapter_names=NAMES)).detach()

    equal(logits(tiny("llama")(input_ids=four_rows())).detach(), same(scenario), 1e-4)


# -- weighted adapters --------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 3},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "dare_linear_svd": {"density": 0.7},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weighted(kind: str, tmp_path: Any) -> None:
    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), make(package, "lora"))
        model.add_adapter("second", make(package, "lora", lora_alpha=3))
        fill(model).eval()
        before = flags(model)
        torch.manual_seed(2)
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type=kind, **KINDS[kind])
        model.add_weighted_adapter(["default"], [9.0], "both", combination_type=kind)  # the name is taken: nothing
        after = {name: flag for name, flag in flags(model).items() if name in before}
        assert before == after
        assert not any(flag for name, flag in flags(model).items() if ".both." in name)
        seen = [model.active_adapters, list(model.peft_config), model.peft_config["both"].r]
        first = logits(model(**tokens("llama"))).detach()
        model.set_adapter("both")
        second = logits(model(**tokens("llama"))).detach()
        model.save_pretrained(tmp_path / package.__name__, selected_adapters=["both"])
        loaded = package.PeftModel.from_pretrained(tiny("llama"), tmp_path / package.__name__ / "both")
        return [*seen, first, second, logits(loaded(**tokens("llama"))).detach()]

    same(scenario, tolerance=2e-4)


def test_weighted_ia3() -> None:
    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), make(package, "ia3"))
        model.add_adapter("second", make(package, "ia3", target_modules=["k_proj", "v_proj"]))
        fill(model).eval()
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both")
        model.set_adapter("both")
        return logits(model(**tokens("llama"))).detach(), sorted(model.peft_config["both"].target_modules)

    # one of the two has nothing at k and q, where PEFT's sum of weights is below one
    theirs, ours = on_both(scenario)
    assert theirs.error is None
    assert ours.error is None, ours.error
    assert theirs.value[1] == ours.value[1]


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_rslora(kind: str) -> None:
    """PEFT's is wrong by the square root of the rank (defect B9)."""

    def scenario(package: Any) -> Any:
        model = fill(package.get_peft_model(tiny("llama"), make(package, "rslora"))).eval()
        truth = logits(model(**tokens("llama"))).detach()
        model.add_weighted_adapter(["default"], [1.0], "same", combination_type=kind)
        model.set_adapter("same")
        return truth, logits(model(**tokens("llama"))).detach()

    theirs, ours = on_both(scenario)
    equal(*ours.value, 1e-4)
    assert not torch.allclose(*theirs.value, atol=1e-2)


@pytest.mark.parametrize(
    ("text", "fields", "call"),
    [
        ("does not exist", {}, (["default", "typo"], [1, 1], "x")),
        ("Invalid combination_type", {}, (["default", "second"], [1, 1], "x", "typo")),
        ("same r value", {"r": 3}, (["default", "second"], [1, 1], "x", "linear")),
        ("same target modules type", {"target_modules": ".*q_proj"}, (["default", "second"], [1, 1], "x")),
        ("modules_to_save", {"modules_to_save": ["norm"]}, (["default", "second"], [1, 1], "x")),
        ("", {}, ([], [], "x")),
    ],
)
def test_weights_that_cannot_be(text: str, fields: Any, call: Any) -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package, **({"modules_to_save": ["norm"]} if "modules_to_save" in fields else {}))
        model.add_adapter("second", make(package, "lora", **fields))
        model.add_weighted_adapter(*call)

    same_error(scenario, text)


# -- mixed models -------------------------------------------------------------------------------------------


def mixed(package: Any) -> Any:
    net, _, target = layer_model("linear")
    model = package.get_peft_model(net, package.LoraConfig(r=2, **target), mixed=True, adapter_name="one")
    other = package.AdaLoraConfig(init_r=2, target_r=1, total_step=10, inference_mode=True, **target)
    model.add_adapter("two", other)
    return model


def test_a_mixed_model() -> None:
    def scenario(package: Any) -> Any:
        _, x, _ = layer_model("linear")
        model = mixed(package)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        model.eval()
        seen: dict[str, Any] = {"first": model(x).detach(), "names": sorted(model.peft_config)}
        model.set_adapter("two")
        seen["two"] = model(x).detach()
        model.set_adapter(["one", "two"])
        seen["both"], seen["active"] = model(x).detach(), model.active_adapters
        with model.disable_adapter():
            seen["off"] = model(x).detach()
        model.print_trainable_parameters()
        bare = model.merge_and_unload()
        seen["merged"] = bare(x).detach()
        return seen

    same(scenario, tolerance=1e-4)


def test_errors_of_mixed_models() -> None:
    same_error(
        lambda p: p.get_peft_model(
            layer_model("linear")[0], p.IA3Config(target_modules=["layer"], feedforward_modules=[]), mixed=True
        ),
        "not compatible",
    )
    same_error(lambda p: mixed(p).set_adapter("typo"), "not found")
    same_error(lambda p: mixed(p).delete_adapter("typo"), "not found")
    same_error(lambda p: mixed(p).save_pretrained("x"), "not supported")
    same_error(lambda p: mixed(p).get_layer_status(), "not supported")
    same_error(lambda p: mixed(p).get_model_status(), "not supported")
    same_error(lambda p: mixed(p).add_adapter("one", p.LoraConfig(target_modules=["layer"])), "already exists")


def test_a_mixed_model_from_files(tmp_path: Any) -> None:
    net, x, target = layer_model("linear")
    for name in ("a", "b"):
        model = shim.get_peft_model(copy.deepcopy(net), shim.LoraConfig(r=2, init_lora_weights=False, **target))
        model.save_pretrained(tmp_path / name)

    def scenario(package: Any) -> Any:
        model = package.PeftMixedModel.from_pretrained(copy.deepcopy(net), tmp_path / "a", "a")
        model.load_adapter(tmp_path / "b", "b")
        model.set_adapter(["a", "b"])
        return model(x).detach(), model.active_adapters

    same(scenario)


def test_mixed_adapters_can_be_deleted() -> None:
    def scenario(package: Any) -> Any:
        model = mixed(package)
        model.delete_adapter(["two"])
        return list(model.peft_config), model.active_adapters

    same(scenario)
