# SPDX-License-Identifier: MIT
"""Training recorded once, and run without its Python code."""

from ddpnopt.captured.capturing import capture
from ddpnopt.captured.loop import CapturedLoop
from ddpnopt.captured.step import CapturedStep
from ddpnopt.captured.update import CapturedUpdate

__all__ = ["CapturedLoop", "CapturedStep", "CapturedUpdate", "capture"]
