# SPDX-License-Identifier: MIT
"""Optimizers to compare with, on the library's own recording and layer rules."""

from ddpnopt.baselines.emsa import EMSA
from ddpnopt.baselines.kronecker import EKFAC, KFAC
from ddpnopt.baselines.vanilla_ddp import VanillaDDP
from ddpnopt.baselines.vgr import SGDVGR

__all__ = ["EKFAC", "EMSA", "KFAC", "SGDVGR", "VanillaDDP"]
