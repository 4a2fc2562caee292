# SPDX-License-Identifier: MIT
"""How much of a proof runs: what a change needs, or all of it, with ``DDPNOPT_FULL=1``."""

from __future__ import annotations

import os

FULL = os.environ.get("DDPNOPT_FULL", "0") != "0"


def effort(name: str, usual: int, full: int) -> int:
    """A number of examples, steps or kills.

    Args:
        name: The environment variable that sets it, whatever DDPNOPT_FULL says.
        usual: For every change.
        full: With DDPNOPT_FULL=1.
    """
    return int(os.environ.get(name, full if FULL else usual))
