# SPDX-License-Identifier: MIT
"""Numbers that are not finite are found, whenever they were written."""

from __future__ import annotations

import math

import pytest
import torch

from ddpnopt.gradients import finite
from ddpnopt.sizes import WORTH, Sizes

BAD = pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_may_overflow(dtype: torch.dtype) -> None:
    """Large entries are finite; the norm need not be."""
    largest = torch.finfo(dtype).max
    assert finite(torch.full((7, 3), largest, dtype=dtype))
    assert finite(torch.empty(0, 3, dtype=dtype))


@BAD
@pytest.mark.parametrize("at", [0, 20])
def test_one_entry(bad: float, at: int) -> None:
    """Anywhere."""
    t = torch.zeros(7, 3)
    t.view(-1)[at] = bad
    assert not finite(t)


@BAD
@pytest.mark.parametrize("elements", [3, WORTH])
def test_written_after_a_look(bad: float, elements: int) -> None:
    """A norm taken before a change says nothing of what is there now, nor a bad one of a mend."""
    sizes, t = Sizes(), torch.ones(elements)
    sizes.look([t])
    assert sizes.finite([t])
    t[-1] = bad
    assert not sizes.finite([t])
    sizes.look([t])
    assert not sizes.finite([t])
    t[-1] = 1.0
    assert sizes.finite([t])
