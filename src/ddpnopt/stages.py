# SPDX-License-Identifier: MIT
"""What is recorded of a nominal pass: its stages, their states and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.autograd.graph import GradientEdge

from ddpnopt.layers import LayerRule
from ddpnopt.replay import Call
from ddpnopt.terminal import Cost
from ddpnopt.typing import Tensor


@dataclass(eq=False)
class Stage:
    """One execution of a parametrised layer (time step t).

    Attributes:
        name: Module path.
        module: The layer.
        rule: Its linear maps; None where the layer takes the plain step.
        x: State that entered it (alias), with its version.
        rows: Dimension 0 of the output.
        unbatched: The input is a single sample without a batch axis; the record adds it.
        G: Gradient at the pre-activation; None until it arrives.
        g_x: Gradient at the state.
        Z_h, Z_x: The terminal factor's columns pulled back to h and x.
        J: Jacobian of the next active layer's state (or the output) by h, (B, X', H).
        plain: Why this stage takes the plain step; empty if it takes part in feedback.
    """

    name: str
    module: nn.Module
    rule: LayerRule | None
    x: Tensor
    version: int
    rows: int
    unbatched: bool = False
    G: Tensor | None = None
    g_x: Tensor | None = None
    Z_h: Tensor | None = None
    Z_x: Tensor | None = None
    J: Tensor | None = None
    plain: str = ""


@dataclass(eq=False)
class Trajectory:
    """One recorded pass.

    Attributes:
        stages: Executions in order.
        z: Output of the last parametrised layer.
        call: How to run the pass again; None in open loop.
        samples: B.
        refusal: Why no feedback is possible; raised when a step needs it.
        owned: One call contains all layers.
        key: The structure; passes with the same key behave alike.
        cost: Its terminal cost; None if not recognised.
        error: What the terminal cost found wrong; raised at the step.
    """

    stages: list[Stage] = field(default_factory=list)
    z: Tensor | None = None
    call: Call | None = None
    samples: int = 0
    refusal: str = ""
    owned: bool = False
    key: tuple[Any, ...] = ()
    cost: Cost | None = None
    error: Exception | None = None

    @property
    def active(self) -> list[Stage]:
        """Stages that take part in feedback."""
        return [s for s in self.stages if not s.plain and s.G is not None]


@dataclass(frozen=True, eq=False)
class Link:
    """Edges of the stages upstream of a gradient hook, newest first (a list that shares tails)."""

    stage: Stage
    x: GradientEdge | None
    h: GradientEdge | None
    before: Link | None
