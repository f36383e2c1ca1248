"""Files: PEFT's `adapter_config.json` and `adapter_model.safetensors`, read and written strictly.

Nothing here unpickles, and nothing walks a model: loading costs what reading the file costs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from funcadapt.adapter import Adapter, TensorTree
from funcadapt.binding import TOKEN_INDICES, TOKENS
from funcadapt.config import AdapterConfig, config_from_dict
from funcadapt.errors import AdapterError, AdapterFileError, SiteError, TargetError
from funcadapt.init import has_rows, token_table
from funcadapt.keys import buffer_keys, decode, encode
from funcadapt.method import Draw, Method, method_of
from funcadapt.sharing import SHARED, Tree, complete, shared_of
from funcadapt.sites import Site
from funcadapt.targeting import sites, whole_names
from funcadapt.tying import tie, untied_trees

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FORMAT_OF = "0.21.2"  # the PEFT release whose format this is
_MAX_CONFIG_BYTES = 16 * 2**20


def save(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Write an adapter as a PEFT checkpoint: `adapter_config.json` and `adapter_model.safetensors`.

    Each file is written beside its place and moved there when it is complete, so that a failure leaves an older
    checkpoint as it was. The config says what the leaves are: a scaling that a sweep changed becomes its alpha.

    Args:
        adapter: the adapter.
        directory: the folder, made if need be.

    Raises:
        AdapterFileError: if `directory` is a file.
        SiteError: if a leaf has no name in a checkpoint.
        AdapterError: if it is a stack.
        TypeError: if it is no adapter.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"]))
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> fa.save(adapter, folder)
        >>> fa.load(folder)
        Adapter(lora, 1 site, r=2, 12 parameters, float32)
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"save: expected an Adapter, got {type(adapter).__name__}. fa.unstack gives those of a stack.")
    if adapter.members is not None:
        raise AdapterError("save: a stack has no checkpoint of its own. Save each: for a in fa.unstack(stack): ...")
    folder = Path(directory)
    if folder.is_file():
        raise AdapterFileError(f"Provided path ({folder}) should be a directory, not a file.")
    method = method_of(adapter.config)
    config = method.describe(adapter.config, {path: adapter.leaves(path) for path in adapter.params})
    tensors, order = encode(adapter.replace(params=_saved(adapter, method, config)), method)
    metadata = {"format": "pt"}
    unusual = [key for key in buffer_keys(adapter) if key in tensors]
    if unusual:
        metadata["buffers"] = json.dumps(unusual)  # PEFT's keys do not say what is a buffer
    if order:
        metadata["target_parameters"] = json.dumps(order)  # PEFT's keys only say how deep they nest
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    values = {**config.to_dict(), "inference_mode": True, "peft_version": _FORMAT_OF}
    text = json.dumps(dict(sorted(values.items())), indent=2)  # not sort_keys: the first rank_pattern wins
    folder.mkdir(parents=True, exist_ok=True)
    write_all(folder, {WEIGHTS: to_bytes(content, metadata), CONFIG: text.encode()})


def _saved(adapter: Adapter, method: Method, config: AdapterConfig) -> TensorTree:
    """The leaves that a checkpoint holds, in the form in which it does."""
    if method.tied:
        adapter = adapter.replace(params=untied_trees(adapter.params, adapter.buffers, copy=True)[0])
    if method.stored is None and not method.constants:
        return adapter.params
    saved: dict[str, dict[str, Tensor]] = {}
    for path in {**adapter.params, **adapter.buffers}:
        names = method.shared if path == SHARED else method.keys
        frozen = adapter.buffers.get(path, {})
        constants = {name: leaf for name, leaf in frozen.items() if method.is_constant(name) and name in names}
        leaves = {**adapter.params.get(path, {}), **constants}
        other: Mapping[str, Tensor | None] = {}
        if method.stored is not None:
            other = method.stored(config, path, adapter.leaves(path))
        kept = {name: leaf for name, leaf in {**leaves, **other}.items() if leaf is not None}
        if kept:
            saved[path] = kept
    return saved


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, each beside its place first: all of them get there, or none.

    Args:
        folder: the folder, which exists.
        files: name -> content.
    """
    written: list[tuple[str, Path]] = []
    try:
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            written.append((temporary, folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that nobody else can read
        _move_all(written)
    finally:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)


def _move_all(written: Sequence[tuple[str, Path]]) -> None:
    """Move every file to its place, or none: new weights beside an old config would be a wrong adapter."""
    older: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for temporary, target in written:
            if target.exists():
                kept = Path(f"{temporary}.old")
                shutil.copy2(target, kept)
                older.append((kept, target))
        for temporary, target in written:
            os.replace(temporary, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink()
        for kept, target in older:
            if target in moved:
                kept.rename(target)
        raise
    finally:
        for kept, _ in older:
            kept.unlink(missing_ok=True)


def load(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Adapter:
    """Read a PEFT checkpoint, written by funcadapt or by PEFT.

    Args:
        directory: the folder with the two files.
        model: if given, the checkpoint must have exactly the sites and shapes that its config selects in this model.
            Needed only where PEFT's keys are ambiguous: several `target_parameters` of one module, not saved by
            funcadapt.
        dtype: the dtype of the leaves, or None for the file's.
        device: the device of the leaves, or None for the CPU.

    Returns:
        The adapter.

    Raises:
        AdapterFileError: if a file is missing, truncated or malformed, or a key is missing, unexpected or mis-shaped;
            the message names the site.
        NotImplementedError: if the config asks for a part of PEFT that funcadapt does not have.
    """
    folder = Path(directory)
    config = read_config(folder)
    tensors, metadata = _read_tensors(folder)
    try:
        method = method_of(config)
    except AdapterError as error:  # X-LoRA's, which is several adapters: funcadapt.xlora reads it
        raise AdapterFileError(f"{folder}: {error}") from error
    try:
        order, known = names_in(metadata, "target_parameters"), names_in(metadata, "buffers")
        params, buffers = decode(tensors, config, method, order, model, known or ())
        plain = method.buffers(config)
        shared = shared_of(method, params, buffers)
        lacking = [name for name in method.shared if name not in shared and "*" not in name]
        if lacking and method.complete(config) and any(name in method.keys for p in params.values() for name in p):
            raise AdapterFileError(
                f"{folder / WEIGHTS} lacks {lacking[0]!r}, which all sites share.{not_saved(config)}"
            )
        if shared:
            method.check(config, SHARED, shared)
        for path in (*params, *(path for path in buffers if path not in params)) if method.constants else params:
            leaves = params.get(path, {})
            if method.constants:
                leaves = {**leaves, **buffers.get(path, {})}
            own = {name: leaf for name, leaf in leaves.items() if name in method.keys}
            if own:
                at = config.at(path)
                method.check(at, path, own)
                like = next((leaf.dtype for leaf in own.values() if leaf.is_floating_point()), torch.float32)
                if at is not config:
                    derived = method.buffers(at)
                elif any(v.dtype != like for v in plain.values()):  # converted once for all sites of one dtype
                    derived = plain = {k: v.to(like) for k, v in method.buffers(config).items()}
                else:
                    derived = plain
                if derived:
                    made = {k: v.to(like, copy=True) for k, v in derived.items()}
                    buffers.setdefault(path, {}).update(made)
        _token_indices(config, params, buffers)
        if method.derive is not None or method.share is not None:
            _complete(method, config, (params, buffers), model)
    except AdapterFileError:
        raise
    except SiteError as error:
        raise AdapterFileError(f"{folder / WEIGHTS}: {error}") from error
    except (ValueError, RecursionError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        raise AdapterFileError(f"{folder / WEIGHTS} does not make an adapter: {error}") from error
    adapter = Adapter(params, buffers, config)
    if model is not None:
        _check_against(model, adapter, folder)
    return adapter if dtype is None and device is None else adapter.to(dtype=dtype, device=device)


def _complete(method: Method, config: AdapterConfig, trees: tuple[Tree, Tree], model: nn.Module | None) -> None:
    """Add what the file does not hold, as it follows from the config and the model."""
    if model is None:
        if method.complete(config):
            return
        raise AdapterFileError(
            f"A checkpoint of {method.name} does not hold all that it needs: the rest follows from the model. Pass it: "
            "fa.load(directory, model=model)."
        )
    like = next(leaf for tree in trees for leaves in tree.values() for leaf in leaves.values())
    table = sites(model, config, strict=False)

    def draw_of(site: Site) -> Draw:
        own = (leaf for tree in trees for leaf in tree.get(site.path, {}).values() if leaf.is_floating_point())
        # what is drawn is in the file: torch's own generator stays as it is
        return Draw(torch.Generator("cpu"), next(own, like).dtype, like.device)

    missing = complete(model, method, config, table, trees, draw_of, from_file=True)
    if missing:
        raise SiteError(f"The file lacks {missing[0]!r}, which sites share.{not_saved(config)}")


def not_saved(config: Any) -> str:
    """What to do where a checkpoint lacks what its config says that it holds."""
    if not getattr(config, "save_projection", False):
        return ""
    return " If it was saved with save_projection=False, set that in its config: then it is computed again."


def read_config(folder: Path) -> AdapterConfig:
    """The config of a checkpoint.

    Args:
        folder: the checkpoint's folder.

    Returns:
        The config, PEFT's bookkeeping of the file itself left out.

    Raises:
        AdapterFileError: if the file is missing, no JSON, or no config.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterFileError(f"{path} has {path.stat().st_size} bytes, too many for a config.")
        values: Any = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise AdapterFileError(f"{path} must hold a JSON object, got {type(values).__name__}.")
        return dataclasses.replace(config_from_dict(values), inference_mode=False, peft_version=None)  # pyright: ignore
    except FileNotFoundError as error:
        raise AdapterFileError(f"Can't find {CONFIG!r} at {str(folder)!r}.") from error
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    except NotImplementedError:
        raise
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, ArithmeticError) as error:
        raise AdapterFileError(f"{path} is no readable config: {error}") from error


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = " adapter_model.bin is a pickle, which funcadapt does not open: convert it with PEFT." if pickled else ""
        raise AdapterFileError(f"Can't find {WEIGHTS!r} at {str(folder)!r}.{hint}")
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore (it checks the header and every offset)
            metadata: dict[str, str] = dict(file.metadata() or {})  # pyright: ignore
        content = bytearray(path.stat().st_size)
        with open(path, "rb", buffering=0) as raw:
            if raw.readinto(content) != len(content):
                raise OSError("the file changed while it was read")
        size = int.from_bytes(content[:8], "little")
        header: dict[str, Any] = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        return {key: _view(content, 8 + size, entry) for key, entry in header.items()}, metadata
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        raise AdapterFileError(f"{path} is truncated or malformed: {error}") from error


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _view(content: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    """One tensor, as a view of the file's bytes: `safe_open.get_tensor` takes ten times as long for small ones."""
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise TypeError(f"dtype {entry['dtype']} is none that an adapter has")
    shape = entry["shape"]
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + entry["data_offsets"][0]).view(shape)


def names_in(metadata: Mapping[str, str], key: str) -> list[str] | None:
    """A list of names that funcadapt wrote into the header, or None if it is not there."""
    if key not in metadata:
        return None
    names: Any = json.loads(metadata[key])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):  # pyright: ignore[reportUnknownVariableType]
        raise AdapterFileError(f"The header's {key!r} must be a list of names, got {metadata[key]!r}.")
    return names  # pyright: ignore[reportUnknownVariableType]


def _token_indices(config: Any, params: dict[str, dict[str, Tensor]], buffers: dict[str, dict[str, Tensor]]) -> None:
    wanted: Any = getattr(config, "trainable_token_indices", None)
    paths = [path for path, leaves in params.items() if TOKENS in leaves]
    if bool(paths) != bool(wanted):
        raise SiteError("trainable_token_indices of the config and trainable_tokens_delta in the file go together.")
    listed: dict[str, Any] = {}
    for path in paths:
        by_name: Any = wanted.items() if hasattr(wanted, "items") else [(path, wanted)]
        rows: Any = next((v for k, v in by_name if has_rows(config, k, path)), None)
        if rows is not None and len(rows) == params[path][TOKENS].shape[0]:
            listed[path] = rows
            buffers.setdefault(path, {})[TOKEN_INDICES] = torch.tensor(list(rows), dtype=torch.long)
    for path in paths:
        if path in listed:
            continue
        own = params[path][TOKENS]
        first = next((other for other in listed if torch.equal(own, params[other][TOKENS])), None)
        if first is None:
            raise SiteError(f"{path!r} has {own.shape[0]} trained rows, which the config does not list.")
        del params[path]  # a head that is tied to an embedding: PEFT's `TrainableTokensConfig` saves its rows twice
        buffers.setdefault(path, {})[tie(TOKENS, first)] = torch.zeros((), dtype=torch.long)


def _check_against(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Exactly the sites that the config selects, with the shapes that the model has."""
    from funcadapt.binding import bind, check_shapes, state_of

    try:
        expected = {site.path for site in sites(model, adapter.config, strict=False)}
        expected |= set(token_table(adapter.config, model))
    except (SiteError, TargetError) as error:
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from error
    missing = sorted(expected - set(adapter.params) - set(adapter.buffers))
    if missing:
        raise AdapterFileError(f"{folder / WEIGHTS} lacks the site {missing[0]!r} ({len(missing)} in all).")
    method = method_of(adapter.config)
    for path, leaves in adapter.params.items():
        if path not in expected and any(name in method.keys for name in leaves):
            raise AdapterFileError(f"{folder / WEIGHTS} has the site {path!r}, which the config does not select.")
    for path, name in whole_names(model, adapter.config, expected):
        if name not in adapter.leaves(path):
            raise AdapterFileError(f"{folder / WEIGHTS} lacks {name!r} of {path!r}, which its config says it has.")
    try:
        check_shapes(bind(model, [("", adapter, None)], state_of(model)))
    except AdapterError as error:
        raise AdapterFileError(f"{folder / WEIGHTS}: {error}") from error
