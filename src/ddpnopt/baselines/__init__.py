# SPDX-License-Identifier: MIT
"""Optimizers to compare with, on the library's own recording and layer rules."""

from ddpnopt.baselines.kronecker import EKFAC, KFAC

__all__ = ["EKFAC", "KFAC"]
