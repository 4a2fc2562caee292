# SPDX-License-Identifier: MIT
"""Looking up registry names, with the list of names in the error."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(registry: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """Return `registry[name]`.

    Args:
        registry: Names and what they stand for.
        name: The name asked for.
        kind: What the registry holds, for the message ("data set").

    Returns:
        The entry.

    Raises:
        ValueError: The name is unknown; the message lists all names and the closest one.
    """
    if name in registry:
        return registry[name]
    close = get_close_matches(name, registry, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted(registry))}.{hint}")
