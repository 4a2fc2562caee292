# SPDX-License-Identifier: MIT
"""Value functions: what V_t(x_t) is, by name."""

from ddpnopt.value.augmented import Augmented
from ddpnopt.value.base import ValueFunction
from ddpnopt.value.dense import Dense
from ddpnopt.value.gauss_newton import GaussNewton
from ddpnopt.value.low_rank import LowRank
from ddpnopt.value.moreau import Moreau

#: Every value function by the name that users write.
VALUES: dict[str, type[ValueFunction]] = {
    v.name: v for v in (Moreau, GaussNewton, LowRank, Dense, Augmented)
}

#: The paper's algorithm for convolutional networks: the plain outer product with eq. 5.
PAPER = GaussNewton(match_curvature=False, backup="riccati")

__all__ = [
    "PAPER",
    "VALUES",
    "Augmented",
    "Dense",
    "GaussNewton",
    "LowRank",
    "Moreau",
    "ValueFunction",
]
