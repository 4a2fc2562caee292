# SPDX-License-Identifier: MIT
"""A program cut where control goes back to the user: forward pass, backward pass, step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ddpnopt.captured.compiling import Compiled
from ddpnopt.captured.program import Call, Program, Value, drawn, graph_of
from ddpnopt.typing import Tensor

FORWARD, BACKWARD, STEP = range(3)
#: Tensors by what stands for them: what has been computed so far.
Found = dict[Value, Tensor]


@dataclass(eq=False)
class Phase:
    """One of the three, as a function.

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
        self._run = Compiled(graph, len(self.given)) if compiled else graph.forward

    def __call__(self, found: Found) -> None:
        """Run it on what has been found, and add what it makes."""
        assert self._run is not None
        results = self._run(*[found[v] for v in self.given], *self.fixed.values())
        found.update(zip(self.made, results, strict=True))


class Phases:
    """The three phases of a program; called, they run one after another.

    Args:
        program: The program.
        fixed: Its externals, as they are used.
        recorded: All operators of the recording, in order.
        ends: How many of them had run when the forward pass had ended, and the backward pass.
        found_at: Arguments of the step that are what backward has returned, by that.
        grads: What backward returns: nothing later needs it.
        random: Numbers are drawn. What the forward pass has drawn the step draws again.
        compiled: Compile the functions.

    Attributes:
        refusal: Why the program can't be cut; or ''.
    """

    def __init__(
        self,
        program: Program,
        fixed: Mapping[Value, Tensor],
        recorded: Sequence[Call],
        ends: Sequence[int],
        found_at: Mapping[Value, Value],
        grads: Iterable[Value],
        random: bool,
        compiled: bool,
    ) -> None:
        at = {call: bisect_right(ends, place) for place, call in enumerate(recorded)}
        self._program, self._fixed, self._random = program, fixed, random
        outside = {*program.arguments, *program.externals}
        made = [(v, call) for call in program.calls[::-1] for v in call.outputs if v not in outside]
        #: By whom, and in which phase, a tensor was made that is not given.
        self._maker = dict(made)
        self._at = {v: at[call] for v, call in made}
        self._grads, self._found_at = set(grads), found_at
        self.refusal = ""
        self.phases = [Phase(), Phase(), Phase()]
        for call in program.calls:
            self.phases[at[call]].calls.append(call)
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
        return [found[v] for v in program.results]

    def kept(self, after: int) -> list[Value]:
        """What phases up to this one have made that is needed behind it."""
        wanted = {v for phase in self.phases[after + 1 :] for v in phase.given}
        wanted |= set(self._program.results) - self._grads
        return [v for phase in self.phases[: after + 1] for v in phase.made if v in wanted]

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
        later = {v for phase in self.phases for v in phase.given}
        for v in dict.fromkeys((*later, *self._program.results)):
            if v in self._at:
                self.phases[self._at[v]].made.append(v)


def _is_view(call: Call) -> bool:
    """Whether an operator only looks at memory in another way."""
    memory = {v.storage for v in call.inputs}
    alike = memory.issuperset(v.storage for v in call.outputs)
    return alike and not call.written and not drawn(call.func)
