# SPDX-License-Identifier: MIT
"""States of optimizers that are not finite: every step from there on would not be, either."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ddpnopt.errors import NonFiniteError
from ddpnopt.typing import Tensor


def check_finite(states: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse states that are not finite.

    Args:
        states: The parameters' names, and what the optimizer keeps of each.

    Raises:
        NonFiniteError: The parameter is named, and the entry of its state.
    """
    for name, state in states:
        for entry, value in state.items():
            if not _finite(value):
                raise NonFiniteError(
                    f"the optimizer's state of '{name}' is not finite already ('{entry}'), so "
                    "none of its steps would be; neither state nor weights were changed. Load an "
                    "earlier state, or empty this one: optimizer.state[p].clear()"
                )


def _finite(value: Any) -> bool:
    if isinstance(value, float):  # the best loss so far may be infinite
        return not math.isnan(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    values = value.coalesce().values() if value.is_sparse else value
    return bool(values.isfinite().all())
