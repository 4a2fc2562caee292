# SPDX-License-Identifier: MIT
"""DDPNOpt: the Differential Dynamic Programming Neural Optimizer for PyTorch."""

from ddpnopt import curvature, value
from ddpnopt.baselines import EKFAC, EMSA, KFAC, SGDVGR, VanillaDDP
from ddpnopt.captured import CapturedLoop, CapturedStep, CapturedUpdate, capture
from ddpnopt.errors import (
    DDPNOptWarning,
    NonFiniteError,
    RankError,
    TerminalError,
    UnsupportedModelError,
)
from ddpnopt.explain import explain
from ddpnopt.feedback import Feedback
from ddpnopt.gains import Gain, feedback_gains
from ddpnopt.logs import StepLog, scalars
from ddpnopt.losses import MMCLoss
from ddpnopt.open_loop import OpenLoop, open_loop
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.report import LayerReport, StepReport
from ddpnopt.terminal import MMC, MSE
from ddpnopt.value import PAPER

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "EMSA",
    "KFAC",
    "MMC",
    "MSE",
    "PAPER",
    "SGDVGR",
    "CapturedLoop",
    "CapturedStep",
    "CapturedUpdate",
    "DDPNOpt",
    "DDPNOptWarning",
    "Feedback",
    "Gain",
    "LayerReport",
    "MMCLoss",
    "NonFiniteError",
    "OpenLoop",
    "RankError",
    "StepLog",
    "StepReport",
    "TerminalError",
    "UnsupportedModelError",
    "VanillaDDP",
    "__version__",
    "capture",
    "curvature",
    "explain",
    "feedback_gains",
    "open_loop",
    "scalars",
    "value",
]
