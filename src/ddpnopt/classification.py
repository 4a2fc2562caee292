# SPDX-License-Identifier: MIT
"""Which stages of a pass take part in feedback, and where samples are weighted once instead.

Runs when the forward pass has ended and its graph is whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch.autograd.graph import GradientEdge

from ddpnopt.arrivals import Arrivals, gradient_at_boundary
from ddpnopt.certify import doubt
from ddpnopt.crossing import Crossing, Span
from ddpnopt.decisions import UNSETTLED, postpone, traced
from ddpnopt.inert import Probing
from ddpnopt.layers import FALLBACK
from ddpnopt.ledger import FROZEN, Ledger, boundary, mixes
from ddpnopt.mixing import Probe, probed
from ddpnopt.routing import fingerprint
from ddpnopt.sharing import repeated
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.structure import Anatomy
from ddpnopt.typing import Tensor
from ddpnopt.watch import Watch

#: The first passes of each structure are probed for mixing, each at another sample, and then
#: one in so many.
PROBES, PROBE_EVERY = 3, 64
#: Structures that are remembered.
MOST = 512


class Classifier:
    """Remembers what earlier passes of the same structure have shown.

    Args:
        arrivals: Where gradients go.
        trainable: Tells whether a parameter belongs to the optimizer.
        graphs: The value function allows branches and layers that are used more than once.
        closed_loop: What crosses the cuts has to be known.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        trainable: Callable[[Tensor], bool],
        graphs: bool,
        closed_loop: bool,
    ) -> None:
        self.arrivals, self.trainable = arrivals, trainable
        self.graphs, self.closed_loop = graphs, closed_loop
        self.passes = 0
        self._doubts: dict[tuple[Any, ...], str] = {}
        self._mixing: dict[tuple[Any, ...], Probe] = {}
        #: By structure, the indices that rows have been picked by in passes that were probed.
        self._routes: dict[tuple[Any, ...], set[int]] = {}

    def due(self) -> bool:
        """Whether the next pass is to be verified: the first with a backward pass, and others."""
        return not self.arrivals.reached or self._periodic

    @property
    def _periodic(self) -> bool:
        """What is known is looked at again now and then."""
        return self.passes % PROBE_EVERY == 0 and not traced()

    def classify(
        self,
        trajectory: Trajectory,
        z: Tensor,
        ledger: Ledger,
        anatomy: Anatomy,
        watch: Watch | None,
    ) -> None:
        """Mark the stages that take the plain step: mixing of samples, shared use, no rule.

        Args:
            trajectory: The pass.
            z: Output of its last stage.
            ledger: Its nodes and edges.
            anatomy: The model's.
            watch: What has crossed its cuts, where that was watched.
        """
        trajectory.z = z[None] if trajectory.stages[-1].unbatched else z
        trajectory.refusal = trajectory.refusal or ledger.hidden(trajectory)
        if trajectory.refusal:
            trajectory.accounted = False  # there is nothing to rely on
            return
        graphs = self.graphs and (trajectory.path is not None or not self.closed_loop)
        ledger.mark(trajectory, anatomy.shared, self.trainable, graphs)
        trajectory.key = (
            tuple(s.name for s in trajectory.stages),
            tuple([m.training for m in anatomy.modules]),
            tuple([(one.born, one.used) for one in trajectory.crossings]),
        )
        taps = watch.edges if watch is not None and trajectory.crossings else []
        self._find_mixing(trajectory, ledger, taps)
        for stage in trajectory.stages:
            stage.arrange()
        self._certify(trajectory, ledger)
        trajectory.refusal = ledger.refusal(trajectory)
        if not trajectory.refusal:
            self._set_boundary(trajectory, ledger, watch, graphs)
            repeated(trajectory)

    def _set_boundary(
        self, trajectory: Trajectory, ledger: Ledger, watch: Watch | None, graphs: bool
    ) -> None:
        """Weight the samples once for everything in front of a mixing, or of what can't be cut."""
        start = max((i + 1 for i, s in enumerate(trajectory.stages) if mixes(s)), default=0)
        if not graphs:
            start = ledger.rejoined(trajectory, start)
        at = trajectory.boundary = boundary(trajectory, start, ledger.states, ledger.narrow)
        edge = [*ledger.states, ledger.edges[-1]][at] if at else None
        if edge is not None:
            ref = weakref.ref(self.arrivals)
            hook = partial(gradient_at_boundary, ref, trajectory, edge.output_nr)
            edge.node.register_prehook(hook)
        if watch is not None and trajectory.path is not None:
            for one, edge in zip(trajectory.crossings, watch.edges, strict=True):
                if one.apart and ledger.depends(trajectory, edge):
                    trajectory.blind.append(Span(one.born, one.used))
        times = [stage.time for stage in trajectory.stages if not stage.plain]
        for one in trajectory.crossings:
            one.wanted = not one.apart and any(map(one.at, times))
        trajectory.crossings = [one for one in trajectory.crossings if one.wanted]

    def _certify(self, trajectory: Trajectory, ledger: Ledger) -> None:
        """Take the general rule from stages that it does not describe.

        Stages outside the feedback are looked at, too: a curvature may be fed by the rule.
        """
        for index, stage in enumerate(trajectory.stages):
            if stage.rule is not FALLBACK or stage.plain == FROZEN:
                continue
            case = (trajectory.key, stage.name)
            if case not in self._doubts or trajectory.to_verify:
                h, x = ledger.edges[index], ledger.states[index]
                whole = trajectory.samples and stage.rows % trajectory.samples == 0
                samples = trajectory.samples if whole else stage.rows
                if len(self._doubts) > MOST:
                    self._doubts.clear()
                self._doubts[case] = doubt(stage, h, x, samples)
            if self._doubts[case]:
                stage.rule = None
                stage.plain = stage.plain or self._doubts[case]

    def _find_mixing(
        self, trajectory: Trajectory, ledger: Ledger, taps: Sequence[GradientEdge]
    ) -> None:
        """Mark the stages in front of a layer that mixes samples; they don't tell B either."""
        known = self._mixing.get(trajectory.key, Probe())
        marks = [stage.plain for stage in trajectory.stages]
        ledger.front(trajectory, known.start, known.samples(trajectory))
        for one in trajectory.crossings:
            one.part(trajectory.samples)
        indices = fingerprint(ledger.routes, known.start, trajectory.samples)
        routed = indices is not None and indices not in self._routes.get(trajectory.key, ())
        settled = known.count >= PROBES and not self._periodic
        if settled and not routed:
            known.lay(trajectory, again=False)
            return
        postpone(UNSETTLED)
        known.lay(trajectory, again=True)
        first = trajectory.samples
        turns = _turns(known, settled, routed)
        found, conclusive = self._probe(trajectory, ledger, taps, known, turns)
        if found.start and not known.count:
            # Something else may be the number of samples, where positions come first.
            for samples, place in ledger.candidates(trajectory).items():
                if samples == first:
                    continue
                self._again(trajectory, ledger, marks, Probe(place=place))
                other = self._probe(trajectory, ledger, taps, Probe(place=place), turns)
                if other[0].start < found.start:
                    found, conclusive = other
            self._again(trajectory, ledger, marks, found)
            self._probe(trajectory, ledger, taps, found, turns)
        if conclusive or found.start:
            if len(self._mixing) > MOST:
                self._mixing.clear()
            self._mixing[trajectory.key] = replace(found, count=known.count + 1)
            if indices is not None:
                self._remember(trajectory.key, indices)

    def _remember(self, key: tuple[Any, ...], indices: int) -> None:
        """These indices have been looked at."""
        if len(self._routes) > MOST or len(self._routes.get(key, ())) > MOST:
            self._routes.clear()
        self._routes.setdefault(key, set()).add(indices)

    def _again(
        self,
        trajectory: Trajectory,
        ledger: Ledger,
        marks: Sequence[str],
        probe: Probe,
    ) -> None:
        """Begin anew with another number of samples."""
        for stage, mark in zip(trajectory.stages, marks, strict=True):
            stage.plain = mark
        ledger.front(trajectory, probe.start, probe.samples(trajectory))
        for one in trajectory.crossings:
            one.part(trajectory.samples)
        everything: list[Stage | Crossing] = [*trajectory.stages, *trajectory.crossings]
        for part in everything:
            part.layouts = None

    def _probe(
        self,
        trajectory: Trajectory,
        ledger: Ledger,
        taps: Sequence[GradientEdge],
        known: Probe,
        turns: Sequence[int | None],
    ) -> tuple[Probe, bool]:
        """The first unmixed stage, B and the layouts, and whether that is conclusive."""
        start, conclusive = known.start, True
        everything: list[Stage | Crossing] = [*trajectory.stages, *trajectory.crossings]
        clear = False
        for turn in turns:
            if clear and turn is not None:
                continue  # another sample would tell nothing new
            while True:
                with Probing():
                    found, told = probed(trajectory, ledger, taps, turn, self.graphs)
                if found <= start:
                    break
                start = found
                # B may have come from what is mixed
                ledger.front(trajectory, start, known.samples(trajectory))
            conclusive = conclusive and told
            clear = all(part.layouts is None or len(part.layouts) == 1 for part in everything)
        layouts = tuple(() if part.shared else part.layouts for part in everything)
        return Probe(start, known.count, known.place, layouts), conclusive


def _turns(known: Probe, settled: bool, routed: bool) -> list[int | None]:
    """Which samples to perturb, one after another until all is clear; None for all at once.

    Args:
        known: By earlier passes.
        settled: They have shown enough.
        routed: But rows are picked by other indices than theirs.
    """
    own = range(known.count, known.count if settled else known.count + PROBES)
    return [*own, None] if routed else [*own]
