# SPDX-License-Identifier: MIT
"""Every table and figure that can be reproduced, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from ddpnopt.experiments.reproduce.outcome import Outcome, Request

Reproduction = Callable[[Request], Outcome]


def _later(module: str, function: str) -> Reproduction:
    # Imported when asked for: listing the names needs neither plots nor networks.
    def reproduce(request: Request) -> Outcome:
        found = import_module(f"ddpnopt.experiments.reproduce.{module}")
        return cast(Reproduction, getattr(found, function))(request)

    return reproduce


#: Name -> what makes it, in the order of `reproduce all`.
RESULTS: dict[str, Reproduction] = {
    "table3": _later("table3", "table3"),
    "table4": _later("costs", "table4"),
    "table5": _later("table5", "table5"),
    "table6": _later("twin_tables", "table6"),
    "table7": _later("twin_tables", "table7"),
    "table8": _later("twin_tables", "table8"),
    "table9": _later("twin_tables", "table9"),
    "table10": _later("twin_tables", "table10"),
    "fig3": _later("costs", "fig3"),
    "fig4": _later("fig4", "fig4"),
    "fig5": _later("policies", "fig5"),
    "fig6": _later("vanishing", "fig6"),
    "fig7": _later("policies", "fig7"),
    "fig10": _later("vanishing", "fig10"),
}
