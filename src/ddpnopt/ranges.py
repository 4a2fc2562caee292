# SPDX-License-Identifier: MIT
"""Options that must be one of some names, a number of a range, or a switch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any


def check_choice(owner: str, option: str, given: object, names: Sequence[str]) -> None:
    """Refuse what is none of the names.

    Raises:
        ValueError: The option and the allowed names.
    """
    if given not in names:
        raise ValueError(f"{_label(owner, option, given)}: choose from {', '.join(names)}")


def check_switch(owner: str, option: str, given: object) -> None:
    """Refuse what is neither True nor False: a text such as "no" would count as True.

    Raises:
        ValueError: The option.
    """
    if not isinstance(given, bool):
        raise ValueError(f"{_label(owner, option, given)}: choose from True, False")


def check_number(
    owner: str, option: str, given: object, allowed: Callable[[Any], bool], must: str
) -> None:
    """Refuse what is no number, or not in a range.

    Args:
        owner: Whose option it is; empty for an argument.
        option: Its name.
        given: What was given.
        allowed: Tells of a number whether it is in the range; False for NaN.
        must: What it must be, for the message.

    Raises:
        ValueError: The option, what was given and `must`.
    """
    try:
        fine = bool(allowed(given)) and not isinstance(given, str | complex)
    # What is no number can't be compared, and some integers are too large for it.
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fine = False
    if not fine:
        raise ValueError(f"{_label(owner, option, given)}: {must}")


def not_negative(number: Any) -> bool:
    """0 <= number; infinity is allowed."""
    return bool(number >= 0)


def finite(number: Any) -> bool:
    """0 <= number < infinity."""
    return 0 <= float(number) < math.inf


def positive(number: Any) -> bool:
    """0 < number < infinity."""
    return 0 < float(number) < math.inf


def count(number: Any) -> bool:
    """1, 2, 3, ..."""
    return operator.index(number) >= 1 and not isinstance(number, bool)


def share(number: Any) -> bool:
    """0 <= number < 1."""
    return bool(0 <= number < 1)


def _label(owner: str, option: str, given: object) -> str:
    return f"{owner}({option}={given!r})" if owner else f"{option}={given!r}"
