# SPDX-License-Identifier: MIT
"""The options that the three quadratic value functions share."""

from __future__ import annotations

from dataclasses import dataclass

from ddpnopt.ranges import check_choice, check_number, check_switch, not_negative
from ddpnopt.value.backups import BACKUPS
from ddpnopt.value.base import STATISTICS, ValueFunction


@dataclass(frozen=True)
class Quadratic(ValueFunction):
    """A value function with V_x and V_xx.

    Args:
        backup: "proximal" (Q_uu = M / eta + f_u^T V_xx f_u in the backup), "closed_loop" (value
            of the applied policy) or "riccati" (eq. 5 with Q_uu = M / eta).
        own_layer: The policy, too, has f_u^T V_xx f_u in its Q_uu; the backups stay.
        clip: Bound of the feedback per sample, |V_hh g_x dx| <= clip |V_h|; None for no bound.
        statistics: "value": M is fed with Q_u (Table 2); "plain": with the plain gradient.

    Raises:
        ValueError: An option is out of range.
    """

    backup: str = "proximal"
    own_layer: bool = False
    clip: float | int | None = None
    statistics: str = "value"

    def __post_init__(self) -> None:
        """Check the options."""
        owner = type(self).__name__
        check_choice(owner, "backup", self.backup, BACKUPS)
        check_choice(owner, "statistics", self.statistics, STATISTICS)
        check_switch(owner, "own_layer", self.own_layer)
        if self.clip is not None:
            check_number(owner, "clip", self.clip, not_negative, "must not be negative")
