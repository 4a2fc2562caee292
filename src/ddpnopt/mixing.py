# SPDX-License-Identifier: MIT
"""Where samples are mixed, and how they lie: found by perturbing one of them at the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.crossing import Crossing
from ddpnopt.inert import probe, responses
from ddpnopt.layout import ROWS, SHARED, layouts_in_step, layouts_of
from ddpnopt.ledger import Ledger, Place
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.typing import Tensor


@dataclass(frozen=True)
class Probe:
    """What probes of a structure's passes have shown.

    Attributes:
        start: The first stage from which on no layer mixes samples.
        count: How many probes.
        place: The stage and dimension that tell B, where it is not what `Ledger.front` finds.
        layouts: How the samples may lie in each stage and crossing, by all probes: nothing for what
            all samples share, None for what has not been probed.
    """

    start: int = 0
    count: int = 0
    place: Place | None = None
    layouts: tuple[tuple[str, ...] | None, ...] = ()

    def lay(self, trajectory: Trajectory, again: bool) -> None:
        """Tell a pass's stages and crossings what is known.

        Args:
            trajectory: The pass.
            again: It is going to be probed: what all samples share is found anew.
        """
        everything: list[Stage | Crossing] = [*trajectory.stages, *trajectory.crossings]
        for part, layouts in zip(everything, self.layouts, strict=False):
            if layouts:
                part.layouts = layouts
                part.lay(layouts[0], trajectory.samples)
            elif not again:
                part.lay(ROWS if layouts is None else SHARED, trajectory.samples)

    def samples(self, trajectory: Trajectory) -> int:
        """B of a pass; 0 where `Ledger.front` finds it."""
        if self.place is None:
            return 0
        stage = trajectory.stages[self.place[0]]
        return stage.x.shape[1] if self.place[1] else stage.rows


def probed(
    trajectory: Trajectory,
    ledger: Ledger,
    taps: Sequence[GradientEdge],
    turn: int | None,
    graphs: bool,
) -> tuple[int, bool]:
    """The first stage from which on no layer mixes samples on the way to the output.

    One sample is perturbed at the output, in the adjoint direction: one backward pass with a
    seed on its rows alone shows at every stage whether the gradient stays in that sample's part,
    and which part that is. Both mixing (BatchNorm) and another ownership of rows show up. What no
    layer in feedback has made (a table of positions) mixes nothing: all samples share it.

    Args:
        trajectory: The pass; its stages and crossings are told how their samples lie.
        ledger: Its nodes and edges.
        taps: Edges of its crossings.
        turn: Which sample to perturb: the middle one, the first, the last, ... None for all of
            them, by weights: who owns which row is seen at once, down to a thousandth of it.
        graphs: Branches are allowed, and samples that lie otherwise than in rows.

    Returns:
        The index of the first unmixed stage, and whether the finding is conclusive (a zero
        gradient, as behind a layer that starts at zero, shows nothing).
    """
    samples, stages, edges = trajectory.samples, trajectory.stages, ledger.edges
    indices = [i for i, s in enumerate(stages) if not s.plain and edges[i] is not None]
    if samples <= 1 or not indices or edges[-1] is None:
        return 0, False
    # Behind what is mixed a layer is kept apart: the stage, or the first after a crossing's use.
    parts: list[tuple[Stage | Crossing, int, GradientEdge | None]] = [
        (stages[i], i + 1, edges[i]) for i in indices
    ]
    for crossing, tap in zip(trajectory.crossings, taps, strict=True):
        if not crossing.apart:
            parts.append((crossing, sum(s.time <= crossing.used for s in stages), tap))
    start, conclusive = 0, True
    mixed: list[tuple[Stage | Crossing, int, GradientEdge | None]] = []
    for part, layouts in zip(
        parts, _seen(trajectory, edges[-1], [edge for _, _, edge in parts], turn), strict=True
    ):
        if layouts is None:
            conclusive = False
            continue
        allowed = _allowed(part[0], layouts, graphs)
        if allowed:
            part[0].layouts = allowed
            part[0].lay(allowed[0], samples)
        else:
            mixed.append(part)
    for one, behind, edge in mixed:
        if graphs and _comes_first(one, trajectory, ledger, edge):
            one.lay(SHARED, samples)
        else:
            start = max(start, behind)
    return start, conclusive


def _seen(
    trajectory: Trajectory, output: GradientEdge, targets: Sequence[Any], turn: int | None
) -> list[tuple[str, ...] | None]:
    """The layouts that fit what each target shows; None where it shows nothing."""
    samples = trajectory.samples
    if turn is not None:
        chosen = (samples // 2, 0, samples - 1)[turn] if turn < 3 else turn * 7919 % samples
        found = probe(output, targets, _one_sample(trajectory, chosen))
        return [layouts_of(g, samples, chosen) if _tells(g) else None for g in found]
    seed, weights = _weighted(trajectory)
    rows = weights.repeat_interleave(len(seed) // samples).reshape(-1, *(1,) * (seed.dim() - 1))
    once, weighted = responses(output, targets, (seed, seed * rows))
    return [
        layouts_in_step(a, b, weights) if _tells(a) and _tells(b) else None
        for a, b in zip(once, weighted, strict=True)
    ]


def _tells(gradient: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there is one, of numbers that are not all zero."""
    return gradient is not None and bool(gradient.any()) and bool(gradient.isfinite().all())


def _weighted(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """A gradient at the output, and a weight for each sample."""
    z = trajectory.z
    assert z is not None
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(z.shape, generator=generator).to(z)
    powers = 6 * torch.rand(trajectory.samples, generator=generator)  # no two of them alike
    return seed, (0.5**powers).to(z)


def _allowed(part: Stage | Crossing, layouts: Sequence[str], graphs: bool) -> tuple[str, ...]:
    """Of the layouts that this probe has left those that earlier ones have left, too."""
    left = [one for one in layouts if part.layouts is None or one in part.layouts]
    return tuple(one for one in left if one == ROWS or (graphs and part.may_lie(one)))


def _one_sample(trajectory: Trajectory, chosen: int) -> Tensor:
    """A gradient at the output that is zero but for one sample."""
    z = trajectory.z
    assert z is not None
    rows = z.shape[0] // trajectory.samples
    seed = torch.zeros_like(z)
    generator = torch.Generator().manual_seed(0)
    part = slice(chosen * rows, (chosen + 1) * rows)
    seed[part] = torch.randn(seed[part].shape, generator=generator).to(seed)
    return seed


def _comes_first(
    one: Stage | Crossing, trajectory: Trajectory, ledger: Ledger, edge: GradientEdge | None
) -> bool:
    """Whether no layer in feedback lies in front of it, and it has no rows for samples.

    A table that is looked up once for all samples has one dimension of indices, of any length; a
    layer that is given the samples has as many rows as there are.
    """
    if isinstance(one, Stage):
        first = ledger.states[trajectory.stages.index(one)] is None
        if not first or one.x.dim() != 1:
            return False
        consecutive = bool((one.x.diff() == 1).all())  # the positions themselves
        return consecutive or one.rows != trajectory.samples
    return edge is not None and not ledger.depends(trajectory, edge)
