"""RoAd: what the laws cannot say."""

from __future__ import annotations

import pytest
import torch
from specs.road import rotation
from torch import nn

import funcadapt as fa


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group_size", [4, 6, 12])
def test_groups(variant: str, group_size: int) -> None:
    """The pairs are within groups, whatever their size."""
    model, x = nn.Sequential(nn.Linear(5, 12)).double(), torch.randn(3, 5, dtype=torch.float64)
    config = fa.RoadConfig(variant=variant, group_size=group_size, init_weights=False, target_modules=["0"])
    adapter = fa.init(model, config)
    r = rotation(adapter.params["0"], 12, group_size)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x) @ r.T)
    if variant == "road_1":  # a rotation, and a scale for each pair
        torch.testing.assert_close(r.T @ r, torch.diag((r.T @ r).diagonal()))


def test_errors() -> None:
    with pytest.raises(ValueError, match="Invalid variant road_3"):
        fa.RoadConfig(variant="road_3")
    with pytest.raises(ValueError, match="must be divisible by 2"):
        fa.RoadConfig(group_size=3)
    model = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(fa.SiteError, match=r"'0' has 6 outputs, .* group_size=4"):
        fa.init(model, fa.RoadConfig(group_size=4, target_modules=["0"]))


def test_a_grouped_convolution_merges_where_no_pair_crosses_groups() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    adapter = fa.init(model, fa.RoadConfig(group_size=4, init_weights=False, target_modules=["0"]))
    out = fa.functional_call(model, adapter, x)
    torch.testing.assert_close(torch.func.functional_call(model, fa.merge(model, adapter), (x,)), out)
    with pytest.raises(fa.SiteError, match="4 outputs in each of 2 groups"):
        fa.init(model, fa.RoadConfig(group_size=8, target_modules=["0"]))
