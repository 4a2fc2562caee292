# SPDX-License-Identifier: MIT
"""Runs a recorded call again as it ran: arguments, autocast, randomness, training flags, buffers.

Several recorded calls (accumulation) run interleaved: each stops where it reaches a layer, so
that a layer's new weights can be computed from all of them before any goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ddpnopt.arguments import frozen, untouched
from ddpnopt.compiled import as_written, compiled
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.keeping import Kept, buffers_of, kept_on, untrained
from ddpnopt.randomness import Randomness, cuda_in_use
from ddpnopt.retrace import Retrace
from ddpnopt.typing import Tensor
from ddpnopt.undoing import Undoing, insist

#: One thread at a time: generators and some of torch's switches are the process's.
ALONE = threading.RLock()


@dataclass
class Call:
    """One recorded call of the module that owns all layers."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    watched: list[tuple[Tensor, int]]
    randomness: Randomness
    autocast: dict[str, tuple[bool, torch.dtype]]
    inside: Sequence[nn.Module]
    training: tuple[bool, ...]
    buffers: list[tuple[nn.Module, str, Tensor]]
    compiled: bool = False
    fixed: Sequence[tuple[Tensor, int]] = ()
    written: Sequence[Tensor] = ()

    @staticmethod
    def capture(
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inside: Sequence[nn.Module],
    ) -> Call:
        """Record a call before it runs; ``inside`` are the module's own modules."""
        watched: list[tuple[Tensor, int]] = []
        devices = ["cpu"] + (["cuda"] if cuda_in_use() else [])
        autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices}
        training = tuple([m.training for m in inside])
        args, kwargs = frozen(args, watched), frozen(kwargs, watched)
        buffers = [(m, n, b.detach().clone()) for m, n, b in buffers_of(inside)]
        state = Randomness.capture()
        return Call(
            name,
            module,
            args,
            kwargs,
            watched,
            state,
            autocast,
            inside,
            training,
            buffers,
            compiled(inside),
            untrained(inside),
        )

    def ends(self) -> None:
        """It has run: which parameters that nobody trains has it written to?"""
        self.written = [p for p, version in self.fixed if p._version != version]

    def completed(self, kwargs: Mapping[str, Any]) -> Call | None:
        """With keyword arguments that are known since its end only.

        Returns:
            The call, or None where it may have changed what it was given.
        """
        if not all(map(untouched, kwargs.values())):
            return None
        return replace(self, kwargs=frozen(dict(kwargs), self.watched))

    def check_inputs(self) -> None:
        """Raise if the pass can't be run again as it was.

        Raises:
            UnsupportedModelError: An argument has been overwritten, or the pass moves parameters.
        """
        for name, p in self.module.named_parameters() if self.written else ():
            if any(p is one for one in self.written):
                raise UnsupportedModelError(
                    f"'{name}', which is not trained, is written to inside the forward pass (a "
                    "moving average), and would be once more when the pass is run again; make it "
                    "a buffer, update it outside, or use feedback='open_loop'"
                )
        for number, (tensor, version) in enumerate(self.watched):
            if tensor._version != version:
                raise UnsupportedModelError(
                    f"input tensor {number} of '{self.name or 'the model'}' was modified in place "
                    "after the forward pass, so the pass can't be run again with the new weights; "
                    "modify a copy, or use feedback='open_loop'"
                )

    def run(self, grad: bool = False, trace: Retrace | None = None) -> None:
        """Run the module again, without the autocast weight cache; with ``grad``, record it."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, (enabled, dtype) in self.autocast.items():
                # A cached half-precision copy of a weight would be the old weight's.
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            if self.compiled:
                stack.enter_context(as_written())
            if trace is not None:
                stack.enter_context(trace)
            self.module(*self.args, **self.kwargs)
        if trace is not None:
            trace.check()


def set_training(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    """Set the training flags that differ; setting one is slow."""
    for module, flag in zip(modules, flags, strict=True):
        if module.training is not flag:
            module.training = flag


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Leave buffers, training flags and generators as they are before the block: see `preserve`."""
    with ALONE, Undoing() as undoing:
        preserve(undoing, list(model.modules()))
        yield


def preserve(undoing: Undoing, modules: Sequence[nn.Module]) -> None:
    """Note buffers, training flags and generators, to be put back.

    From here on the network works on copies of the buffers: a graph that still lives may hold the
    originals, and would notice even a write of the same values.

    Args:
        undoing: Puts them back.
        modules: All modules of a network.
    """
    buffers = buffers_of(modules)
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers}
    training = [module.training for module in modules]
    outside = Randomness.capture()
    fused = torch.backends.mha.get_fastpath_enabled()

    def restore() -> None:
        torch.backends.mha.set_fastpath_enabled(fused)
        set_training(modules, training)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        outside.restore()

    undoing.add(restore)
    for module, name, buffer in buffers:
        module._buffers[name] = copies[id(buffer)]
    # Without gradients torch's encoder layers would run one fused function instead of their parts.
    torch.backends.mha.set_fastpath_enabled(False)


class Stopped(BaseException):
    """Ends a replay's thread when another part of the step has failed."""


@dataclass
class Replay:
    """A call being run again, one layer at a time.

    Args:
        call: What to run.
        trace: Sees its calls of torch functions, where what crosses the layers is asked for.
        again: Layers that run more than once: only the first time they are reached counts.
        order: The layers as the nominal pass has called them, and whether under gradients: a call
            without (a target, a pass for statistics) is no time step.
        grad: The model takes gradients on the way.
        arrive: With a single replay, called in place where a layer is reached; None runs the
            call in a thread of its own that waits at each layer (autocast and grad mode are the
            thread's; only one thread runs at any moment).
    """

    call: Call
    arrive: Callable[[str, Tensor], None] | None = None
    trace: Retrace | None = None
    again: frozenset[str] = frozenset()
    order: Iterator[tuple[str, bool]] | None = None
    grad: bool = False
    met: set[str] = field(default_factory=set)
    at: tuple[str, Tensor] | None = None
    error: BaseException | None = None
    done: bool = False
    stopped: bool = False
    random: Randomness | None = None
    kept: Kept = field(default_factory=list)
    thread: threading.Thread | None = None
    here: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    there: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def prepare(self) -> None:
        """Set the global state to what the call saw."""
        (self.random or self.call.randomness).restore()
        if self.thread is None:
            with torch.no_grad():
                for module, name, saved in self.call.buffers:
                    buffer = module._buffers[name]
                    if buffer is not None and buffer.shape == saved.shape:
                        buffer.copy_(saved)
                    else:  # another one has taken its place
                        module._buffers[name] = saved.clone()
        set_training(self.call.inside, self.call.training)
        for where, values in self.kept:
            where.update(values)

    def run_in_place(self) -> None:
        """Run the whole call, with ``arrive`` called at each layer."""
        self.prepare()
        self.call.run(self.grad, self.trace)

    def advance(self) -> None:
        """Run until the next layer or the end; ``at`` is where it stands."""
        self.at = None
        self.prepare()
        if self.thread is None:
            self.thread = threading.Thread(target=self._body, daemon=True)
            self.thread.start()
        else:
            self.there.release()
        self.here.acquire()
        self.random = Randomness.capture()
        self.kept = kept_on(self.call.inside)  # the next pass puts its own there
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End a thread that waits at a layer."""
        if self.thread is not None and not self.done:
            self.stopped = True
            self.there.release()
            self.thread.join()

    def reach(self, name: str, x: Tensor) -> None:
        """Called by the layer's hook, in the replay's own thread.

        Raises:
            UnsupportedModelError: The nominal pass has called another layer here.
        """
        if self.order is not None:
            known, counts = next(self.order, ("", False))
            if known != name:
                raise UnsupportedModelError(
                    "the model took another path when run again: it reached "
                    f"'{name}' where it had called {repr(known) if known else 'no layer'}; use "
                    "feedback='open_loop'"
                )
            if not counts:
                return
        if name in self.met and name in self.again:
            return
        self.met.add(name)
        if self.arrive is not None:
            self.arrive(name, x)
            return
        self.at = (name, x)
        self.here.release()
        self.there.acquire()
        if self.stopped:
            raise Stopped

    def begin(self, name: str, module: nn.Module, x: Tensor) -> None:
        """A layer that runs as a function is reached."""
        self.reach(name, x)

    def end(self, name: str, module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        """It has computed h."""
        return h

    def _body(self) -> None:
        """The thread: what goes wrong in it is raised in `advance`."""
        try:
            self.call.run(self.grad, self.trace)
        except Stopped:
            pass
        except BaseException as error:  # handed over, never swallowed
            self.error = error
        finally:
            self.done = True
            self.here.release()


def interleave(
    replays: Mapping[int, Replay],
    meet: Callable[[str, dict[int, Tensor]], None],
    running: list[Replay],
) -> None:
    """Run several calls, stopping all of them at every layer.

    Args:
        replays: The calls by number.
        meet: Called once a layer with the state that each call has brought there.
        running: Holds the replay that is running, for the layers' hooks.

    Raises:
        UnsupportedModelError: The calls reach different layers.
    """

    def stop() -> None:
        for replay in replays.values():
            replay.stop()

    try:
        while True:
            for replay in replays.values():
                running[:] = [replay]
                replay.advance()
            names = {replay.at[0] if replay.at else None for replay in replays.values()}
            if len(names) > 1:
                raise UnsupportedModelError(
                    "the accumulated passes reach different layers "
                    f"({', '.join(sorted(str(n) for n in names))}); accumulate passes that run "
                    "the same layers, or use feedback='open_loop'"
                )
            (name,) = names
            if name is None:
                return
            meet(name, {i: replay.at[1] for i, replay in replays.items() if replay.at})
    finally:
        insist(stop)
