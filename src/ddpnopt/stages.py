# SPDX-License-Identifier: MIT
"""What is recorded of a nominal pass: its stages, their states and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from ddpnopt.crossing import Crossing, Path, Span
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.layers import LayerRule, tied
from ddpnopt.layout import ROWS, SECOND, SHARED, arranged
from ddpnopt.replay import Call
from ddpnopt.terminal import Cost
from ddpnopt.typing import Tensor

COMMON = "all samples share its output"


@dataclass(eq=False)
class Stage:
    """One execution of a parametrised layer (time step t).

    Attributes:
        name: Module path.
        module: The layer.
        rule: Its linear maps; None where the layer takes the plain step.
        x: State that entered it: its input (alias), or all of them packed by the rule.
        inputs: The input tensors (aliases), with their versions.
        rows: Dimension 0 of the output.
        unbatched: The input is a single sample without a batch axis; the record adds it.
        weights: Versions of the layer's parameters in the pass.
        G: Gradient at the pre-activation; None until a backward pass has brought it.
        g_x: Gradient at the state.
        fresh_G, fresh_g_x, fresh_Z: The same, of a backward pass that has not ended.
        Z_h, Z_x: The terminal factor's columns pulled back to h and x.
        J: Jacobian of the next active layer's state (or the output) by h, (B, X', H).
        pulls: Its gradient at the state is pulled back by its rule: one of its inputs may depend
            on another, and autograd's gradient at it would count that way, too.
        plain: Why this stage takes the plain step; empty if it takes part in feedback.
        time: How many layers had begun when it ran, itself included, where that was watched.
        repeats: Later executions of the same layer, of which this is the first.
        layout, samples: How the samples lie in what the layer gets and gives, where not in rows;
            x, G and Z_h are kept in rows.
        layouts: How they may lie, by all probes; None before the first.
    """

    name: str
    module: nn.Module
    rule: LayerRule | None
    x: Tensor
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rows: int
    unbatched: bool = False
    weights: int = 0
    G: Tensor | None = None
    g_x: Tensor | None = None
    fresh_G: Tensor | None = None
    fresh_g_x: Tensor | None = None
    fresh_Z: dict[str, Tensor] = field(default_factory=dict)
    Z_h: Tensor | None = None
    Z_x: Tensor | None = None
    J: Tensor | None = None
    plain: str = ""
    pulls: bool = False
    time: int = 0
    repeats: list[Stage] = field(default_factory=list)
    layout: str = ROWS
    samples: int = 0
    layouts: tuple[str, ...] | None = None

    @property
    def shared(self) -> bool:
        """All samples have a part in all of its output."""
        return self.plain == COMMON

    def may_lie(self, layout: str) -> bool:
        """Whether its samples may lie so: a rule that treats all positions alike is needed."""
        return layout == ROWS or (self.rule is not None and self.rule.positionwise)

    def lay(self, layout: str, samples: int) -> None:
        """How its samples have been found to lie."""
        if layout == SHARED:
            self.plain = self.plain or COMMON
            return
        self.layout, self.samples = layout, samples

    def arrange(self) -> None:
        """Put the recorded state in rows; what is recorded later is put so as it comes."""
        if self.layout != ROWS:
            self.x = self.arranged(self.x)
            self.rows = self.samples if self.layout == SECOND else self.rows

    def arranged(self, t: Tensor, axis: int = 0) -> Tensor:
        """A tensor of x's or h's layout in rows, with a batch axis; ``axis`` 1 behind columns."""
        if self.unbatched:
            return t.unsqueeze(axis)
        return arranged(t, self.layout, self.samples, axis)


def times(t: Tensor | None, factor: float) -> Tensor | None:
    """A multiple of what there is."""
    return None if t is None else t * factor


def _split(t: Tensor, axis: int, samples: int) -> Tensor:
    return t.reshape(*t.shape[:axis], samples, -1, *t.shape[axis + 1 :])


def whole(stage: Stage, samples: int) -> Stage:
    """A layer's executions as one: to each sample belong its rows of all of them.

    Args:
        stage: The first execution.
        samples: B.
    """
    parts = [one for one in (stage, *stage.repeats) if one.G is not None]
    if len(parts) < 2 and not stage.repeats:
        return stage

    first = parts[0]
    assert first.rule is not None
    rule, module = first.rule, first.module
    if any(one.module is not module for one in parts):
        rule, module, x, G, Z_h = tied.tied(parts, samples)
    else:
        x = _joined([one.x for one in parts], samples, 0)
        G = _joined([one.G for one in parts if one.G is not None], samples, 0)
        Z = [one.Z_h for one in parts if one.Z_h is not None]
        Z_h = _joined(Z, samples, 1) if Z else None
    return replace(
        first,
        rule=rule,
        module=module,
        x=x,
        inputs=rule.unpack(module, x),
        rows=G.shape[0],
        G=G,
        Z_h=Z_h,
        time=stage.time,
        layout=ROWS,
        repeats=stage.repeats,
    )


def _joined(tensors: list[Tensor], samples: int, axis: int) -> Tensor:
    split = [_split(t, axis, samples) for t in tensors]
    return torch.cat(split, axis + 1).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Head:
    """An output beside the last.

    Attributes:
        z: Its value (an alias).
        crossing: It is part of the state from its layer to the loss; None in open loop.
    """

    z: Tensor
    crossing: Crossing | None


@dataclass(eq=False)
class Front:
    """What one backward pass has found at its boundary.

    Attributes:
        corrections: d - gbar of the front's parameters.
        weighted: sum_i |c_i g_i|^2.
        coefficient: (B,) c.
        S: (B,) parameter of the envelope, where the value function has one.
    """

    corrections: dict[Tensor, Tensor]
    weighted: Tensor
    coefficient: Tensor
    S: Tensor | None

    def plus(self, other: Front | None) -> Front:
        """Two backward passes through the same graph."""
        if other is None:
            return self
        total = dict(self.corrections)
        for p, d in other.corrections.items():
            total[p] = total[p] + d if p in total else d
        return Front(total, self.weighted + other.weighted, other.coefficient, other.S)


@dataclass(eq=False)
class Trajectory:
    """One recorded pass.

    Attributes:
        stages: Executions in order.
        z: Output of the last parametrised layer, with its version.
        call: How to run the pass again; None in open loop, or where it is not known.
        calls: The layers as that call has called them, by name, and whether under gradients.
        samples: B.
        refusal: Why no feedback is possible; raised when a step needs it.
        owned: One call contains all layers.
        key: The structure; passes with the same key behave alike.
        to_verify: The chain is to be verified on this pass's first gradients.
        cost: Its terminal cost; None if not recognised.
        error: What the terminal cost found wrong; raised at the step.
        pending: Cost and error of a backward pass that has not ended.
        boundary: The stage at whose state the samples are weighted for everything in front of it;
            0 for none, the number of stages for the output.
        front, fresh_front: What has been found there.
        crossings: What crosses the cuts in front of its layers, where branches do.
        heads: Layers beside the last whose output goes to the loss alone.
        arrived: The costs of the outputs whose gradients have arrived, and those gradients.
        columns: Columns of the terminal factors of the outputs that have arrived.
        blind: Where something crosses that can't be followed.
        path: Its calls of torch functions, where they were watched.
        accounted: It is looked at whether the known uses account for the gradients.
        unaccounted: The layer from which a tensor goes to the loss unseen.
        cut_short: A module whose call was taken for all of the pass, until layers ran behind it.
        share: What its loss is to be multiplied by before a step, for the ranks' average.
    """

    stages: list[Stage] = field(default_factory=list)
    z: Tensor | None = None
    z_version: int = -1
    call: Call | None = None
    calls: list[tuple[str, bool]] = field(default_factory=list)
    samples: int = 0
    refusal: str = ""
    owned: bool = False
    key: tuple[Any, ...] = ()
    to_verify: bool = False
    cost: Cost | None = None
    error: Exception | None = None
    pending: tuple[Cost | None, Exception | None] | None = None
    boundary: int = 0
    front: Front | None = None
    fresh_front: Front | None = None
    crossings: list[Crossing] = field(default_factory=list)
    heads: dict[Stage, Head] = field(default_factory=dict)
    arrived: dict[Stage, tuple[Cost | None, Tensor]] = field(default_factory=dict)
    columns: int = 0
    blind: list[Span] = field(default_factory=list)
    path: Path | None = None
    accounted: bool = False
    unaccounted: str | None = None
    cut_short: str | None = None
    share: float = 1.0

    @property
    def executions(self) -> list[Stage]:
        """Stages that take part in feedback."""
        return [s for s in self.stages if not s.plain and s.G is not None]

    @property
    def active(self) -> list[Stage]:
        """Layers that take part in feedback, each at its first execution."""
        later = {id(one) for s in self.stages for one in s.repeats}
        return [
            s
            for s in self.stages
            if not s.plain
            and id(s) not in later
            and (s.G is not None or any(one.G is not None for one in s.repeats))
        ]

    def weigh(self, share: float) -> None:
        """Multiply the loss of this pass by a number, as if it had been so from the beginning."""
        root = share**0.5
        for stage in self.stages:
            stage.G, stage.g_x = times(stage.G, share), times(stage.g_x, share)
            stage.Z_h, stage.Z_x = times(stage.Z_h, root), times(stage.Z_x, root)
        for one in self.crossings:
            one.g, one.Z = times(one.g, share), times(one.Z, root)
        if self.front is not None:
            corrections = {p: d * share for p, d in self.front.corrections.items()}
            weighted = self.front.weighted * share**2
            self.front = replace(self.front, corrections=corrections, weighted=weighted)
        if self.cost is not None:
            self.cost = self.cost.times(share)

    def again(self) -> Call:
        """How to run the pass again.

        Raises:
            UnsupportedModelError: Not all of the call is known.
        """
        if self.call is None and self.cut_short is not None:
            raise UnsupportedModelError(
                f"layers ran again, or first, behind the call of '{self.cut_short}', which was "
                "taken for the whole pass, so it can't be run again; from the next pass on what "
                "calls it is: run the pass anew"
            )
        if self.call is None:
            raise UnsupportedModelError(
                "the model became known by a call with keyword arguments that may have changed "
                "since, so it can't be run again; give the optimizer the module instead of its "
                "parameters"
            )
        return self.call

    def forget_gradients(self) -> None:
        """Back to how the forward pass left it: its gradients have been used or thrown away."""
        self.cost = self.error = self.pending = self.front = self.fresh_front = None
        self.arrived, self.columns, self.unaccounted, self.share = {}, 0, None, 1.0
        for stage in self.stages:
            stage.G = stage.g_x = stage.fresh_G = stage.fresh_g_x = None
            stage.Z_h = stage.Z_x = stage.J = None
            stage.fresh_Z = {}
        for one in self.crossings:
            one.forget()


@dataclass(frozen=True, eq=False)
class Link:
    """Edges of the stages upstream of a gradient hook, newest first (a list that shares tails).

    Attributes:
        stage: The stage.
        x, h: Edges of its inputs and its output.
        before: The stages before it.
        number: Place of the output among its node's results.
        taps: What was used since the stage before it, from earlier time steps.
    """

    stage: Stage
    x: tuple[GradientEdge | None, ...]
    h: GradientEdge | None
    before: Link | None
    number: int = 0
    taps: tuple[tuple[Crossing, GradientEdge], ...] = ()
