"""FRoD: what layers of a category share, and where PEFT's sharing goes wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key
from peft_tools import peft_load, raw
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.parts.joint_basis import basis, category, decompose, depth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Two(nn.Module):
    """An encoder and a decoder whose layers have the same numbers and roles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for part in ("encoder", "decoder"):
            layers = nn.ModuleList(nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(6, 6)})}) for _ in range(2))
            self.add_module(part, layers)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.encoder, self.decoder):
            for layer in part:  # pyright: ignore
                x = torch.tanh(layer["attn"]["q"](x))
        return x


def moved(adapter: fa.Adapter, *names: str) -> fa.Adapter:
    generator = torch.Generator().manual_seed(3)
    more = lambda t: t + 0.5 * torch.randn(t.shape, generator=generator).to(t)  # noqa: E731
    params = {k: {n: more(t) if n in names else t for n, t in p.items()} for k, p in adapter.params.items()}
    return adapter.replace(params=params)


@pytest.mark.parametrize(
    "path",
    ["query", "0", "h.0", "model.layers.3.self_attn.q_proj", "encoder.layer.11.attention.output.dense",
     "encoder.layer.2.output.dense", "output.dense", "layers.x.q", "a.layers", "transformer.h.7.mlp.c_proj"],
)  # fmt: skip
def test_categories_and_numbers_are_pefts(path: str) -> None:
    assert category(path) == _category_from_key(path)
    assert depth(path, 99) == _layer_index_from_key(path, 99)


def test_layers_of_one_number_and_role_all_count() -> None:
    """PEFT's dict has one place for each number and category: the decoder's weights overwrite the encoder's (B21)."""
    model = Two()
    adapter = fa.init(model, fa.FrodConfig(target_modules=["q"], sparse_rate=0.1))
    weights = [model.get_submodule(f"{part}.{i}.attn.q").weight.detach()
               for i in range(2) for part in ("encoder", "decoder")]  # fmt: skip
    v = adapter.buffers[""]["frod_V.attn_q"]
    assert torch.equal(v, basis(weights, 1e-3))
    theirs = peft.get_peft_model(Two(), peft.FrodConfig(target_modules=["q"], progressbar=False))
    assert torch.equal(theirs.base_model.frod_V["attn_q"]["default"], basis(weights[1::2], 1e-3))
    for path in adapter.params:
        p = adapter.leaves(path)
        weight = model.get_submodule(path).weight
        torch.testing.assert_close(p["frod_U"] @ torch.diag(p["frod_lambda_0"]) @ v.t(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p["frod_U"].norm(dim=0), torch.ones(6))


def test_u_follows_from_the_basis_in_the_file(tmp_path: Path) -> None:
    """Eigenvectors have other signs on other machines. PEFT reads V, and keeps the U of the V that it computed."""
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(5, 4, dtype=torch.float64)
    adapter = moved(fa.init(model, fa.FrodConfig(target_modules=["0"], progressbar=False)), "frod_lambda_l")
    fa.save(adapter, tmp_path)
    tensors = raw(tmp_path)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    tensors["base_model.frod_V.0"] *= signs  # the diagonal does not see the signs
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    expected = fa.functional_call(model, adapter, x)
    torch.testing.assert_close(fa.functional_call(model, fa.load(tmp_path, model=model), x), expected)
    live = shim.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(live(x), expected)
    theirs = peft_load(nn.Sequential(nn.Linear(4, 6)).double(), tmp_path)
    theirs.base_model.model[0].base_layer.load_state_dict(model[0].state_dict())
    assert (theirs.double()(x) - expected).abs().max() > 0.1


def test_a_checkpoint_without_the_basis_is_computed_again(tmp_path: Path) -> None:
    model, x = Two().double(), torch.randn(5, 6, dtype=torch.float64)
    config = fa.FrodConfig(target_modules=["q"], sparse_rate=0.2, save_projection=False)
    adapter = moved(fa.init(model, config), "frod_lambda_l", "frod_lambda_s_values")
    fa.save(adapter, tmp_path)
    assert not any("frod_V" in key or "frod_s_i" in key for key in raw(tmp_path))
    assert torch.equal(
        fa.functional_call(model, fa.load(tmp_path, model=model), x), fa.functional_call(model, adapter, x)
    )
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(tmp_path)


@pytest.mark.parametrize("lost", ["every", "frod_V.attn_q", "frod_s_indices.attn_q", "frod_s_size.attn_q"])
def test_a_basis_that_the_config_promises_is_missed(tmp_path: Path, lost: str) -> None:
    """It follows from an eigendecomposition, whose signs are the machine's: computed again it may be another one.

    PEFT misses it only where the file has nothing of all that.
    """
    model, config = Two(), fa.FrodConfig(target_modules=["q"], sparse_rate=0.2, progressbar=False)
    fa.save(fa.init(model, config), tmp_path)
    keys = raw(tmp_path)
    gone = {key for key in keys if "lambda" not in key and lost in ("every", key.removeprefix("base_model."))}
    assert gone
    kept = {key: value for key, value in keys.items() if key not in gone}
    save_file(kept, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(fa.AdapterFileError, match=r"lacks 'frod_"):
        fa.load(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"lacks 'frod_.*save_projection=False"):
        shim.PeftModel.from_pretrained(Two(), tmp_path)
    if lost == "every":
        with pytest.raises(ValueError, match="save_projection=False"):
            peft_load(Two(), tmp_path)


def test_a_new_adapter_changes_no_bit() -> None:
    """Also in half precision, where U and V are rounded: PEFT's new adapter moves the output."""
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(9, 64).bfloat16()
    adapter = fa.init(model, fa.FrodConfig(target_modules=["0"]))
    assert torch.equal(fa.functional_call(model, adapter, x), model(x))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)).bfloat16(), peft.FrodConfig(target_modules=["0"], progressbar=False)
    )
    assert not torch.equal(theirs(x), theirs.base_model.model[0].base_layer(x))


def test_a_singular_basis_is_no_error() -> None:
    weight = torch.zeros(5, 4)
    weight[:, 0] = 1.0
    u, strength = decompose(weight, basis([weight], 1e-3))
    assert u.isfinite().all()
    assert strength.isfinite().all()


def test_a_category_has_one_width() -> None:
    model = nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(4, 4)}), "1": nn.ModuleDict({"q": nn.Linear(5, 4)})})
    with pytest.raises(fa.SiteError, match=r"'q'.*\[4, 5\]"):
        fa.init(model, fa.FrodConfig(target_modules=["q"]))


def test_nothing_sparse() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(5, 4)
    adapter = fa.init(model, fa.FrodConfig(target_modules=["0"], sparse_rate=0.0))
    assert adapter.params["0"]["frod_lambda_s_values"].shape == (0,)
    assert adapter.buffers[""]["frod_s_indices.0"].shape == (2, 0)
    out = fa.functional_call(model, moved(adapter, "frod_lambda_l"), x)
    merged = fa.merge(model, moved(adapter, "frod_lambda_l"))
    torch.testing.assert_close(out, torch.func.functional_call(model, merged, x))
    assert not torch.allclose(out, model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frod_s_indices": torch.full((2, 1), 4)}, "no places"),
        ({"frod_s_indices": torch.zeros(3, 1).long()}, "frod_s_indices"),
        ({"frod_s_size": torch.tensor([4, 5])}, "frod_s_size"),
        ({"frod_V": torch.zeros(4, 5)}, "frod_V"),
    ],
    ids=str,
)
def test_wrong_projections_in_a_file_are_errors(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    fa.save(fa.init(model, fa.FrodConfig(target_modules=["0"])), tmp_path)
    changed = {f"base_model.{name}.0": value for name, value in change.items()}
    save_file({**raw(tmp_path), **changed}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(fa.AdapterFileError, match=message):
        fa.load(tmp_path, model=model)


@pytest.mark.parametrize(
    "fields",
    [{"sparse_rate": 1.5}, {"bias": "lora_only"}, {"frod_dropout": 1.0}, {"layers_pattern": "h"}],
    ids=str,
)
def test_what_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        fa.FrodConfig(**fields)  # pyright: ignore[reportArgumentType]
