# SPDX-License-Identifier: MIT
"""Watches the calls of torch functions in a pass: which tensors cross from layer to layer.

In the nominal pass a tensor that is used in a later time step than it was made in is replaced, for
that use, by a view of itself (a tap): so autograd has the gradient of each use apart. Where that
use overwrites it, it stays what it is and gets a node of its own, and its value is copied. When the
pass is run again (`retrace.py`), the same tensors are known by the number of the call that makes
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from ddpnopt.accounts import Part, Sources
from ddpnopt.arguments import fields_of, with_fields
from ddpnopt.crossing import Crossing, Path, Span
from ddpnopt.inert import Same
from ddpnopt.modes import DIFFERENTIATING, Quiet, overwritten, rebuilt, results
from ddpnopt.typing import Tensor

#: The time step of what was made before the pass, or of parameters alone, by unknown means.
OUTSIDE = -1
BACKWARD_INSIDE = (
    "the model calls backward() inside its forward pass, which would add to p.grad once more when "
    "the pass is run again; take the gradient with torch.autograd.grad, or use feedback=False"
)
GRAPH_INSIDE = (
    "the model takes a gradient with create_graph=True inside its forward pass: the loss depends "
    "on its layers on a way that their outputs do not show; use feedback=False"
)


class _Watches(threading.local):
    """Those that see a pass now: a model inside another's, or two optimizers on one."""

    def __init__(self) -> None:
        self.active: list[Watch] = []


_watches = _Watches()


class Watch(Quiet):
    """The nominal pass.

    Args:
        hook: Called with a new crossing, its tap and what goes into the step that has made it, to
            ask for the tap's gradient.
        tapping: What crosses is asked for; otherwise only functions that are layers are seen.

    Attributes:
        time: The present time step: the number of layers that have begun.
        path: Its calls so far.
        crossings: What has crossed, in the order of use.
        edges: Their taps' edges; the graph's own, to be dropped when the pass ends.
        blind: Time steps between which something crossed that can't be followed.
    """

    def __init__(
        self,
        hook: Callable[[Crossing, Tensor, Sources], None],
        tapping: bool = True,
    ) -> None:
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
        #: What goes into each time step: its layer's output, and tensors of earlier steps.
        self._sources: dict[int, list[tuple[Part, GradientEdge]]] = {}
        #: The layer that a product with a weight and a bias is, behind another's use of the weight.
        self.head_of: Callable[[Tensor, Tensor | None], tuple[str, nn.Module] | None]
        self.head_of = lambda weight, bias: None
        #: A layer runs.
        self.inside = False
        #: Why the pass can't be followed at all, or ''.
        self.refusal = ""
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

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module] | None:
        """Outside the modules, too, where another layer's weight is multiplied by."""
        found = super().dense(weight, bias)
        return self.head_of(weight, bias) if found is None and not self.inside else found

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tap what comes from an earlier time step, and note what is made."""
        if not self.tapping:
            return func(*args, **kwargs)
        tapped: dict[int, tuple[Tensor, Tensor, int]] = {}
        step = self.path.step(func, args, kwargs)
        first = overwritten(func, args, kwargs)
        if first is not None:
            with torch._C.DisableTorchFunction():  # nobody else's business
                self._overwrite(first)
        if torch.is_grad_enabled():  # else no gradient comes from this use
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
        found = results(made, first)
        if found:
            self._note(found, again=first is not None)
            self.path.made(found, len(self.path.steps))
            self.path.steps.append(step)
        return made

    def asked(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """Remember the answer, or that the model takes gradients."""
        if func not in DIFFERENTIATING:
            answer, number = func(*args, **kwargs), self.path.number(args[0])
            if number is not None:
                self.path.asked[number, name] = answer
            return answer
        if func is not torch.autograd.grad:
            self.refusal = BACKWARD_INSIDE
        elif kwargs.get("create_graph") or any(args[4:5]):
            self.refusal = GRAPH_INSIDE
        self.path.differentiates = True
        return func(*args, **kwargs)

    def _note(self, made: Sequence[Tensor], again: bool) -> None:
        """Number the call's results; ``again``: what has a number already has changed."""
        number = len(self.path.steps)
        for place, tensor in enumerate(made):
            node = tensor.grad_fn
            if node is not None:
                self._times.setdefault(node, self.time)
                key = node, tensor.output_nr
                if again or key not in self._calls:
                    self._calls[key] = number, place

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

    def alias(self, key: tuple[Node, int], edge: GradientEdge) -> None:
        """Another watch has put an edge of its own in the place of a tensor's."""
        if key[0] in self._times:
            self._times[edge.node] = self._times[key[0]]
        if key in self._calls:
            self._calls[edge.node, edge.output_nr] = self._calls[key]

    def goes_in(self, part: Part, edge: GradientEdge, time: int) -> None:
        """A part of what a time step is made from."""
        self._sources.setdefault(time, []).append((part, edge))

    def leave(self, output: Any) -> Any:
        """Tap what leaves the pass with its output: it is used behind the last layer."""
        if not self.tapping:
            return output
        self.time += 1
        return self._leave(output)

    def _leave(self, output: Any) -> Any:
        values, structure = tree_flatten(output)
        used = [self._left(value) for value in values]
        same = all(a is b for a, b in zip(used, values, strict=True))
        return output if same else tree_unflatten(used, structure)

    def _left(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            held = fields_of(value)
            used = {name: self._leave(one) for name, one in held.items()}
            return value if all(used[k] is held[k] for k in held) else with_fields(value, used)
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

    def _overwrite(self, y: Tensor) -> None:
        """Before a tensor is written to: what has crossed keeps its value, and so does this use.

        A view writes to all of its base. The base gets a node of its own, the only use of which is
        the call that comes: there autograd has the gradient of this use alone.
        """
        base = y._base if y._base is not None else y
        node = base.grad_fn
        if node is None or not _plain(base):
            return
        born = self._times.get(node, self.time)
        for watch in _watches.active:
            watch._keep(base.untyped_storage().data_ptr())
        if born in (OUTSIDE, self.time):
            return
        key = node, base.output_nr
        call = self._calls.get(key)
        if call is None or not torch.is_grad_enabled():
            self.blind.append(Span(born, self.time))
            self._times[node] = self.time
            return
        value = base.detach().clone()
        Same.apply(base)  # type: ignore[no-untyped-call]
        self._cross(base, key, Crossing(call, born, self.time, value, value._version))

    def _keep(self, storage: int) -> None:
        """What has crossed and lies there is going to be overwritten."""
        for one in self.crossings:
            if one.intact() and one.y.untyped_storage().data_ptr() == storage:
                one.y = one.y.clone()
                one.version = one.y._version

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
        if call is None or not _plain(y):
            self.blind.append(Span(born, self.time))
            return y
        with torch._C.DisableTorchFunction():  # nobody else's business
            tap = y.view_as(y)
            one = Crossing(call, born, self.time, y.detach(), y._version)
            for other in _watches.active:
                if other is not self:
                    other.path.same(y, tap)
            self._taps[key] = one, tap
            self._cross(tap, key, one)
        return tap

    def _cross(self, tap: Tensor, key: tuple[Node, int], one: Crossing) -> None:
        """A use has an edge of its own, where another tensor's stood."""
        one.beside = not self.inside
        edge = get_gradient_edge(tap)
        self._times[edge.node] = self.time
        for other in _watches.active:
            if other is not self:
                other.alias(key, edge)
        self.crossings.append(one)
        self.edges.append(edge)
        self.hook(one, tap, self._sources.get(one.born, ()))
        self.goes_in(one, edge, self.time)

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


def _plain(y: Tensor) -> bool:
    """Whether it is a tensor like any other: no transform of torch.func has a graph for it."""
    return type(y) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(y)
