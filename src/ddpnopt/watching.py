# SPDX-License-Identifier: MIT
"""Whether a recorder's passes have to be watched: known by what earlier ones were."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import nn

from ddpnopt.accounts import Sources
from ddpnopt.arrivals import Arrivals, gradient_at_crossing
from ddpnopt.compiled import AS_WRITTEN, as_written, compiled
from ddpnopt.crossing import Crossing, branches
from ddpnopt.cuts import in_order
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.functional import Layers
from ddpnopt.ledger import Ledger
from ddpnopt.stages import Head, Stage, Trajectory
from ddpnopt.structure import Anatomy
from ddpnopt.typing import Tensor
from ddpnopt.watch import Watch

#: So many passes of one structure have to be chains before they are no longer watched; of several
#: structures, each so many times their number.
SURE = 8
#: With more structures than these, each pass is watched.
MOST = 16


class Watching:
    """The watch of the pass that runs, if it has one.

    Args:
        closed_loop: What crosses the cuts has to be known.
        graphs: The value function allows branches and layers that are used more than once.

    Attributes:
        watch: Sees the calls of the pass that runs.
        branching: Whether the cuts have to be watched; None while that is unknown.
        traced: Passes come from within what torch.compile runs.
    """

    def __init__(self, closed_loop: bool, graphs: bool) -> None:
        self.closed_loop, self.graphs = closed_loop, graphs
        self.watch: Watch | None = None
        self._written, self._told = ExitStack(), False
        self.traced = False
        self.forget()

    def forget(self) -> None:
        """The model has other layers than before."""
        self.branching: bool | None = None if self.graphs else False
        self._chains: dict[tuple[str, ...], int] = {}
        #: Some pass has asked for what only a watch can answer when it is run again.
        self._asked = False

    def begin(
        self, trajectory: Trajectory, arrivals: Arrivals, layers: Layers, anatomy: Anatomy
    ) -> None:
        """A pass begins: see its calls, where branches or layers that run as functions may be."""
        if self.traced or compiled(anatomy.modules):
            self._written.close()
            self._written.enter_context(as_written(self.traced))
            if not self._told:
                self._told = True
                warnings.warn(AS_WRITTEN, DDPNOptWarning, stacklevel=2)
        functions = anatomy.functions if self.graphs else {}
        if self.branching is False and not functions:
            return
        hook = partial(
            _await_crossing, weakref.ref(arrivals), weakref.ref(trajectory), trajectory.to_verify
        )
        self.watch = Watch(hook, tapping=self.closed_loop)
        self.watch.layers = weakref.proxy(layers)
        if self.graphs:
            self.watch.functional, self.watch.head_of = anatomy.functional, anatomy.head_of
        self.watch.begin()

    def call_ends(self) -> None:
        """The call that can be run again is over; the pass may go on, to a loss."""
        if self.watch is not None:
            self.watch.path.end = len(self.watch.path.steps)

    def stop(self) -> Watch | None:
        """The pass is over: its calls are seen no more."""
        watch = self.watch
        if watch is not None:
            watch.end()
        self.watch = None  # not before: what is interrupted here is ended by the next pass
        return watch

    def end(self) -> None:
        """All has been done about the pass, or it was broken off."""
        self.stop()
        self._written.close()

    def look(
        self,
        trajectory: Trajectory,
        watch: Watch | None,
        ledger: Ledger,
        model: nn.Module,
        anatomy: Anatomy,
    ) -> None:
        """Take what has crossed the cuts, if more than the layers' own states has."""
        names = tuple(s.name for s in trajectory.stages)
        found = len(set(names)) < len(names) or ledger.branched or bool(anatomy.shared)
        if self.graphs:
            trajectory.heads = _heads(trajectory, watch, ledger)
        found = found or bool(trajectory.heads)
        if watch is not None:
            times = [stage.time for stage in trajectory.stages]
            found = found or branches(watch.crossings, times) or bool(anatomy.functions)
            asks, trajectory.refusal = self.closed_loop and watch.path.asks, watch.refusal
            self._asked = self._asked or asks
            if (found or asks or self.branching) and (self.closed_loop or anatomy.functions):
                trajectory.crossings, trajectory.blind = watch.crossings, watch.blind
                trajectory.path = watch.path
                trajectory.accounted = trajectory.to_verify and self.closed_loop
        if self.graphs:
            trajectory.to_verify = trajectory.to_verify and self.closed_loop and not found
            found = found if self.closed_loop else bool(anatomy.functions)
            self._settle(found, names, partial(in_order, model, anatomy.hooked.values()))

    def _settle(self, found: bool, names: tuple[str, ...], ordered: Callable[[], bool]) -> None:
        """Watch the next pass, too?

        Where each of several structures has been a chain often enough, a pass of yet another one
        is seen to be no chain by its graph alone; what crosses is watched from the next pass on.

        Args:
            found: This pass was no chain.
            names: Its structure.
            ordered: Whether the model runs its layers one after another, whatever it is given.
        """
        chains = self._chains
        if names in chains or len(chains) <= MOST:
            chains[names] = chains.get(names, 0) + (not found)
        many = len(chains) > MOST
        sure = all(passes >= SURE * len(chains) for passes in chains.values())
        sure = sure or (len(chains) == 1 and ordered())
        if many:
            sure = not self.closed_loop  # where all that is looked for is a layer run as a function
        self.branching = found or self.branching or (False if sure and not self._asked else None)


def _heads(trajectory: Trajectory, watch: Watch | None, ledger: Ledger) -> dict[Stage, Head]:
    """The outputs beside the last. Whatever is made of one on its way to the loss is that one."""
    found, ends = {}, ledger.heads()
    if watch is not None and ends:
        pairs = list(zip(watch.crossings, watch.edges, strict=True))
        made = [(pair, ledger.behind(pair[1])) for pair in pairs]
        pairs = [pair for pair, sources in made if not sources or sources - set(ends)]
        watch.crossings, watch.edges = [one for one, _ in pairs], [tap for _, tap in pairs]
    for index, z in ends.items():
        stage, edge = trajectory.stages[index], ledger.edges[index]
        assert edge is not None
        crossing = watch.head(edge, stage.time, z) if watch is not None else None
        found[stage] = Head(z, crossing)
    return found


def _await_crossing(
    ref: weakref.ref[Arrivals],
    trajectory: weakref.ref[Trajectory],
    accounted: bool,
    one: Crossing,
    tap: Tensor,
    sources: Sources,
) -> None:
    """Ask for the gradient of one use of a tensor."""
    # Edges of what is older than the tap: no cycle.
    hook = partial(gradient_at_crossing, ref, trajectory, one, sources if accounted else None)
    tap.register_hook(hook)  # type: ignore[no-untyped-call]
