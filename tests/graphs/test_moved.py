# SPDX-License-Identifier: MIT
"""The rollout's sum over a cut, against the definition, for any tensors in any spans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpnopt.crossing import Crossing, Moved, Span
from ddpnopt.errors import UnsupportedModelError

LAST = 6
spans = st.tuples(st.integers(0, LAST - 1), st.integers(1, LAST)).map(
    lambda pair: (min(pair[0], pair[1] - 1), pair[1])
)


def crossing(number: int, born: int, used: int) -> Crossing:
    """Of two samples, its gradient one at its first entry."""
    y = torch.zeros(2, 3, dtype=torch.float64)
    one = Crossing((number, 0), born, used, y, y._version)
    one.g = torch.zeros_like(y)
    one.g[:, 0] = 1.0
    return one


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(spans, max_size=12), st.lists(spans, max_size=4), st.lists(spans, max_size=1))
def test_it_is_the_sum_of_what_crosses(
    made: list[tuple[int, int]], again: list[tuple[int, int]], lost: list[tuple[int, int]]
) -> None:
    """Tensor k changes by 2^k; weights that are used again count by 1000 and more."""
    moved = Moved(
        [crossing(k, *span) for k, span in enumerate(made)], 2, [Span(*span) for span in lost]
    )
    again = [(born, used) for born, used in again if born]  # by a layer: from the first on
    for time in range(1, LAST + 1):
        for k, (born, _) in enumerate(made):
            if born == time - 1:
                moved.meet(k, [torch.full((2, 3), 2.0**k, dtype=torch.float64)])
        want = sum(2.0**k for k, (born, used) in enumerate(made) if born < time <= used)
        want += sum(1e4 * 3**k for k, (born, used) in enumerate(again) if born < time <= used)
        blind = any(born < time <= used for born, used in lost)
        q = moved.q(time)
        assert (q is None) == (blind or not want)
        assert q is None or q.tolist() == [[want], [want]]
        for k, (born, used) in enumerate(again):
            if born == time:
                moved.foresee(used, torch.full((2, 1), 1e4 * 3**k, dtype=torch.float64))


def test_a_tensor_that_is_not_made_is_another_path() -> None:
    moved = Moved([crossing(0, 0, 2), crossing(1, 1, 3)], 2)
    moved.meet(0, [torch.zeros(2, 3, dtype=torch.float64)])
    assert moved.q(1) is not None
    with pytest.raises(UnsupportedModelError, match="another path"):
        moved.q(2)
