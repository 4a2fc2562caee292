# SPDX-License-Identifier: MIT
"""DDPNOpt: the Differential Dynamic Programming Neural Optimizer for PyTorch."""

from ddpnopt import curvature, value
from ddpnopt.baselines import EKFAC, KFAC
from ddpnopt.errors import DDPNOptWarning, NonFiniteError, TerminalError, UnsupportedModelError
from ddpnopt.explain import explain
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.recognition import MSE
from ddpnopt.report import LayerReport, StepReport
from ddpnopt.value import PAPER

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "MSE",
    "PAPER",
    "DDPNOpt",
    "DDPNOptWarning",
    "LayerReport",
    "NonFiniteError",
    "StepReport",
    "TerminalError",
    "UnsupportedModelError",
    "__version__",
    "curvature",
    "explain",
    "value",
]
