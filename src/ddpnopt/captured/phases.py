# SPDX-License-Identifier: MIT
"""A program cut where control goes back to the user: forward pass, backward pass, step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ddpnopt.captured.compiling import Compiled
from ddpnopt.captured.early import beside, sampling
from ddpnopt.captured.program import Call, Program, Value, drawn, graph_of
from ddpnopt.typing import Tensor

FORWARD, BACKWARD, STEP = range(3)
#: Tensors by what stands for them: what has been computed so far.
Found = dict[Value, Tensor]


@dataclass(eq=False)
class Phase:
    """One of them, as a function.

    Attributes:
        calls: Its operators. Views of what earlier phases have made are taken anew: a view handed
            over would no longer share its memory.
        given: What it needs that differs from run to run, or that earlier phases have made.
        fixed: Other tensors that it needs.
        made: What is asked for afterwards.
    """

    calls: list[Call] = field(default_factory=list)
    given: list[Value] = field(default_factory=list)
    fixed: dict[Value, Tensor] = field(default_factory=dict)
    made: list[Value] = field(default_factory=list)
    _run: Callable[..., Sequence[Tensor]] | None = None

    def build(self, compiled: bool) -> None:
        """Make the function; compiled from its first run on."""
        graph = graph_of([*self.given, *self.fixed], self.calls, self.made, native=not compiled)
        given, made = len(self.given), len(self.made)
        self._run = Compiled(graph, given, made) if compiled else graph.forward

    def __call__(self, found: Found) -> None:
        """Run it on what has been found, and add what it makes."""
        assert self._run is not None
        results = self._run(*[found[v] for v in self.given], *self.fixed.values())
        found.update(zip(self.made, results, strict=True))


class Phases:
    """The three phases of a program; called, they run one after another.

    Backward pass and step can be one phase, which changes nothing: what the step makes of the
    weights is written to the room beside them, and known before it is asked for.

    Args:
        program: The program.
        fixed: Its externals, as they are used.
        room: Of those that it changes: as much memory.
        recorded: All operators of the recording, in order.
        ends: How many of them had run when the forward pass had ended, and the backward pass.
        found_at: Arguments of the step that are what backward has returned, by that.
        grads: What backward returns: nothing later needs it.
        state: The optimizer's state.
        sizes: Of both: tensors of that shape.
        random: Numbers are drawn. What the forward pass has drawn the step draws again.
        join: Backward pass and step are to be one phase, if they can.
        compiled: Compile the functions.

    Attributes:
        phases: Forward pass, backward pass, and the step if it is not one with that.
        joined: It is.
        moved: Then what it changes, and what it writes to instead.
        results: What stands for the program's results.
        sample: If joined: of the gradients, of what the step changes, and of the state.
        refusal: Why the program can't be cut; or ''.
    """

    def __init__(
        self,
        program: Program,
        fixed: Mapping[Value, Tensor],
        room: Mapping[Value, Tensor],
        recorded: Sequence[Call],
        ends: Sequence[int],
        found_at: Mapping[Value, Value],
        grads: Sequence[Value],
        state: Sequence[Value],
        sizes: Mapping[Value, Tensor],
        random: bool,
        join: bool,
        compiled: bool,
    ) -> None:
        at = {call: bisect_right(ends, place) for place, call in enumerate(recorded)}
        self._program, self._fixed, self._random = program, dict(fixed), random
        outside = {*program.arguments, *program.externals}
        #: By whom a tensor was made that is not given.
        self._maker = {
            v: call for call in program.calls[::-1] for v in call.outputs if v not in outside
        }
        self._grads, self._found_at = grads, found_at
        self.refusal, self.results = "", program.results
        self.phases = [Phase(), Phase(), Phase()]
        for call in program.calls:
            self.phases[at[call]].calls.append(call)
        self.moved: dict[Value, Tensor] = {}
        self.joined = join and not random and self._join(room)
        self.sample: Value | None = None
        if self.joined:
            values = [*grads, *self.moved, *state]
            alike = [self._fixed[v] if v in self._fixed else sizes[v] for v in values]
            calls, self.sample = sampling(values, alike)
            self.phases[BACKWARD].calls += calls
        #: The phase in which it was made.
        self._at = {v: at[call] for v, call in self._maker.items()}
        if self.joined:
            own = {v for call in self.phases[BACKWARD].calls for v in call.outputs}
            self._at = dict.fromkeys(own, BACKWARD) | {v: i for v, i in self._at.items() if not i}
        for phase in self.phases:
            self._complete(phase)
        self._hand_over()
        for phase in self.phases:
            phase.build(compiled)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """As the program does, but that the step goes on with what backward has returned."""
        program = self._program
        found = dict(zip((*program.arguments, *program.externals), tensors, strict=True))
        state = torch.get_rng_state() if self._random else None
        for place, phase in enumerate(self.phases):
            if place == STEP:
                found.update({at: found[v] for v, at in self._found_at.items()})
                if state is not None:
                    torch.set_rng_state(state)
            phase(found)
        return self.outcome(found)

    def outcome(self, found: Found) -> list[Tensor]:
        """The results, when all phases have run."""
        return [found[v] if v in found else self._fixed[v] for v in self.results]

    def kept(self, after: int) -> list[Value]:
        """What phases up to this one have made that is needed behind it."""
        wanted = {v for phase in self.phases[after + 1 :] for v in phase.given}
        wanted |= set(self.results) - set(self._grads)
        return [v for phase in self.phases[: after + 1] for v in phase.made if v in wanted]

    def _join(self, room: Mapping[Value, Tensor]) -> bool:
        """Make one phase of backward pass and step, if what they change can be beside itself."""
        before, backward, step = self.phases
        calls = [*backward.calls, *step.calls]
        written = _written(calls)
        changed = [v for v in room if v.storage in written]
        shared = len({v.storage for v in changed}) < len(changed)
        taken = {room[v].data_ptr() for v in room}
        read = any(self._fixed[v].data_ptr() in taken for v in room)  # memory of another's room
        if shared or read or written & _written(before.calls):
            return False
        number = 1 + max((v.index for v in (*self._maker, *self._fixed)), default=0)
        rooms = {v: Value(number + i, -1 - i, v.dim) for i, v in enumerate(changed)}
        self.moved = {v: room[v] for v in changed}
        self._fixed |= {rooms[v]: room[v] for v in changed}
        known = {at: v for v, at in self._found_at.items()}
        calls, self.results = beside(calls, self._program.results, rooms, known, self._maker)
        self.phases = [before, Phase(calls)]
        return True

    def _complete(self, phase: Phase) -> None:
        """Find what a phase needs from outside."""
        own: set[Value] = set()
        views: list[Call] = []

        def need(v: Value) -> None:
            if v in own or v in phase.fixed or v in phase.given:
                return
            maker = self._maker.get(v)
            if v in self._fixed:
                phase.fixed[v] = self._fixed[v]
            elif maker is not None and _is_view(maker):
                for source in maker.inputs:
                    need(source)
                views.append(maker)
                own.update(maker.outputs)
            else:
                phase.given.append(v)

        for call in phase.calls:
            for v in call.inputs:
                need(v)
            own.update(call.outputs)
        phase.calls = [*views, *phase.calls]
        handed = {v.storage for v in phase.given}
        if any(v.storage in handed for call in phase.calls for v in call.written):
            self.refusal = "what one of its passes has computed is changed in place by the next"

    def _hand_over(self) -> None:
        """What each phase makes for later ones, or for whoever asks."""
        later = [v for phase in self.phases for v in phase.given]
        asked = self.results if self.sample is None else [*self.results, self.sample]
        for v in dict.fromkeys((*later, *asked)):
            if v in self._at and v not in self._fixed:
                self.phases[self._at[v]].made.append(v)


def _written(calls: Sequence[Call]) -> set[int]:
    """The storages that operators write to."""
    return {v.storage for call in calls for v in call.written}


def _is_view(call: Call) -> bool:
    """Whether an operator only looks at memory in another way."""
    memory = {v.storage for v in call.inputs}
    alike = memory.issuperset(v.storage for v in call.outputs)
    return alike and not call.written and not drawn(call.func)
