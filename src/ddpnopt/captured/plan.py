# SPDX-License-Identifier: MIT
"""What has been traced as a program that can be run again: on which tensors, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ddpnopt.captured.compiling import Compiled
from ddpnopt.captured.program import Program, Value
from ddpnopt.captured.recording import At, Outcome, Places, Recording, mapped, reported
from ddpnopt.errors import LinAlgError
from ddpnopt.typing import Tensor


class Plan:
    """A recorded iteration as a program.

    Args:
        recording: The iteration.
        compiled: Compile the program by torch's compiler.

    Attributes:
        verified: A run has been compared with the code.
        runs: How often it was run.
        due: How often it will have been when it is compared again.
        misses: Runs in a row whose decisions were not the recording's.
        half: Some of it has half precision.
        random: It draws random numbers.
        compiled: The program is compiled; from its first run on.
    """

    def __init__(self, recording: Recording, compiled: bool) -> None:
        tracer = recording.tracer
        self.verified, self.half, self.random = False, tracer.half, tracer.random
        self.runs = self.misses = 0
        self.due: float = 0
        #: State that the step replaces by new tensors; state that it only reads, or not even that,
        #: so that other steps may replace it; and state that it writes to where it is.
        self.slots = [slot for slot, old in recording.state if slot.tensor is not old]
        written = tracer.written()
        stays = [(slot, old) for slot, old in recording.state if slot.tensor is old]
        self._fixed = [(slot, old) for slot, old in stays if tracer.value(old).storage in written]
        self._read = [s for s, old in stays if tracer.value(old).storage not in written]
        olds = [old for slot, old in recording.state if slot.tensor is not old]
        olds += [slot.tensor for slot in self._read]
        self.state, self._made_state = Places([*self.slots, *self._read]), Places(self.slots)
        self._written_to = Places(slot for slot, _ in self._fixed)
        self._kinds = list(map(_kind, olds))
        self._whereabouts = [(t.data_ptr(), _kind(t)) for _, t in self._fixed]
        self._seen = list[Any]()  # the state, when last looked at
        self.counts = [(slot, slot.found - before) for slot, before in recording.counts]
        wanted = [recording.sound, *(slot.tensor for slot in self.slots)]

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            wanted.append(leaf)
            return At(len(wanted) - 1)

        self._made = tree_map(placed, recording.made)
        self._report = mapped(recording.report, placed)
        results = [tracer.value(t) for t in wanted]
        #: Places of the inputs that are used.
        self._used = _used(recording, results)
        inputs = [recording.inputs[place] for place in self._used]
        arguments = [tracer.value(t) for t in (*inputs, *recording.rates, *olds) if t is not None]
        known = set(arguments)
        externals = {v: t for v, t in tracer.externals.items() if v not in known}
        scratch = [tracer.value(t) for t in recording.scratch.values()]
        self.program = Program(tracer.calls, arguments, externals, results, scratch)
        self.compiled = compiled
        changed = list(self.program.changed.values())
        self.changed = [t.detach() for t in changed]
        self._room = [_room(t, recording.scratch) for t in changed]
        self._function = self._built(recording)
        self._externals = [t.detach() for t in self.program.externals.values()]
        self._own = _Own(recording.modules, self.program.externals.values())
        self._told = [at.place for at in reported(self._report)]
        self._constant = [i for i, v in enumerate(results) if v in self.program.externals]
        self._backed = False
        self._graph: tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]] | None = None

    def confirm(self, first: float) -> None:
        """A run is like the code: the record is run as long again as it has held.

        Args:
            first: Runs before the first comparison after this; a tenth of the most.
        """
        self.verified, self.misses = True, 0
        self.due = self.runs + min(max(first, self.runs), 10 * first)

    def current(self) -> bool:
        """Whether everything that is not an argument is where it was."""
        return self._own.held() and self.still_current()

    def still_current(self) -> bool:
        """The same, where it was so at the beginning of the pass: the model is the same."""
        return (
            self._own.in_place()
            and self._written_in_place()
            and all([isinstance(slot.found, int) for slot, _ in self.counts])
            and self._known_state()
        )

    def replaced(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters that have got other memory since (p.data = ...), and what they had."""
        return self._own.replaced()

    def _written_in_place(self) -> bool:
        """Whether the state that the program writes to is the recording's, and where it was."""
        found, known = self._written_to.found, [t for _, t in self._fixed]
        same = all(map(is_, found, known))
        return same and [(t.data_ptr(), _kind(t)) for t in known] == self._whereabouts

    def _known_state(self) -> bool:
        """Look at the other state: whether it has the recording's shapes and dtypes."""
        self._seen = self.state.found
        return list(map(_kind, self._seen)) == self._kinds

    def __call__(self, inputs: Sequence[Tensor | None], rates: Sequence[Tensor]) -> Outcome | None:
        """Run the iteration.

        Returns:
            None where the host would decide otherwise: then nothing has changed.
        """
        arguments = self._arguments(inputs, rates)
        return self._outcome(
            lambda: self._launch(arguments) if self._graph else self._run(arguments), self._filled
        )

    def _outcome(
        self, run: Callable[[], list[Tensor]], made: Callable[[Sequence[Tensor]], Any]
    ) -> Outcome | None:
        """What a run makes of the state, if the host would decide likewise.

        Args:
            run: Runs the program, and returns its results.
            made: Makes of them what the caller wants.
        """
        self._backed = False
        try:
            with torch.no_grad(), without_autocast(self.changed):
                self._back_up()
                results = run()
            outcome = self._made_of(results, made)
            if outcome is None:
                self.restore()
            return outcome
        except LinAlgError:  # as written, another factorisation is tried
            self.restore()
            return None
        except BaseException:
            self.restore()
            raise

    def _made_of(
        self, results: list[Tensor], made: Callable[[Sequence[Tensor]], Any]
    ) -> Outcome | None:
        """The program's results; None where the host would decide otherwise."""
        if not bool(results[0]):
            return None
        for place in self._constant:  # the caller may write to them
            results[place] = results[place].clone()
        told = {place: results[place] for place in self._told}
        return Outcome(
            made(results),
            lambda: mapped(self._report, lambda at: told[at.place]),
            results[1 : 1 + len(self.slots)],
            [slot.found + more for slot, more in self.counts],
        )

    def _arguments(self, inputs: Sequence[Tensor | None], rates: Sequence[Tensor]) -> list[Tensor]:
        given = [t for place in self._used if (t := inputs[place]) is not None]
        return [*given, *rates, *self.state.found]

    def commit(self, outcome: Outcome) -> None:
        """Keep what a run has made of the state; may be begun again."""
        self.settle()
        self._made_state.put(outcome.state)
        for (slot, _), number in zip(self.counts, outcome.counts, strict=True):
            slot.put(number)

    def _filled(self, results: Sequence[Tensor]) -> Any:
        """What the loss function returns."""
        if isinstance(self._made, At):
            return results[self._made.place]
        return tree_map(
            lambda leaf: results[leaf.place] if isinstance(leaf, At) else leaf, self._made
        )

    def settle(self) -> None:
        """What a run has changed elsewhere is changed where it belongs; may be begun again."""

    def restore(self) -> None:
        """Weights and buffers as they were before the run, as far as it came."""
        at_risk, room = self._at_risk()
        if self._backed and at_risk:
            torch._foreach_copy_(at_risk, room)

    def _at_risk(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a run changes before all is known to be well, and room for copies of it."""
        return self.changed, self._room

    def _back_up(self) -> None:
        at_risk, room = self._at_risk()
        if at_risk:
            torch._foreach_copy_(room, at_risk)
        self._backed = True

    def _run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        return self._function(*arguments, *self._externals)

    def interpret(self) -> None:
        """Run the operators one by one from now on."""
        self.compiled, self._graph = False, None
        self._function = self._built()

    def _built(self, recording: Recording | None = None) -> Callable[..., list[Tensor]]:
        """The program as a function of its arguments and its externals."""
        program = self.program
        graph = program.graph(native=not self.compiled)
        if self.compiled:
            return Compiled(graph, len(program.arguments), len(program.results))
        return graph.forward

    @property
    def refusal(self) -> str:
        """Why it can't be run; or ''."""
        return "an argument is changed in place" if self.program.writes_arguments else ""

    # CUDA graphs ----------------------------------------------------------------------------

    @torch.no_grad()
    def capture_graph(self, inputs: Sequence[Tensor | None], rates: Sequence[Tensor]) -> None:
        """From now on one launch runs all kernels; the program must have run once."""
        arguments = self._arguments(inputs, rates)
        own = [t.detach().clone() for t in arguments]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._run(own)
        self._graph = graph, own, results

    def _launch(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        assert self._graph is not None
        graph, own, results = self._graph
        torch._foreach_copy_(own, [t.detach() for t in arguments])
        graph.replay()
        return [t.clone() for t in results]


class _Own:
    """The model's tensors that a program works on.

    Args:
        modules: The model's.
        externals: All tensors that the program works on.
    """

    def __init__(self, modules: Iterable[nn.Module], externals: Iterable[Tensor]) -> None:
        read = {id(t) for t in externals}
        owners = [one for m in modules for one in (m._parameters, m._buffers)]
        found = [
            (owner, name, t)
            for owner in owners
            for name, t in owner.items()
            if t is not None and id(t) in read
        ]
        self._names = [(owner, name) for owner, name, _ in found]
        self._tensors = [t for _, _, t in found]
        self._shapes = [(t.shape, t.stride()) for t in self._tensors]
        self._memory = [t.detach() for t in self._tensors]
        self._addresses = [t.data_ptr() for t in self._tensors]

    def held(self) -> bool:
        """Whether the model still has them, as they were."""
        same = all(map(is_, [owner.get(name) for owner, name in self._names], self._tensors))
        return same and [(t.shape, t.stride()) for t in self._tensors] == self._shapes

    def in_place(self) -> bool:
        """Whether their memory is where it was."""
        return [t.data_ptr() for t in self._tensors] == self._addresses

    def replaced(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters whose memory is elsewhere, and that which they had."""
        pairs = zip(self._tensors, self._memory, strict=True)
        moved = [(p, old) for p, old in pairs if p.data_ptr() != old.data_ptr()]
        return [(p, old) for p, old in moved if isinstance(p, nn.Parameter)]


def _used(recording: Recording, results: Sequence[Value]) -> list[int]:
    """Places of the inputs that operators read, or that are asked for; each tensor's once."""
    tracer = recording.tracer
    read = {v for call in tracer.calls for v in call.inputs} | set(results)
    found: dict[Value, int] = {}
    for place, t in enumerate(recording.inputs):
        if t is not None and tracer.value(t) in read:
            found.setdefault(tracer.value(t), place)
    return list(found.values())


def without_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """The program has its own casts."""
    kind = tensors[0].device.type if tensors else "cpu"
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _kind(value: Any) -> Any:
    """What a program depends on of its arguments."""
    tensor = isinstance(value, torch.Tensor)
    return (value.shape, value.dtype, value.device) if tensor else type(value)


def _room(t: Tensor, scratch: dict[int, Tensor]) -> Tensor:
    """Memory for a copy of what a run changes: the optimizer's own, where it has some."""
    known = scratch.get(id(t))
    return torch.empty_like(t, requires_grad=False) if known is None else known
