"""Files that nobody wrote on purpose: one type of error, or a valid adapter; never anything else, and no litter.

`NotImplementedError` is for what a config may ask of PEFT and not of funcadapt.
"""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft_tools import Experts, Net
from safetensors.torch import save
from torch import nn

import funcadapt as fa

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.emb, self.head = nn.Linear(3, 2), nn.Embedding(5, 3), nn.Linear(2, 2)
        self.experts = Experts()


@cache
def checkpoint(kind: str) -> tuple[bytes, bytes]:
    """The two files of a valid checkpoint."""
    configs = {
        "lora": fa.LoraConfig(
            r=2,
            target_modules=["lin", "emb"],
            modules_to_save=["head"],
            bias="all",
            rank_pattern={"lin": 1},
            target_parameters=["experts.up", "experts.down"],
        ),
        "dora": fa.LoraConfig(r=2, target_modules=["lin", "emb"], use_dora=True),
        "tokens": fa.LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [1, 3]}),
        "ia3": fa.IA3Config(target_modules=["lin", "head"], feedforward_modules=["head"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        fa.save(fa.init(Small(), configs[kind]), folder)
        return (Path(folder) / WEIGHTS).read_bytes(), (Path(folder) / CONFIG).read_bytes()


kinds = st.sampled_from(["lora", "dora", "tokens", "ia3"])


def attempt(weights: bytes, config: bytes, model: nn.Module | None = None) -> fa.Adapter | None:
    """Load, and look at what came: an adapter that prints and can be saved and loaded again, or the one error."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a field that is off warns, and so does `re` about odd patterns
        path = Path(folder)
        (path / WEIGHTS).write_bytes(weights)
        (path / CONFIG).write_bytes(config)
        try:
            adapter = fa.load(path, model=model)
        except (fa.AdapterFileError, NotImplementedError):
            adapter = None
        assert sorted(p.name for p in path.iterdir()) == [CONFIG, WEIGHTS]
        assert (path / WEIGHTS).read_bytes() == weights
        if adapter is not None:
            repr(adapter)
            assert hash(adapter.config) == hash(adapter.config)
            fa.save(adapter, path / "again")
            again = fa.load(path / "again")
            assert again.params.keys() == adapter.params.keys()
        return adapter


@pytest.mark.parametrize("kind", ["lora", "dora", "tokens", "ia3"])
def test_the_files_are_valid(kind: str) -> None:
    assert attempt(*checkpoint(kind)) is not None
    assert attempt(*checkpoint(kind), Small()) is not None


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_truncated_at_many_bytes(kind: str) -> None:
    weights, config = checkpoint(kind)
    for end in [*range(12), *range(12, len(weights), 97), len(weights) - 1]:
        assert attempt(weights[:end], config) is None
    for end in [*range(4), *range(4, len(config), 41), len(config) - 1]:
        assert attempt(weights, config[:end]) is None


@many
@given(kind=kinds, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans())
def test_a_flipped_bit(kind: str, where: float, bit: int, header: bool) -> None:
    """In the body it is another number; in the header, mostly an error."""
    weights, config = checkpoint(kind)
    size = 8 + struct.unpack("<Q", weights[:8])[0] if header else len(weights)
    broken = bytearray(weights)
    broken[int(where * size)] ^= 1 << bit
    attempt(bytes(broken), config)


@few
@given(kind=kinds, where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_of_the_config(kind: str, where: float, byte: int) -> None:
    weights, config = checkpoint(kind)
    broken = bytearray(config)
    broken[int(where * len(broken))] = byte
    attempt(weights, bytes(broken))


@few
@given(length=st.integers(0, 2**64 - 1))
@example(0)
@example(2**63)
@example(2**64 - 1)
@example(100_000_001)
def test_absurd_header_lengths(length: int) -> None:
    weights, config = checkpoint("lora")
    if length != struct.unpack("<Q", weights[:8])[0]:
        assert attempt(struct.pack("<Q", length) + weights[8:], config) is None


@few
@given(
    shape=st.lists(st.one_of(st.integers(-2, 9), st.just(2**63)), max_size=4),
    offsets=st.lists(st.integers(-8, 400), min_size=2, max_size=2),
    dtype=st.sampled_from(["F32", "F16", "I64", "BOOL", "U8", "F8_E4M3", "XX", "C64"]),
)
def test_shapes_that_do_not_match_offsets(shape: list[int], offsets: list[int], dtype: str) -> None:
    weights, config = checkpoint("ia3")
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    key = next(k for k in header if k != "__metadata__")
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    attempt(struct.pack("<Q", len(text)) + text + weights[8 + size :], config)


_tensors = st.sampled_from(
    [
        torch.tensor(1.0),
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.zeros(2, 0),
        torch.ones(2),
        torch.ones(2, 3),
        torch.ones(6, 4),
        torch.ones(1, 2, 3),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.float16),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(2, 3, dtype=torch.uint8),
        torch.full((2, 3), float("nan")),
    ]
)
_NAMES = """
lin.lora_A.weight lin.lora_B.weight lin.lora_B.bias lin.lora_magnitude_vector lin.ia3_l lin.base_layer.weight
lin.base_layer.bias lin.base_layer.out_proj.lora_A.weight base_model.model.lin.lora_A.weight lora_A.weight
emb.lora_embedding_A emb.lora_embedding_B emb.base_layer.weight emb.token_adapter.trainable_tokens_delta
token_adapter.trainable_tokens_delta head.weight head.bias head.running_mean head.modules_to_save.bias
experts.lora_A.weight experts.base_layer.lora_A.weight experts.base_layer.base_layer.lora_B.weight
. ..lora_A.weight é.ia3_l
"""
_names = st.sampled_from(["", *_NAMES.split()])


@many
@given(
    kind=kinds,
    extra=st.dictionaries(_names, _tensors, max_size=3),
    drop=st.integers(0, 3),
    order=st.sampled_from([None, "[]", '["experts.up"]', "[1, {}]", "{}", "null", "[[", '"experts"']),
    model=st.booleans(),
)
def test_extra_missing_and_odd_tensors(
    kind: str, extra: dict[str, torch.Tensor], drop: int, order: str | None, model: bool
) -> None:
    from safetensors.torch import load

    weights, config = checkpoint(kind)
    tensors = load(weights)
    for key in sorted(tensors)[:drop]:
        del tensors[key]
    tensors.update({f"base_model.model.{name}": tensor.clone() for name, tensor in extra.items()})
    metadata = {} if order is None else {"target_parameters": order, "buffers": order}
    attempt(save(tensors, {"format": "pt", **metadata}), config, Small() if model else None)


_scalars: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(
        [10**30, -(10**400), 1e308, float("nan"), float("inf"), "", "lin", "(", "[", ".*", "8", "all-linear"]
    ),
    st.text(max_size=3),
)
_json: Any = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["lin", "emb", "(", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)


@many
@given(kind=kinds, field=st.integers(0, 60), value=_json, model=st.booleans())
def test_wrong_values_for_every_field(kind: str, field: int, value: Any, model: bool) -> None:
    weights, config = checkpoint(kind)
    values = json.loads(config)
    names = [*sorted(values), "runtime_config", "unknown"]
    values[names[field % len(names)]] = value
    attempt(weights, json.dumps(values).encode(), Small() if model else None)


def test_every_field_takes_every_type_of_value() -> None:
    """The same without chance: each field, each type."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        10**30,
        10**400,
        1e400,
        0.5,
        "",
        "lin",
        "(",
        "8",
        [],
        ["lin"],
        [1],
        [[]],
        {},
        {"a": 1},
    ]
    odd += [{"(": 1}, {"lin": 0}, {"lin": -1}, {"lin": 10**30}, {"lin": "2"}, {"lin": None}, [None], [{"a": []}]]
    for kind in ("lora", "ia3"):
        weights, config = checkpoint(kind)
        values = json.loads(config)
        for name in values:
            for value in odd:
                attempt(weights, json.dumps({**values, name: value}).encode())


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b'"LORA"',
        b"\xff\xfe",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        b'{"peft_type": "LORA", "r": 1e999}',
        b'{"peft_type": "LORA", "rank_pattern": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}",
        b'{"peft_type": "LORA", "unknown": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"peft_type": "LORA", "loftq_config": ' + b"[" * 900 + b"]" * 900 + b"}",
        '{"peft_type": "LORA", "r": 8}'.encode("utf-16"),
        b'{"peft_type": "LORA", "target_modules": "(((((((("}',
        b'{"peft_type": "LORA", "rank_pattern": {"a{99999999999}": 2}}',
        b'{"peft_type": "LORA", "r": 8, "r": "x"}',
        b'{"peft_type": "XLORA"}',
    ],
)
def test_hostile_configs(config: bytes) -> None:
    weights, _ = checkpoint("lora")
    assert attempt(weights, config) is None


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    weights, _ = checkpoint("lora")
    (tmp_path / WEIGHTS).write_bytes(weights)
    with (tmp_path / CONFIG).open("wb") as file:
        file.truncate(2**34)  # sparse
    with pytest.raises(fa.AdapterFileError, match="too many for a config"):
        fa.load(tmp_path)


def test_folders_and_links_in_the_place_of_files(tmp_path: Path) -> None:
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(fa.AdapterFileError):
        fa.load(tmp_path)
    other = tmp_path / "other"
    fa.save(fa.init(Net(nn.Linear(2, 2)), fa.LoraConfig(target_modules=["layer"])), other)
    (other / WEIGHTS).unlink()
    (other / WEIGHTS).symlink_to(tmp_path / "nowhere")
    with pytest.raises(fa.AdapterFileError):
        fa.load(other)
