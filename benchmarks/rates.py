# SPDX-License-Identifier: MIT
"""The table of methods over learning rates that several of these programs print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from ddpnopt.experiments.markdown import table

#: Points of accuracy below the best mean within which a rate is a good one.
WITHIN = 2.0


def print_rates(
    title: str, found: Mapping[str, Sequence[Sequence[float]]], rates: Sequence[float]
) -> None:
    """Print each method's best mean, its worst seed there, its good rates, and all means.

    Args:
        title: What stands above the table.
        found: By method, accuracies of all seeds at each rate.
        rates: Ascending.
    """
    means = {m: [sum(one) / len(one) for one in own] for m, own in found.items()}
    best = max(map(max, means.values()))
    rows = list[list[str]]()
    for m, own in means.items():
        at = own.index(max(own))
        good = [lr for lr, mean in zip(rates, own, strict=True) if mean >= best - WITHIN]
        span = f"{good[0]:g} to {good[-1]:g}" if good else "none"
        shown = [f"{mean:.1f}" for mean in own]
        rows.append([m, f"{own[at]:.1f} ({min(found[m][at]):.1f}) at {rates[at]:g}", span, *shown])
    header = ["method", "best mean (worst seed)", "good rates", *(f"{lr:g}" for lr in rates)]
    console = Console(width=160)
    console.print(f"\n**{title}**\n")
    console.print(table(header, rows), soft_wrap=True)
