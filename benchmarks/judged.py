# SPDX-License-Identifier: MIT
"""Methods at their own best rates, chosen on some seeds and judged on others; used by two programs.

Trainings are the studies' own (`ddpnopt.experiments.training.train`); `when_it_helps` and
`better_rule` have the same protocol and the same figures for what they share with these programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from joblib import Parallel, delayed
from rich.console import Console

from ddpnopt.experiments.better_rule.study import Entry, confirming, entry
from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.sweep import Contender, grid
from ddpnopt.experiments.when_it_helps.problems import RATIOS, STEPS
from rates import WITHIN


@dataclass(frozen=True)
class Around:
    """A borrowed optimizer.

    Attributes:
        off: Its registry name.
        closed: That of the default rule around it, in closed loop; open: with "-open-loop" behind.
        rates: Half a decade apart.
    """

    off: str
    closed: str
    rates: tuple[float, ...]


AROUND = {
    "sgd": Around("sgd", "ddpnopt", STEPS),
    "adamw": Around("adamw", "feedback-adamw", RATIOS),
}


@dataclass(frozen=True)
class Protocol:
    """How methods are compared.

    Attributes:
        run: Trains.
        choosing, judging: Seeds that choose each method's rate, and seeds that judge.
        jobs: Processes.
    """

    run: Callable[[RunConfig], RunResult]
    choosing: range
    judging: range
    jobs: int

    def judge(self, base: RunConfig, methods: Mapping[str, Contender]) -> dict[str, Entry]:
        """Train all at all rates on the choosing seeds, each at its best on the others."""
        results = self._trained(c for m in methods.values() for c in grid(base, [m], self.choosing))
        chosen = {name: self._entry(base, m, results) for name, m in methods.items()}
        results |= self._trained(
            c
            for name, m in methods.items()
            for c in confirming(base, m, chosen[name].best, self.judging)
        )
        return {name: self._entry(base, m, results) for name, m in methods.items()}

    def _trained(self, configs: Iterable[RunConfig]) -> dict[str, RunResult]:
        found = Parallel(n_jobs=self.jobs)(delayed(self.run)(config) for config in configs)
        return {one.config.key: one for one in found}

    def _entry(self, base: RunConfig, method: Contender, results: Mapping[str, RunResult]) -> Entry:
        found = entry(base, method, self.choosing, self.judging, results)
        assert found is not None, "some run at a rate is missing"
        return found


def show(title: str, found: Mapping[str, Entry], reference: str) -> None:
    """Print a table.

    Args:
        title: What stands above it.
        found: By method.
        reference: The method whose scores the others' are compared with, seed by seed.
    """
    top = max(one.means[one.best] for one in found.values())
    rows = [[name, *_cells(one, found[reference], top)] for name, one in found.items()]
    header = ["method", "at", "choosing", "mean ± sd (worst)", f"- {reference}", "good", "by rate"]
    console = Console()
    console.print(f"\n**{title}**\n", markup=False)
    console.print(table(header, rows), soft_wrap=True, markup=False, highlight=False)


def _cells(one: Entry, reference: Entry, top: float) -> list[str]:
    gap = np.subtract(one.fresh, reference.fresh)
    error = float(gap.std(ddof=1)) / len(gap) ** 0.5
    good = [lr for lr, mean in sorted(one.means.items()) if mean >= top - WITHIN]
    return [
        f"{one.best:g}",
        f"{one.means[one.best]:.1f}",
        f"{np.mean(one.fresh):.1f} ± {np.std(one.fresh, ddof=1):.1f} ({min(one.fresh):.1f})",
        "" if one is reference else f"{gap.mean():+.1f} ± {error:.1f}",
        f"{good[0]:g} to {good[-1]:g}" if good else "-",
        " ".join(f"{mean:.1f}" for _, mean in sorted(one.means.items())),
    ]
