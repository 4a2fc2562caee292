# SPDX-License-Identifier: MIT
"""The numbers that the paper prints (ICLR 2021, arXiv 2002.08809, Tables 5-10)."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Measure = Literal["train_loss", "accuracy"]
MEASURES: tuple[Measure, ...] = ("train_loss", "accuracy")


@dataclass(frozen=True)
class Cell:
    """A rate and, for a twin, its eps_Vxx, with what is printed for it.

    Attributes:
        table: "table6", ..., "ablation" for Tables 9 and 10.
        baseline: Registry name of the borrowed optimizer.
        lr: Learning rate.
        eps_vxx: Tikhonov term of the twin; None: the baseline. NaN: a twin whose eps is not printed
            (Tables 6-8).
        train_loss: Mean training loss of 10 seeds (nats).
        accuracy: Mean accuracy of 10 seeds, in %.
    """

    table: str
    baseline: str
    lr: float
    eps_vxx: float | None
    train_loss: float
    accuracy: float

    def value(self, measure: Measure) -> float:
        """The printed number of `measure`."""
        return self.train_loss if measure == "train_loss" else self.accuracy


@cache
def _content() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("published.toml").read_text())


def search_range(baseline: str) -> tuple[float, float] | None:
    """Rates between which the paper searched for a baseline (Table 5); None: not printed."""
    found = _content()["table5"].get(baseline)
    return None if found is None else (float(found[0]), float(found[1]))


@cache
def cells() -> tuple[Cell, ...]:
    """All printed cells of Tables 6 to 10."""
    content = _content()
    found: list[Cell] = []
    for name in ("table6", "table7", "table8"):
        t = content[name]
        for eps, who in ((None, "baseline"), (math.nan, "ddpnopt")):
            numbers = float(t[f"{who}_train_loss"]), float(t[f"{who}_accuracy"])
            found.append(Cell(name, t["baseline"], float(t["lr"]), eps, *numbers))
    for block in content["ablation"]:
        columns = [None, *block["eps_vxx"]]
        for row, lr in enumerate(block["lr"]):
            for column, eps in enumerate(columns):
                loss, accuracy = (float(block[m][row][column]) for m in MEASURES)
                named = "ablation", block["baseline"], float(lr), eps
                found.append(Cell(*named, loss, accuracy))
    return tuple(found)


def find(table: str, baseline: str, lr: float, eps_vxx: float | None) -> Cell | None:
    """Find the printed cell of a rate.

    Args:
        table: "table6", "table7", "table8" or "ablation".
        baseline: Registry name of the borrowed optimizer.
        lr: Learning rate.
        eps_vxx: The twin's; None: the baseline. In Tables 6-8 any number means the twin.

    Returns:
        The cell; None where the paper prints none.
    """
    for cell in cells():
        if (cell.table, cell.baseline) != (table, baseline) or not math.isclose(cell.lr, lr):
            continue
        if (cell.eps_vxx is None) != (eps_vxx is None):
            continue
        if cell.eps_vxx is None or eps_vxx is None or math.isnan(cell.eps_vxx):
            return cell
        if math.isclose(cell.eps_vxx, eps_vxx):
            return cell
    return None
