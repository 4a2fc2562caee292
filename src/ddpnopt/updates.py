# SPDX-License-Identifier: MIT
"""A parameter's update, before it is made."""

from __future__ import annotations

from dataclasses import dataclass

from ddpnopt.typing import Tensor


@dataclass(frozen=True, eq=False)
class Update:
    """One parameter's update, to be made.

    Attributes:
        p: The parameter.
        d: Gradient to step on, without weight decay.
        moment: M's statistics, where they are known already.
        fed: What M is fed with where they are not.
        squares: Sum over samples of the squared gradients, and the number of samples, likewise.
        plain: The plain gradient, where d is a re-weighted one.
        follows: M was fed with the plain gradient and is to follow d.
    """

    p: Tensor
    d: Tensor
    moment: Tensor | None = None
    fed: Tensor | None = None
    squares: tuple[Tensor, int] | None = None
    plain: Tensor | None = None
    follows: bool = False
