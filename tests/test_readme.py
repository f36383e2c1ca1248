"""Every Python block of the README runs, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 9
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    shown = [line.removeprefix("# ") for line in "\n".join(blocks).splitlines() if line.startswith("# ")]
    # what the README shows as output is what comes out
    assert [line for line in shown if line != "..."] == [line for line in printed if line in shown]


def test_the_test_command_is_what_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text()
    assert "<!-- tests -->" in ci
    assert re.search(r"<!-- tests -->\n```sh\n[^\n]+\n```", README.read_text())
    assert re.search(r"<!-- demo -->\n```sh\n[^\n]+funcadapt demo\n```", README.read_text())
