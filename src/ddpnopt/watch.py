# SPDX-License-Identifier: MIT
"""Watches the calls of torch functions in a pass: which tensors cross from layer to layer.

In the nominal pass a tensor that is used in a later time step than it was made in is replaced, for
that use, by a view of itself (a tap): so autograd has the gradient of each use apart. When the
pass is run again, the same tensors are known by the number of the call that makes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from ddpnopt.crossing import Crossing, Moved, Path, Span, other_path
from ddpnopt.modes import Quiet, floating, rebuilt
from ddpnopt.typing import Tensor

#: The time step of what was made before the pass, or of parameters alone, by unknown means.
OUTSIDE = -1


class _Watches(threading.local):
    """Those that see a pass now: a model inside another's, or two optimizers on one."""

    def __init__(self) -> None:
        self.active: list[Watch] = []


_watches = _Watches()


class Watch(Quiet):
    """The nominal pass.

    Args:
        hook: Called with a new crossing and its tap, to ask for the tap's gradient.
        tapping: What crosses is asked for; otherwise only functions that are layers are seen.

    Attributes:
        time: The present time step: the number of layers that have begun.
        path: Its calls so far.
        crossings: What has crossed, in the order of use.
        edges: Their taps' edges; the graph's own, to be dropped when the pass ends.
        blind: Time steps between which something crossed that can't be followed.
    """

    def __init__(self, hook: Callable[[Crossing, Tensor], None], tapping: bool = True) -> None:
        super().__init__()
        self.path = Path()
        self.hook, self.tapping = hook, tapping
        self.time = 0
        self.blind: list[Span] = []
        self.crossings: list[Crossing] = []
        self.edges: list[GradientEdge] = []
        self._times: dict[Node, int] = {}
        self._calls: dict[tuple[Node, int], tuple[int, int]] = {}
        self._taps: dict[tuple[Node, int], tuple[Crossing, Tensor]] = {}
        #: A layer runs.
        self.inside = False
        self._told = 0

    def begin(self) -> None:
        """See every call from here on."""
        self.__enter__()  # type: ignore[no-untyped-call]
        _watches.active.append(self)

    def end(self) -> None:
        """See no more, wherever in the stack of modes it stands: an interrupt may have left it."""
        self.on, self.layers = False, None
        self.path.close()
        _watches.active[:] = [one for one in _watches.active if one is not self]
        self.leave_stack()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tap what comes from an earlier time step, and note what is made."""
        if not self.tapping:
            return func(*args, **kwargs)
        tapped: dict[int, tuple[Tensor, Tensor, int]] = {}
        step = self.path.step(func, args, kwargs)
        args = self._use(args, tapped)
        if kwargs:
            kwargs = {key: self._use(value, tapped) for key, value in kwargs.items()}
        made = func(*args, **kwargs)
        if tapped:
            # A function that returns what it was given has made nothing.
            made = tapped[id(made)][0] if id(made) in tapped else made
            for _, tap, version in tapped.values():
                if tap._version != version:  # overwritten by its use
                    self._lose(tap)
        results = floating(made)
        if results:
            self._note(results)
            self.path.made(results, len(self.path.steps))
            self.path.steps.append(step)
        return made

    def _note(self, results: Sequence[Tensor]) -> None:
        """Number the call's results."""
        number = len(self.path.steps)
        for place, tensor in enumerate(results):
            node = tensor.grad_fn
            if node is not None:
                self._times.setdefault(node, self.time)
                self._calls.setdefault((node, tensor.output_nr), (number, place))

    def restart(self) -> None:
        """The pass that can be run again begins here: what has been made before is constant."""
        self.path = Path()
        self._times = dict.fromkeys(self._times, OUTSIDE)
        self._calls.clear()

    def renamed(self, old: Node | None, number: int, after: Tensor) -> None:
        """A recorder has put a node of its own behind a tensor.

        Args:
            old: The tensor's node.
            number: Its place among that node's results.
            after: The tensor behind it.
        """
        new = after.grad_fn
        if new is None:
            return
        self._times[new] = self.time
        known = self._calls.get((old, number)) if old is not None else None
        if known is not None:
            self._calls[new, after.output_nr] = known

    def alias(self, y: Tensor, tap: Tensor) -> None:
        """Another watch has put a view of a tensor in its place."""
        old, new = y.grad_fn, tap.grad_fn
        assert old is not None and new is not None
        self.path.same(y, tap)
        if old in self._times:
            self._times[new] = self._times[old]
        if (old, y.output_nr) in self._calls:
            self._calls[new, tap.output_nr] = self._calls[old, y.output_nr]

    def leave(self, output: Any) -> Any:
        """Tap what leaves the pass with its output: it is used behind the last layer."""
        if not self.tapping:
            return output
        self.time += 1
        values, structure = tree_flatten(output)
        used = [self._left(value) for value in values]
        same = all(a is b for a, b in zip(used, values, strict=True))
        return output if same else tree_unflatten(used, structure)

    def _left(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = value.grad_fn
        made_last = node is None or self._times.get(node, self.time) >= self.time - 1
        return value if made_last else self._use(value, {})

    def head(self, edge: GradientEdge, born: int, z: Tensor) -> Crossing | None:
        """An output that stays alive from its layer to the loss."""
        call = self._calls.get((edge.node, edge.output_nr))
        if call is None or not self.tapping:
            return None
        one = Crossing(call, born, self.time, z, z._version)
        self.crossings.append(one)
        self.edges.append(edge)
        return one

    def fresh_taps(self) -> tuple[tuple[Crossing, GradientEdge], ...]:
        """What has crossed since the last call."""
        start, self._told = self._told, len(self.crossings)
        return tuple(zip(self.crossings[start:], self.edges[start:], strict=True))

    def _use(self, value: Any, tapped: dict[int, tuple[Tensor, Tensor, int]]) -> Any:
        if isinstance(value, Tensor):
            node = value.grad_fn
            if node is None:
                return value
            born = self._times.get(node)
            if born is None:
                born = self._times[node] = self._found(node)
            if born >= self.time or born == OUTSIDE:
                return value
            tap = self._tap(value, node, born)
            if tap is not value:
                tapped[id(tap)] = value, tap, tap._version
            return tap
        if isinstance(value, tuple | list):
            parts = [self._use(one, tapped) for one in value]
            same = all(a is b for a, b in zip(parts, value, strict=True))
            return value if same else rebuilt(value, parts)
        if type(value) is dict:
            return {key: self._use(one, tapped) for key, one in value.items()}
        return value

    def _lose(self, tap: Tensor) -> None:
        """A tensor was overwritten by its use: neither its value nor its gradient is to be had."""
        for one in self.crossings:
            if one.y.data_ptr() == tap.data_ptr():
                one.apart = True
                self.blind.append(Span(one.born, one.used))

    def _tap(self, y: Tensor, node: Node, born: int) -> Tensor:
        """The view of a tensor that stands for its use in this time step."""
        key = node, y.output_nr
        known = self._taps.get(key)
        if known is not None and known[0].used == self.time:
            known[0].beside = known[0].beside or not self.inside
            return known[1]
        call = self._calls.get(key)
        if call is None or type(y) is not Tensor or _wrapped(y):
            self.blind.append(Span(born, self.time))
            return y
        with torch._C.DisableTorchFunction():  # nobody else's business
            tap = y.view_as(y)
            one = Crossing(call, born, self.time, y.detach(), y._version, beside=not self.inside)
        assert tap.grad_fn is not None
        self._times[tap.grad_fn] = self.time
        for other in _watches.active:
            if other is not self:
                other.alias(y, tap)
        self._taps[key] = one, tap
        self.crossings.append(one)
        self.edges.append(get_gradient_edge(tap))
        self.hook(one, tap)
        return tap

    def _found(self, node: Node) -> int:
        """The time step of a node that no call has shown: now, if it was made in this pass."""
        last, first, stack, seen = OUTSIDE, self.time, [node], {node}
        while stack:
            for child, _ in stack.pop().next_functions:
                if child is None or child in seen:
                    continue
                seen.add(child)
                known = self._times.get(child)
                if known is not None:
                    last, first = max(last, known), min(first, known)
                else:
                    stack.append(child)
        if last == OUTSIDE:
            return OUTSIDE
        if first < self.time:
            self.blind.append(Span(max(first, 0), self.time))
        return self.time


class Retrace(Quiet):
    """The pass run again.

    Args:
        moved: Collects the tensors that are met.
        path: The nominal pass.
    """

    def __init__(self, moved: Moved, path: Path) -> None:
        super().__init__()
        self.moved, self.nominal, self.path, self.number = moved, path, Path(), 0

    def end(self) -> None:
        """See no more: an interrupt may have left it in this thread's stack of modes."""
        self.on = False
        self.leave_stack()

    def check(self) -> None:
        """The pass is over.

        Raises:
            UnsupportedModelError: It was another one.
        """
        if self.number != len(self.nominal.steps):
            raise other_path()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number the call's results; look at those that are waited for.

        Raises:
            UnsupportedModelError: It is not the call that the nominal pass made here.
        """
        step = self.path.step(func, args, kwargs)
        made = func(*args, **kwargs)
        results = floating(made)
        if results:
            number, self.number = self.number, self.number + 1
            if number >= len(self.nominal.steps) or self.nominal.steps[number] != step:
                raise other_path()
            self.path.made(results, number)
            self.moved.meet(number, results)
        return made


def _wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func, which has a graph of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def branches(crossings: Iterable[Crossing], states: Sequence[int]) -> bool:
    """Whether more than one tensor crosses some cut.

    Args:
        crossings: Of a pass.
        states: The time steps of its layers.
    """
    crossings = list(crossings)
    return any(sum(one.at(time) for one in crossings) > 1 for time in states)
