# SPDX-License-Identifier: MIT
"""Where samples are mixed, and how they lie: found by perturbing one of them at the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.crossing import Crossing
from ddpnopt.inert import probe
from ddpnopt.layout import ROWS, layout_of
from ddpnopt.stages import Stage, Trajectory

#: A stage's index and a dimension: 0 for its rows, 1 for the second of its state.
Place = tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """What probes of a structure's passes have shown.

    Attributes:
        start: The first stage from which on no layer mixes samples.
        count: How many probes.
        place: The stage and dimension that tell B, where it is not what `Ledger.front` finds.
        layouts: How the samples lie in each stage and crossing.
    """

    start: int = 0
    count: int = 0
    place: Place | None = None
    layouts: tuple[str, ...] = ()

    def samples(self, trajectory: Trajectory) -> int:
        """B of a pass; 0 where `Ledger.front` finds it."""
        if self.place is None:
            return 0
        stage = trajectory.stages[self.place[0]]
        return stage.x.shape[1] if self.place[1] else stage.rows


def probed(
    trajectory: Trajectory,
    edges: list[GradientEdge | None],
    taps: Sequence[GradientEdge],
    turn: int,
    layouts: bool,
) -> tuple[int, bool]:
    """The first stage from which on no layer mixes samples on the way to the output.

    One sample is perturbed at the output, in the adjoint direction: one backward pass with a
    seed on its rows alone shows at every stage whether the gradient stays in that sample's part,
    and which part that is. Both mixing (BatchNorm) and another ownership of rows show up.

    Args:
        trajectory: The pass; its stages and crossings are told how their samples lie.
        edges: Gradient edges of its stages' outputs.
        taps: Those of its crossings.
        turn: Which sample to perturb: the middle one, the first, the last, ...
        layouts: Samples may lie otherwise than in rows.

    Returns:
        The index of the first unmixed stage, and whether the finding is conclusive (a zero
        gradient, as behind a layer that starts at zero, shows nothing).
    """
    samples, z, stages = trajectory.samples, trajectory.z, trajectory.stages
    assert z is not None and edges[-1] is not None
    indices = [i for i, s in enumerate(stages) if not s.plain and edges[i] is not None]
    if samples <= 1 or not indices:
        return 0, False
    # Behind what is mixed a layer is kept apart: the stage, or the first after a crossing's use.
    parts: list[tuple[Stage | Crossing, int, GradientEdge | None]] = [
        (stages[i], i + 1, edges[i]) for i in indices
    ]
    for crossing, tap in zip(trajectory.crossings, taps, strict=True):
        if not crossing.apart:
            parts.append((crossing, sum(s.time <= crossing.used for s in stages), tap))
    chosen = (samples // 2, 0, samples - 1)[turn] if turn < 3 else turn * 7919 % samples
    rows = z.shape[0] // samples
    seed = torch.zeros_like(z)
    generator = torch.Generator().manual_seed(0)
    part = slice(chosen * rows, (chosen + 1) * rows)
    seed[part] = torch.randn(seed[part].shape, generator=generator).to(seed)
    start, conclusive = 0, True
    found = probe(edges[-1], [edge for _, _, edge in parts], seed)
    for (one, behind, _), gradient in zip(parts, found, strict=True):
        if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
            conclusive = False
            continue
        layout = layout_of(gradient, samples, chosen)
        if layout == "" or (layout != ROWS and not (layouts and one.may_lie(layout))):
            start = max(start, behind)
        else:
            one.lay(layout, samples)
    return start, conclusive
