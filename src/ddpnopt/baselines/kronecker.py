# SPDX-License-Identifier: MIT
"""KFAC and EKFAC as optimizers in their own right, in the plain loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ddpnopt import curvature
from ddpnopt.optimizer import DDPNOpt


class KFAC(DDPNOpt):
    """Kronecker-factored approximate curvature (Martens and Grosse 2015), without feedback.

    ``DDPNOpt(model, curvature=ddpnopt.curvature.KFAC(...), feedback=False)`` by its own name. The
    loss must be a mean over the batch: the factors are of single samples' gradients.

    Args:
        model: The network; any modules, the factors are of its dense and convolutional layers.
        lr: Learning rate.
        damping: Added to the curvature; see `ddpnopt.curvature.Joint`.
        decay: Of the factors' running means.
        update_every: Steps between two inversions.
        momentum: Heavy ball, of the preconditioned gradient.
        weight_decay: Coupled: enters the gradient before it is preconditioned.
        nonfinite: "raise" or "skip" a step whose numbers are not finite.
        params: Parameter groups, as in `ddpnopt.DDPNOpt`.
        process_group: The ranks that take each step together, as in `ddpnopt.DDPNOpt`.
        distributed: False: this process trains by itself.
        statistics_every: Steps between two updates of the factors.

    Raises:
        ValueError: An option is out of range.
    """

    _curvature: type[curvature.Joint] = curvature.KFAC

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        damping: float = 0.1,
        decay: float = 0.95,
        update_every: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
        process_group: Any = None,
        distributed: bool = True,
        statistics_every: int = 1,
    ) -> None:
        super().__init__(
            model,
            lr,
            curvature=self._curvature(damping, decay, update_every, statistics_every),
            feedback=False,
            momentum=momentum,
            weight_decay=weight_decay,
            nonfinite=nonfinite,
            params=params,
            process_group=process_group,
            distributed=distributed,
        )


class EKFAC(KFAC):
    """KFAC in the factors' eigenbasis with its own diagonal there (George et al. 2018).

    Args: see `KFAC`.
    """

    _curvature = curvature.EKFAC
