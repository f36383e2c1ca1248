"""The README's table of methods and layers is what trying gives."""

from __future__ import annotations

import pytest
from support import BEGIN, END, README, markdown


@pytest.mark.filterwarnings("ignore")
def test_the_support_matrix_of_the_readme_is_the_one_of_the_code() -> None:
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == markdown(), "python tests/support.py rewrites it"
