# SPDX-License-Identifier: MIT
"""What a step did: `opt.last_step`, read by plots and loggers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ddpnopt.typing import Tensor

#: A sample counts as bounded where its step is cut to less than this share.
BOUNDED_BELOW = 0.5


def _float(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One layer's policy in the last step.

    The tensors are small (one number a sample) and stay on their device; the properties convert
    them when they are read, so that recording costs no synchronisation.

    Attributes:
        name: Module path.
        coefficient: (B,) factor on each sample's gradient; None for value functions without one.
        S: (B,) Moreau parameter, or s = eta g_u^T M^-1 g_u for the quadratic rank-1 form.
        k: |P d(0)|, norm of the feedforward step; only with ``opt.diagnose = True``.
        Kdx: |P (d(q) - d(0))|, norm of the feedback step; only with ``opt.diagnose = True``.
    """

    name: str
    coefficient: Tensor | None = None
    S: Tensor | None = None
    k: Tensor | None = None
    Kdx: Tensor | None = None

    @property
    def k_norm(self) -> float | None:
        """|k| as a number."""
        return _float(self.k)

    @property
    def feedback_norm(self) -> float | None:
        """|K dx| as a number."""
        return _float(self.Kdx)

    @property
    def coefficient_mean(self) -> float | None:
        """Mean coefficient over the batch."""
        return None if self.coefficient is None else float(self.coefficient.mean())

    @property
    def coefficient_min(self) -> float | None:
        """Smallest coefficient of the batch."""
        return None if self.coefficient is None else float(self.coefficient.min())

    @property
    def S_mean(self) -> float | None:
        """Mean S over the batch."""
        return None if self.S is None else float(self.S.mean())

    @property
    def bounded_share(self) -> float | None:
        """Share of samples whose step is cut to less than half."""
        if self.coefficient is None:
            return None
        return float((self.coefficient < BOUNDED_BELOW).float().mean())


@dataclass(frozen=True, eq=False)
class StepReport:
    """The last call of ``step``.

    Attributes:
        depth: "closed_loop", "open_loop" or "off": what was really done.
        terminal: Name of the terminal cost, "unrecognised", or "none" with feedback off.
        samples: B over all accumulated passes.
        rescale: r, what p.grad was multiplied by between backward and step.
        layers: The layers that took part, in execution order.
        plain: Layers that took the plain step, and why.
        skipped: Steps skipped so far because a number was not finite.
        front: The samples' weights where their mixing begins (its name says where), for all layers
            in front of it; None where samples are not mixed.
    """

    depth: str
    terminal: str
    samples: int = 0
    rescale: float = 1.0
    layers: tuple[LayerReport, ...] = ()
    plain: tuple[tuple[str, str], ...] = ()
    skipped: int = 0
    front: LayerReport | None = None


#: A report, or what makes it when it is asked for.
Report = StepReport | Callable[[], StepReport | None]
