# SPDX-License-Identifier: MIT
"""What a study searches: ranges of learning rates, Table 5's where it has one, and of options."""

from __future__ import annotations

import math
from collections.abc import Mapping

import optuna
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import OPTIMIZERS, OptionValue
from ddpnopt.experiments.reproduce.published import search_range

#: Where the paper has no range: four decades.
WIDE = (1e-3, 10.0)
# Optimizers whose step is that of a method of Table 5, up to what the rate does not scale.
_LIKE = {
    "sgd-clip": "sgd",
    "sgd-vgr": "sgd",
    "identity": "sgd",
    "adamw": "adam",
    "kfac": "ekfac",
}


def default_range(optimizer: str, options: Mapping[str, OptionValue] | None = None) -> str:
    """Name the method of Table 5 whose range of rates an optimizer is searched in.

    A twin has the range of the optimizer whose curvature it borrows. With momentum, a rate means
    another step, so the range isn't Table 5's.

    Args:
        optimizer: Name in `ddpnopt.experiments.optimizers.OPTIMIZERS`.
        options: Options set by hand.

    Returns:
        A method of Table 5, or "wide".

    Raises:
        ValueError: Unknown optimizer.
    """
    merged = {**lookup(OPTIMIZERS, optimizer, "optimizer").defaults, **(options or {})}
    if merged.get("momentum"):
        return "wide"
    own = optimizer.startswith("ddpnopt")
    name = str(merged.get("curvature", "identity")) if own else optimizer
    name = _LIKE.get(name, name)
    return name if search_range(name) else "wide"


def range_of(
    optimizer: str, options: Mapping[str, OptionValue], text: str | None
) -> tuple[float, float]:
    """The range of rates to search.

    Args:
        optimizer: Name in `ddpnopt.experiments.optimizers.OPTIMIZERS`.
        options: Options set by hand.
        text: "low,high"; None: Table 5's, see `default_range`.

    Raises:
        ValueError: Unknown optimizer, or a text that is no range.
    """
    if text is None:
        return search_range(default_range(optimizer, options)) or WIDE
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--lr-range {text!r} must be two numbers, such as 0.07,0.5") from error
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"--lr-range {text}: give a positive number and a larger one")
    return low, high


class Space(BaseModel):
    """Where one number is searched.

    Attributes:
        low: Lowest value.
        high: Highest value.
        log: Evenly on the logarithmic scale.
        whole: Whole numbers only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Space:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"range {self.low:g} to {self.high:g}: the first must be the smaller")
        if self.log and self.low <= 0.0:
            raise ValueError(f"a logarithmic range must begin above 0, got {self.low:g}")
        return self

    def draw(self, trial: optuna.Trial, name: str) -> float | int:
        """Let the study choose a value."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


def parse_space(text: str) -> tuple[str, Space]:
    """Read `name=low:high` or `name=low:high:log`; two whole numbers search whole numbers.

    Args:
        text: What the user wrote, such as `momentum=0.0:0.99` or `curvature.damping=1e-4:1:log`.

    Returns:
        The option's name and its range.

    Raises:
        ValueError: It is written otherwise, or the range is empty.
    """
    name, _, span = text.partition("=")
    parts = span.split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
    except (ValueError, IndexError):
        parts = []
    if not name.strip() or parts[2:] not in ([], ["log"]) or not parts:
        raise ValueError(
            f"--search {text!r} must be written option=low:high or option=low:high:log, "
            "such as momentum=0.0:0.99"
        )
    whole = all(part.strip().lstrip("+-").isdigit() for part in parts[:2])
    try:
        return name.strip(), Space(low=low, high=high, log=len(parts) == 3, whole=whole)
    except ValidationError as error:
        # Pydantic's own text names neither the option nor what was written.
        said = "; ".join(str(e["ctx"]["error"]) for e in error.errors() if "ctx" in e)
        raise ValueError(f"--search {text}: {said}") from error
