"""`fa.sites`: what it prints, and `expect`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcadapt as fa
from funcadapt.sites import SiteTable


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(4, 6, (1, 3), groups=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.Parameter(torch.zeros(3, 6, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


CONFIG = fa.LoraConfig(r=2, target_modules=["embed", "conv", "attention"], target_parameters=["experts"])


def test_the_table_prints() -> None:
    lines = repr(fa.sites(Model(), CONFIG)).splitlines()
    assert [line.split() for line in lines] == [
        ["path", "kind", "shape", "parameters", "tied", "with"],
        ["embed", "embedding", "4x7", "28", "head.weight"],
        ["conv", "conv2d", "6x2x1x3", "36"],
        ["attention.in_proj_weight", "mha", "12x4", "48"],
        ["attention.out_proj", "linear", "4x4", "16"],
        ["experts", "experts", "3x6x4", "72"],
        ["5", "sites,", "200", "base", "parameters"],
    ]
    # the columns line up, and no line ends in spaces
    starts = [line.index(word) for line, word in zip(lines[:3], ("kind", "embedding", "conv2d"), strict=True)]
    assert len(set(starts)) == 1
    assert all(line == line.rstrip() for line in lines)


def test_the_table_is_a_sequence() -> None:
    table = fa.sites(Model(), CONFIG)
    assert len(table) == 5
    assert table[0].path == "embed"
    assert [site.path for site in table[1:3]] == ["conv", "attention.in_proj_weight"]
    assert isinstance(table[:1], SiteTable)
    assert repr(table[:1]).endswith("1 site, 28 base parameters")


def test_large_numbers_are_readable() -> None:
    model = nn.Sequential(nn.Linear(2048, 1024, bias=False, device="meta"))
    assert "2,097,152" in repr(fa.sites(model, fa.LoraConfig(target_modules=["0"])))


def test_expect_checks_the_count() -> None:
    assert len(fa.sites(Model(), CONFIG, expect=5)) == 5
    with pytest.raises(fa.TargetError, match=r"Expected 4 sites, got 5:\npath"):
        fa.sites(Model(), CONFIG, expect=4)
    with pytest.raises(fa.TargetError, match="Expected 4 sites, got 5"):
        fa.init(Model(), CONFIG, expect=4)
