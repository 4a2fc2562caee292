# SPDX-License-Identifier: MIT
"""Curvatures: what M_t is, by name."""

from ddpnopt.curvature.adamw import AdamW
from ddpnopt.curvature.base import Curvature
from ddpnopt.curvature.identity import Identity
from ddpnopt.curvature.kronecker import EKFAC, KFAC, Joint
from ddpnopt.curvature.rmsprop import RMSprop
from ddpnopt.curvature.trust import Trust

#: Every curvature by the name that users write.
CURVATURES: dict[str, type[Curvature]] = {
    c.name: c for c in (Identity, RMSprop, AdamW, KFAC, EKFAC, Trust)
}

__all__ = [
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "AdamW",
    "Curvature",
    "Identity",
    "Joint",
    "RMSprop",
    "Trust",
]
