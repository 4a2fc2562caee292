# SPDX-License-Identifier: MIT
"""The format of states, and how those of earlier releases become today's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Format of the "ddpnopt" entry of a ``state_dict``. It grows by one when an entry is renamed, or
#: changes its meaning; `UPGRADES` then gets what makes the old entry the new one.
FORMAT_VERSION = 1
#: From a format to the next: takes an entry and returns the next format's.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def upgraded(own: Mapping[str, Any], needed: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """The "ddpnopt" entry of a state, in today's format; what is given stays as it is.

    Args:
        own: The entry as it was saved.
        needed: An entry as it is saved now: all of its keys have to be there.
        whose: The optimizer's name, for messages.

    Raises:
        ValueError: The format is not known (newer, or none), or something is missing.
    """
    version = own.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"load_state_dict: the state's format is {version!r}; expected the state_dict of a "
            f"{whose}"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"load_state_dict: the state's format {version} is newer than this release's "
            f"({FORMAT_VERSION}): update ddpnopt to load it"
        )
    entry = dict(own)
    while version < FORMAT_VERSION:
        entry = UPGRADES[version](entry)
        version += 1
        entry["version"] = version
    if missing := needed.keys() - entry.keys():
        raise ValueError(f"load_state_dict: the state lacks {', '.join(sorted(missing))}")
    return entry
