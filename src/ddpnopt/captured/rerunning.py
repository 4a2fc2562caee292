# SPDX-License-Identifier: MIT
"""Passes of a captured loop, run again as they are written: for a record, or in place of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ddpnopt import decisions
from ddpnopt.captured.calls import Work
from ddpnopt.captured.comparing import CLOSE, CLOSE_COARSE
from ddpnopt.captured.forward import Pass
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.gradients import SAME, Fingerprint, sampled
from ddpnopt.randomness import Randomness, drawing
from ddpnopt.replay import set_training
from ddpnopt.shell import Shell
from ddpnopt.sizes import norms
from ddpnopt.taking import take
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist


def _nothing() -> None:
    """Between a forward pass and its backward pass, in most cases."""


class Rerun:
    """Runs passes again whose gradients are in p.grad already, and stay there.

    Args:
        optimizer: Its engine gets to see the passes.
        net: The model.

    Attributes:
        runs: A pass runs again.
        unlike: In the last iteration p.grad had not the length that the backward pass gives it.
    """

    def __init__(self, optimizer: Shell, net: nn.Module) -> None:
        self._optimizer, self._net = optimizer, net
        self.runs = self.unlike = False

    def weights(self) -> int:
        """Tells whether parameters have been written to."""
        return sum([p._version for p in self._optimizer.engine.parameters()])

    def check_weights(self, one: Pass) -> None:
        """The weights must be those of the pass.

        Raises:
            UnsupportedModelError: They are not.
        """
        if self._optimizer.options.closed_loop and one.weights != self.weights():
            raise UnsupportedModelError(
                "weights were changed between the forward pass and the step (sharpness-aware or "
                "manual updates), so the pass can't be compared with a second one; use "
                "feedback='open_loop', or run the pass again"
            )

    def all(self, held: Sequence[Pass]) -> None:
        """Passes that were run from a record: from here on the engine has seen them.

        Raises:
            UnsupportedModelError: Arguments or weights are not those of the pass.
        """
        engine = self._optimizer.engine
        for one in held:
            one.check_inputs()
            self.check_weights(one)
        assert engine.recorder is not None
        arrivals, fingerprint = engine.recorder.arrivals, engine.fingerprint
        # Without p.grad these would be taken for thrown away; and they know how long it was.
        seen, arrivals.completed = arrivals.completed, []
        if seen:
            engine.fingerprint = Fingerprint()
        kept = self._put_aside()
        try:
            for one in sorted(held, key=lambda one: one.number):
                self._once_more(one)
        finally:
            _put_back(kept)
            arrivals.completed = [*seen, *arrivals.completed]
            if seen:
                engine.fingerprint = fingerprint

    def _once_more(self, one: Pass, forward: bool = False) -> None:
        """Run a pass again that has left its traces in the model already.

        Args:
            one: The pass.
            forward: Its forward pass alone comes before what has replaced its weights.
        """
        with restoring(one.buffers), _as_in(one) as give_back:
            one.put_back()
            self._again(one, give_back if forward else _nothing)

    def instead(self, one: Pass) -> None:
        """Run a pass as it is written while its backward pass runs: p.grad gets its gradients.

        In a thread of its own: within a backward pass nothing is recorded.

        Raises:
            Exception: As the pass does.
        """
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._once_more(one, forward=True)
            except BaseException as error:  # handed over, never swallowed
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as interrupt:  # raised when the pass is over
                errors.append(interrupt)
        if errors:
            raise errors[0]

    def iteration(self, one: Pass) -> dict[str, Any]:
        """Run a pass again, its buffers put back, and take the step with p.grad as it is.

        Returns:
            What the model returns, the gradients of this pass, whether all was decided in it as
            before, and the record of the step.
        """
        engine = self._optimizer.engine
        engine.forget()
        kept = self._put_aside()
        try:
            made, sizes, sound = self._again(one)
            grads = {p: p.grad for p in kept if p.grad is not None}
        finally:
            _put_back(kept)
        self.unlike = not _as_it_was(grads, sizes)
        assert engine.recorder is not None
        report = take(engine, list(engine.recorder.arrivals.completed))
        return {"outputs": made, "grads": grads, "sound": sound, "report": report}

    def work(self, one: Pass) -> Work:
        """An iteration with this pass, its gradients and p.grad given."""
        grads = [p.grad for p in self._optimizer.engine.parameters()]
        assert one.randomness is not None

        def traced() -> tuple[Sequence[Tensor | None], Callable[[], Any]]:
            copy = one.copied()
            return [*copy.tensors, *one.G[0], *grads], partial(self.iteration, copy)

        inputs = [*one.tensors, *one.G[0], *grads]
        written, generator = partial(self.iteration, one), one.randomness.torch_cpu
        return Work(one.kind, inputs, written, traced, generator)

    def _put_aside(self) -> dict[Tensor, Tensor | None]:
        kept: dict[Tensor, Tensor | None] = {p: p.grad for p in self._net.parameters()}
        for p in kept:
            p.grad = None
        return kept

    def _again(
        self, one: Pass, between: Callable[[], None] = _nothing
    ) -> tuple[Any, Tensor | None, Tensor]:
        """A forward pass and its backward passes.

        Args:
            one: The pass.
            between: What comes between them.

        Returns:
            What the model returns, the norms of the gradients, and whether all was decided as
            before.
        """
        outside, (on, dtype) = Randomness.capture(), one.autocast
        kind = self._optimizer.engine.parameters()[0].device.type
        flags = [m.training for m, _ in one.training]
        modules, known = [m for m, _ in one.training], [flag for _, flag in one.training]
        self.runs = True
        try:
            one.rewind()
            set_training(modules, known)
            with torch.enable_grad():
                with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
                    made = self._net(*one.args, **one.kwargs)
                between()
                decisions.phase_ends()
                tensors = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
                for G in one.G:
                    pairs = [(t, g) for t, g in zip(tensors, G, strict=True) if g is not None]
                    outputs, seeds = zip(*pairs, strict=True)
                    torch.autograd.backward(outputs, seeds, retain_graph=len(one.G) > 1)
            grads = [p.grad for p in self._net.parameters() if p.grad is not None]
            sizes = norms([sampled(g) for g in grads]) if grads else None
            sound = decisions.sound()
            decisions.phase_ends()
        finally:
            self.runs = False
            set_training(modules, flags)
            outside.restore()
        return made, sizes, sound


@contextmanager
def restoring(buffers: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Leave buffers as they are before the block, whatever runs in it.

    Args:
        buffers: They, and what they were before some pass.
    """
    now = [(buffer, buffer.detach().clone()) for buffer, _ in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in now:
                buffer.copy_(value)


@contextmanager
def _as_in(one: Pass) -> Iterator[Callable[[], None]]:
    """Within the block parameters that were replaced since a pass (p.data = ...) are as in it.

    Autograd, too, keeps the memory of what a pass has made of them.

    Yields:
        What gives them the other memory back; done at the end in any case.
    """
    replaced = [] if one.plan is None else one.plan.replaced()
    now = [(p, p.data) for p, _ in replaced]

    def give_back() -> None:
        for p, other in now:
            p.data = other

    try:
        for p, own in replaced:
            p.data = own
        yield give_back
    finally:
        insist(give_back)


def _put_back(kept: Mapping[Tensor, Tensor | None]) -> None:
    for p, grad in kept.items():
        p.grad = grad


def _as_it_was(grads: Mapping[Tensor, Tensor], sizes: Tensor | None) -> bool:
    """Whether p.grad has the length that the backward pass has left: else it was rescaled.

    All gradients together: those of single biases may be little more than rounding.
    """
    now = [p.grad for p in grads if p.grad is not None]
    if sizes is None or len(now) < len(grads):
        return sizes is None
    tolerance = max(SAME.get(g.dtype, 1e-2) for g in now)
    size = sizes.norm()
    off = (norms([sampled(g) for g in now]).norm() - size).abs()
    return decisions.holds(off <= tolerance * size)


def off_by(one: Pass, plan: PhasedPlan, rates: Sequence[Tensor]) -> float:
    """How far a record's outputs are from those of a pass that has run as it is written.

    With other outputs the loss is another: the step from the record would only be refused.

    Args:
        one: The pass.
        plan: The record.
        rates: The groups' learning rates.

    Returns:
        A share of the outputs' size; 0 where rounding explains it, or nobody relies on the record.
    """
    if not plan.runs:
        return 0.0
    assert one.randomness is not None
    with restoring(one.buffers), drawing(one.randomness.torch_cpu if plan.random else None):
        one.put_back()
        outputs, _ = plan.forward(plan.given(0, one.tensors), rates)
    pairs = [(a, b) for a, b in zip(outputs, one.outputs, strict=True) if b.is_floating_point()]
    sizes = [(float((a - b).norm()), float(b.norm())) for a, b in pairs]
    off = max((apart / size if size else apart for apart, size in sizes), default=0.0)
    return off if not off <= (CLOSE_COARSE if plan.half else CLOSE) else 0.0
