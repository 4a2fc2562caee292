# SPDX-License-Identifier: MIT
"""A recorded iteration that is run in two or three parts, between which the loop has its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ddpnopt.captured.early import Early, noted
from ddpnopt.captured.phases import BACKWARD, FORWARD, STEP, Found, Phases
from ddpnopt.captured.plan import Plan, without_autocast
from ddpnopt.captured.program import Value
from ddpnopt.captured.recording import At, Outcome, Recording
from ddpnopt.keeping import buffers_of
from ddpnopt.typing import Tensor


class PhasedPlan(Plan):
    """Made of a recording whose inputs are the arguments, the outputs' gradients and p.grad.

    Args:
        recording: It.
        compiled: Compile the program by torch's compiler.
        join: Run the step with the backward pass, if that can be.
        parameters: Those whose p.grad are the last inputs, in order.

    It has made "outputs" and "grads", and "sound": whether all was decided in the passes as before.

    Attributes:
        phases: The program in two parts or three.
        receiving: Parameters that its backward pass gives gradients to.
        buffers: Those of the model that its forward pass writes to.
        differentiable: Of the tensors that the model returns, those with a gradient.
        there: Of the inputs, those that there were in the recording.
    """

    phases: Phases

    def __init__(
        self, recording: Recording, compiled: bool, join: bool, parameters: Sequence[Tensor]
    ) -> None:
        self._join, self._parameters = join, parameters
        super().__init__(recording, compiled)

    def _built(self, recording: Recording | None = None) -> Callable[..., list[Tensor]]:
        if recording is not None:
            self._note(recording)
        program = self.program
        phases = Phases(
            program,
            self._outside,
            dict(zip(program.changed, self._room, strict=True)),
            self._recorded,
            self._ends,
            self._found_at,
            self._grads,
            self._state,
            self._sizes,
            self.random,
            self._join,
            self.compiled,
        )
        self.phases = phases
        changed = zip(program.changed, self.changed, self._room, strict=True)
        exposed = [(t, room) for v, t, room in changed if v not in phases.moved]
        self._exposed = [t for t, _ in exposed], [room for _, room in exposed]
        self._moved = [self._outside[v] for v in phases.moved], list(phases.moved.values())
        self._after = [phases.kept(FORWARD), phases.kept(BACKWARD)]
        leaves = tree_leaves(self._made["outputs"])
        self._outputs = [program.results[at.place] for at in leaves if isinstance(at, At)]
        alive = {v.storage for v in (*self._after[0], *program.arguments, *program.externals)}
        #: The user may write to what the model returns.
        self._copied = [v.storage in alive for v in self._outputs]
        written = {v.storage for call in phases.phases[FORWARD].calls for v in call.written}
        self.buffers = [b for v, b in self._owned.items() if v.storage in written]
        return phases

    def _note(self, recording: Recording) -> None:
        """What of a recording the parts are made of."""
        program = self.program
        tracer, grads = recording.tracer, recording.made["grads"]
        self._recorded, self._ends = tracer.calls, tracer.ends
        self.receiving = list(grads)
        self._grads = [tracer.value(g) for g in grads.values()]
        after = len(self._used) + len(recording.rates)
        state = program.arguments[after:] + [tracer.value(t) for _, t in self._fixed]
        there = self.state.found + [t for _, t in self._fixed]
        #: Counters, which have no dimensions, are known by version alone.
        self._looked_at = [place for place, t in enumerate(there) if t.dim() > 0]
        self._state = [state[place] for place in self._looked_at]
        known = [*zip(self._grads, grads.values(), strict=True), *zip(state, there, strict=True)]
        self._sizes = {v: torch.empty_like(t, device="meta") for v, t in known}
        self._sound = tracer.value(recording.made["sound"])
        self._outside = {v: t.detach() for v, t in program.externals.items()}
        self._inputs = dict(zip(self._used, program.arguments, strict=False))
        self.there = [t is not None for t in recording.inputs]
        tensors = [t for t in tree_leaves(recording.made["outputs"]) if isinstance(t, Tensor)]
        self.differentiable = [t.requires_grad for t in tensors]
        first = len(recording.inputs) - len(self._parameters)
        places = {p: first + i for i, p in enumerate(self._parameters)}
        pairs = zip(self.receiving, self._grads, strict=True)
        #: Where the step finds p.grad, by what the backward pass has made.
        self._found_at = {
            v: at
            for p, v in pairs
            if p in places and (at := self._inputs.get(places[p])) is not None
        }
        owned = {id(b): b for _, _, b in buffers_of(recording.modules)}
        self._owned = {v: owned[id(t)] for v, t in program.externals.items() if id(t) in owned}

    @property
    def refusal(self) -> str:
        """Why it can't be run; or ''."""
        return super().refusal or self.phases.refusal

    def given(self, first: int, tensors: Sequence[Tensor | None]) -> Found:
        """Inputs from a place on, as far as they are used."""
        known = self._inputs
        pairs = ((known.get(first + i), t) for i, t in enumerate(tensors))
        return {v: t for v, t in pairs if v is not None and t is not None}

    def forward(self, found: Found, rates: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the forward pass on the model's arguments.

        Returns:
            The tensors that the model returns, and those that are needed later.
        """
        self._run_phase(FORWARD, found, rates)
        pairs = zip(self._outputs, self._copied, strict=True)
        outputs = [found[v].clone() if copied else found[v] for v, copied in pairs]
        return outputs, [found[v] for v in self._after[0]]

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """What the model returns, with these tensors in it."""
        if isinstance(self._made["outputs"], At):
            return tensors[0]
        rest = iter(tensors)
        return tree_map(
            lambda leaf: next(rest) if isinstance(leaf, At) else leaf, self._made["outputs"]
        )

    def backward(
        self, saved: Sequence[Tensor], found: Found, rates: Sequence[Tensor]
    ) -> tuple[list[Tensor], Found, bool]:
        """Run the backward pass.

        Args:
            saved: What the forward pass has left.
            found: The arguments, and the gradients at what the model has returned.
            rates: The groups' learning rates.

        Returns:
            The parameters' gradients, what the step needs, and whether the decisions are the same.
        """
        found.update(zip(self._after[FORWARD], saved, strict=True))
        self._run_phase(BACKWARD, found, rates)
        grads = [found[v] for v in self._grads]
        return grads, {v: found[v] for v in self._after[BACKWARD]}, self._as_before(found)

    def early(
        self,
        saved: Sequence[Tensor],
        found: Found,
        rates: Sequence[Tensor],
        weights: int,
        numbers: Sequence[float],
    ) -> tuple[list[Tensor], Early, bool]:
        """Run the backward pass and the step; nothing changes before that is committed.

        Args:
            saved: What the forward pass has left.
            found: The arguments, and the gradients at what the model has returned.
            rates: The groups' learning rates.
            weights: The sum of the parameters' versions.
            numbers: The learning rates as the groups have them.

        Returns:
            The parameters' gradients, the step, and whether the decisions are the same.

        Raises:
            LinAlgError: A factorisation of the step has failed.
        """
        found.update(zip(self._after[FORWARD], saved, strict=True))
        state = self.depends_on()
        versioned = noted(state)
        self._run_phase(BACKWARD, found, rates)
        grads = [found[v] for v in self._grads]
        own, versions = [g.detach() for g in grads], [g._version for g in grads]
        left = {v: found[v] for v in self._after[BACKWARD]}
        assert self.phases.sample is not None
        sample = found[self.phases.sample]
        early = Early(left, own, versions, sample, weights, numbers, versioned)
        return grads, early, self._as_before(found)

    def check_values(self, early: Early, grads: Sequence[Tensor], state: Sequence[Tensor]) -> bool:
        """Whether what a step was computed from has the same values.

        Args:
            early: The step.
            grads: The gradients as they are now.
            state: The optimizer's state.

        Raises:
            UnsupportedModelError: The gradients have, and the rest has not.
        """
        looked_at = [state[place] for place in self._looked_at]
        return early.check_values([*grads, *self._moved[0], *looked_at])

    def taken(self, early: Early) -> Outcome | None:
        """What a step has made; None where the host would decide otherwise."""
        early.found.update(zip(self._grads, (p.grad for p in self.receiving), strict=True))
        with torch.no_grad():
            return self._made_of(self.phases.outcome(early.found), _nothing)

    def settle(self) -> None:
        """What was written to the room beside the weights, say, becomes the weights."""
        if self._moved[0]:
            torch._foreach_copy_(*self._moved)

    def _at_risk(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._exposed

    def depends_on(self) -> list[Any]:
        """What there was of the optimizer's state that a step depends on, when last looked at."""
        return [*self._seen, *(t for _, t in self._fixed)]

    def _as_before(self, found: Found) -> bool:
        return self._sound not in found or bool(found[self._sound])

    def step(
        self, left: Found, inputs: Sequence[Tensor | None], rates: Sequence[Tensor]
    ) -> Outcome | None:
        """Run the step.

        Args:
            left: What the earlier phases have left.
            inputs: All inputs.
            rates: The groups' learning rates.

        Returns:
            None where the host would decide otherwise: then nothing has changed.
        """
        found = left | self.given(0, inputs)
        found.update(zip(self._grads, (p.grad for p in self.receiving), strict=True))

        def run() -> list[Tensor]:
            self._run_phase(STEP, found, rates)
            return self.phases.outcome(found)

        return self._outcome(run, _nothing)

    def capture_graph(self, inputs: Sequence[Tensor | None], rates: Sequence[Tensor]) -> None:
        """None is made: all three parts in one launch would never be used."""

    def _run_phase(self, place: int, found: Found, rates: Sequence[Tensor]) -> None:
        """Run a phase, with the rates, and the state as it was when last looked at."""
        values: Sequence[Value] = self.program.arguments[len(self._inputs) :]
        found.update(zip(values, (*rates, *self._seen), strict=True))
        with torch.no_grad(), without_autocast(self.changed):
            self.phases.phases[place](found)


def _nothing(results: Sequence[Tensor]) -> None:
    """The loop has had its loss and gradients before the step."""
