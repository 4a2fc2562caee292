# SPDX-License-Identifier: MIT
"""Training iterations recorded once, and run without their Python code."""

from ddpnopt.captured.step import CapturedStep, capture

__all__ = ["CapturedStep", "capture"]
