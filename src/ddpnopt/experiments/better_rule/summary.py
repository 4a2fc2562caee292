# SPDX-License-Identifier: MIT
"""The bounded step beside the default rule and the best rival, problem by problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpnopt.experiments.better_rule import study
from ddpnopt.experiments.better_rule.study import Entry
from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.records import RunResult
from ddpnopt.experiments.summary import stretch
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.when_it_helps.problems import FAMILIES, Problem
from ddpnopt.experiments.when_it_helps.tables import POINTS

#: Which curvature the bound is put on, by the family it is compared in.
INNER = {"sgd": (), "adamw": (("curvature.inner", "adamw"),)}


@dataclass(frozen=True)
class Row:
    """A problem and a borrowed optimizer.

    Attributes:
        bounded: The bounded step, closed loop.
        default: The default rule, closed loop.
        rival: The best of the borrowed optimizer and its rivals, on the choosing seeds.
    """

    heading: str
    title: str
    bounded: Entry
    default: Entry
    rival: Entry

    def cells(self) -> list[str]:
        """As a row of the table."""
        entries = self.bounded, self.default, self.rival
        reference = max(e.means[e.best] for e in entries)
        rates = " / ".join(_good(e, reference) for e in entries)
        against = [_paired(self.bounded, self.default), _paired(self.bounded, self.rival)]
        mine = f"{_shown(self.bounded)} at {self.bounded.best:g}"
        theirs = f"{_shown(self.rival)} ({self.rival.name})"
        return [self.heading, self.title, mine, _shown(self.default), theirs, *against, rates]


def rows(
    problems: Mapping[str, Problem],
    seeds: Sequence[int],
    fresh: Sequence[int],
    stored: Mapping[str, RunResult],
) -> list[Row]:
    """Those that have run, with the study's runs among what is stored."""
    found = []
    for name, problem in problems.items():
        for key in [k for k in INNER if k in problem.families]:
            family = FAMILIES[key]
            bounded = [
                c
                for c in study.variants(name)
                if (c.optimizer, c.options) == ("ddpnopt-trust", INNER[key])
            ]
            plain = Contender(family.off, family.lrs)
            wanted = [*bounded, Contender(family.closed, family.lrs), plain, *family.others()]
            own = [study.entry(problem.base, c, seeds, fresh, stored) for c in wanted]
            known = [e for e in own if e is not None and len(e.fresh) == len(fresh)]
            if len(known) == len(wanted):
                rival = max(known[2:], key=lambda e: e.means[e.best])
                found.append(Row(problem.heading, family.title, known[0], known[1], rival))
    return found


def render(found: Sequence[Row]) -> str:
    """The table."""
    header = ["network", "around", "bounded, at its best rate", "default rule", "best rival"]
    header += ["bounded - default", "bounded - rival", "good rates: bounded / default / rival"]
    return table(header, [row.cells() for row in found])


def _shown(e: Entry) -> str:
    return f"{np.mean(e.fresh):.1f} ± {np.std(e.fresh, ddof=1):.1f} ({min(e.fresh):.1f})"


def _paired(one: Entry, other: Entry) -> str:
    apart = np.subtract(one.fresh, other.fresh)
    error = float(apart.std(ddof=1)) / math.sqrt(len(apart))
    text = f"{apart.mean():+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(apart.mean()) > 2 * error else text


def _good(e: Entry, reference: float) -> str:
    lrs = sorted(e.means)
    found = stretch([e.means[lr] >= reference - POINTS for lr in lrs], lrs.index(e.best))
    return "-" if found is None else f"{lrs[found[0]]:g} to {lrs[found[1]]:g}"
