# SPDX-License-Identifier: MIT
"""How much of a proof runs: what a change needs, or all of it, with ``DDPNOPT_FULL=1``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import product
from typing import Any

FULL = os.environ.get("DDPNOPT_FULL", "0") != "0"


def effort(name: str, usual: int, full: int) -> int:
    """A number of examples, steps or kills.

    Args:
        name: The environment variable that sets it, whatever DDPNOPT_FULL says.
        usual: For every change.
        full: With DDPNOPT_FULL=1.
    """
    return int(os.environ.get(name, full if FULL else usual))


def crossed(*factors: Iterable[Any], start: int = 0) -> list[tuple[Any, ...]]:
    """Every other combination for every change, all of them with DDPNOPT_FULL=1.

    Those whose places in their factors add up to an even number: every pair of values of two
    factors is among them as soon as there is a third factor, and every value where there is none.

    Args:
        factors: Each one's values.
        start: 1 takes the others, for another test of the same factors.
    """
    values = [list(factor) for factor in factors]
    places = product(*(range(len(some)) for some in values))
    return [
        tuple(some[i] for some, i in zip(values, place, strict=True))
        for place in places
        if FULL or (start + sum(place)) % 2 == 0
    ]
