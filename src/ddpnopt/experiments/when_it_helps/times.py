# SPDX-License-Identifier: MIT
"""The study at equal CPU time."""

from __future__ import annotations

from collections.abc import Sequence

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.when_it_helps.tables import Verdict

_HOW = (
    "The best mean over the rates (choosing seeds; rates chosen on the same figures) when the CPU "
    "time is over that the borrowed optimizer took for all its epochs, linear between epochs; in "
    "brackets an epoch's time over the borrowed optimizer's. Equal steps: the tables below."
)


def render(found: Sequence[Verdict]) -> str:
    """Heading, table and how it is to be read."""
    return "\n\n".join(["### At equal CPU time", _HOW, equal_time(found)]) if found else ""


def equal_time(found: Sequence[Verdict]) -> str:
    """The three depths and the best rival in the time that the borrowed optimizer took."""
    rows = []
    for v in found:
        off = v.in_time_of_off(v.depths[0])[1]
        depths = [v.in_time_of_off(m) for m in v.depths[1:]]
        timed = [(*v.in_time_of_off(m), m.label) for m in v.rivals]
        ratio, reached, name = max(timed, key=lambda one: one[1]) if timed else (1.0, off, "-")
        cells = [f"{best:.1f} ({x:.1f}x)" for x, best in depths]
        rows.append([v.problem.heading, v.family.title, f"{off:.1f}", *cells])
        rows[-1].append(f"{reached:.1f} ({ratio:.1f}x, {name})" if timed else "-")
    header = ["network", "around", "off", "open loop", "closed loop", "best rival in that time"]
    return table(header, rows)
