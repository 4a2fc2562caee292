# SPDX-License-Identifier: MIT
"""Pieces that let hooks live on a model without holding on to it, or to each other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ddpnopt.typing import Tensor

#: Nodes of functions that are written in Python.
PYTHON: Any = torch._C._FunctionBase


class Hook:
    """A weak callable on a module: inert once the recorder is gone, and in copies and pickles."""

    def __init__(self, recorder: object | None = None, method: str = "", name: str = "") -> None:
        self.recorder = weakref.ref(recorder) if recorder is not None else None
        self.method, self.name = method, name

    def __call__(self, *args: Any) -> Any:
        """Forward to the recorder, unless the call is being traced for a pass without gradients."""
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                return None
            from ddpnopt.interrupted import outside

            return outside(self, *args)
        recorder = self.recorder() if self.recorder is not None else None
        if recorder is None or torch._C._get_tracing_state() is not None:
            return None
        with torch._C.DisableTorchFunction():  # what hooks do is no part of anybody's pass
            return getattr(recorder, self.method)(self.name, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """An inert hook."""
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """An inert hook."""
        return (Hook, ())


def removed(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()
    handles.clear()


class Anchor(torch.autograd.Function):
    """Identity in place that gives an output a gradient where no input or bias has one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, token: Tensor) -> Tensor:
        """Return h itself, so that nothing is copied and later in-place operations work."""
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Pass the gradient on; the token's own shows that a backward pass has run."""
        return gradients[0], torch.zeros(())


class Same(torch.autograd.Function):
    """Identity in place: a node of its own for what is about to be overwritten."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """Return y itself."""
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Pass the gradient on."""
        return gradients[0]


class Probes(threading.local):
    """Whether the library's own backward pass is running in this thread."""

    running = False


probes = Probes()


class Probing:
    """The library's own backward passes: no recorder, of whatever optimizer, takes notice."""

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        """Begin."""
        self._outer, probes.running = probes.running, True

    def __exit__(self, *error: object) -> None:
        """As it was before."""
        probes.running = self._outer


def edge_of(t: Tensor) -> GradientEdge | None:
    """A tensor's edge in the graph, if it has a gradient.

    That of a Python function's result owns a node of its own: it is to be asked for once.
    """
    node = t.grad_fn
    if node is None or isinstance(node, PYTHON):
        return get_gradient_edge(t) if t.requires_grad else None
    return GradientEdge(node, t.output_nr)


def probe(edge: GradientEdge, targets: Sequence[Any], seed: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a recorded output at ``targets``, the graph and what hangs on it left alone."""
    return responses(edge, targets, (seed,))[0]


def responses(
    edge: GradientEdge, targets: Sequence[Any], seeds: Sequence[Tensor]
) -> list[tuple[Tensor | None, ...]]:
    """Likewise, to several seeds.

    On its way a gradient is added to the .grad of every tensor with ``retain_grad()``; that of the
    opposite of all seeds takes it off again.
    """
    opposite = -torch.stack(list(seeds)).sum(0)
    found = [
        torch.autograd.grad((edge,), targets, (one,), retain_graph=True, allow_unused=True)
        for one in (*seeds, opposite)
    ]
    return list(found[:-1])


def weakly(method: Any) -> Callable[..., Any]:
    """A bound method that does not keep its object alive; None once it is gone."""
    reference, function = weakref.ref(method.__self__), method.__func__

    def call(*args: Any) -> Any:
        target = reference()
        return None if target is None else function(target, *args)

    return call
