# SPDX-License-Identifier: MIT
"""A program made into few kernels by torch's compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from operator import is_
from typing import Any

import torch
from torch import fx

from ddpnopt.captured.formulas import FORMULAS
from ddpnopt.typing import Tensor

#: Entries that are worth another thread, as for torch's own operators; the compiler's bound is 512.
#: Between two kernels threads fall asleep, and to wake one takes longer than a small net's kernel.
MIN_CHUNK = 32768


class Compiled:
    """A straight line of operators, compiled when it is first called.

    By Inductor itself: `torch.compile` would read the program's Python first and ask at every call
    whether it still holds, a fifth of a small net's step. What it would ask, `Plan.current` asks.

    Args:
        graph: The operators.
        arguments: How many of its inputs, the first ones, are not the same tensors in every call;
            they are never written to.
        results: How many of the tensors that it returns, the first ones, are asked for.
    """

    def __init__(self, graph: fx.GraphModule, arguments: int, results: int) -> None:
        self._graph, self._arguments, self._results = graph, arguments, results
        self._run: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
        self._strides: list[tuple[int, ...]] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run it.

        Raises:
            Exception: In the first call, whatever the compiler raises.
        """
        given = list(inputs)
        strides = [t.stride() for t in inputs[: self._arguments]]
        if self._run is None:
            if any(t.device.type != "cpu" for t in given):
                for_gpus(self._graph, self._results)
            made, inner = _compiled(self._graph, given)
            self._run, self._strides = (lambda some: made(*some)), strides
            results, direct = _watched(made, inner, given)
            if direct is not None:
                self._run = direct
            return results[: self._results]
        if strides != self._strides:
            given[: self._arguments] = map(_laid_out, given, self._strides)
        return list(self._run(given)[: self._results])


def for_gpus(graph: fx.GraphModule, results: int) -> None:
    """Undo what is for processors: kernels of GPUs repeat no numbers, and are exact by themselves.

    Args:
        graph: The operators.
        results: How many of the tensors that it returns, the first ones, are asked for.
    """
    operators = {formula: operator for operator, formula in FORMULAS.items()}
    for node in graph.graph.nodes:
        node.target = operators.get(node.target, node.target)
        if node.op == "output":
            node.args = (list(node.args[0])[:results],)
    graph.recompile()


def _compiled(
    graph: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[Callable[..., Sequence[Tensor]], list[Any]]:
    """By Inductor; on CPUs what calls the kernels is C++, too, a quarter of a small net's step.

    Returns:
        The function, and what is called by it in the end: one object, as a rule.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # takes a second

    inner: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(*args, **kwargs))
        return inner[-1]

    options = {
        "cpp_wrapper": all(t.device.type == "cpu" for t in inputs),
        "cpp.min_chunk_size": MIN_CHUNK,
        "fallback_random": True,  # the compiler's own generator draws other numbers
    }
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells of operators that have no C function: nobody's loss
        with _on_disk(compile_fx) as known:
            made = compile_fx(
                graph, list(inputs), inner_compile=noted, config_patches=options, **known
            )
    finally:
        log.setLevel(level)
    assert callable(made)
    run: Callable[..., Any] = made
    return run, inner


@contextmanager
def _on_disk(compile_fx: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Let the compiler look a program up among those that it has kept from earlier processes.

    It does for programs whose shapes it may reason about; these have none that are not numbers.
    What lies above the kernels is made anew: kept, it would be taken for other programs, too, whose
    arguments share memory in another way.

    Yields:
        Further arguments for the compiler: none where it does not know how to be told.
    """
    if "ignore_shape_env" not in signature(compile_fx).parameters:  # an older torch
        yield {}
        return
    from torch._functorch import config  # all of them take a while
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with tracing(context), config.patch(enable_autograd_cache=False):
        yield {"ignore_shape_env": True}


def _watched(
    made: Callable[..., Sequence[Tensor]], inner: list[Any], inputs: list[Tensor]
) -> tuple[list[Tensor], Callable[[list[Tensor]], Sequence[Tensor]] | None]:
    """Run a compiled program for the first time; find what it does below torch's own layers.

    Args:
        made: The program.
        inner: What it calls in the end.
        inputs: Its inputs.

    Returns:
        The results, and what can be called on the inputs instead: they pass through the layers
        above, which take a tenth of a small program's time, as they are, and so do the results.
    """
    kernels = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    if kernels is None:
        return list(made(*inputs)), None
    seen: list[tuple[list[Tensor], Sequence[Tensor]]] = []

    def watching(some: list[Tensor]) -> Sequence[Tensor]:
        given = list(some)  # they are taken out of the list
        seen.append((given, kernels(some)))
        return seen[-1][1]

    inner[0].current_callable = watching
    try:
        results = list(made(*inputs))
    finally:
        inner[0].current_callable = kernels
    same = len(seen) == 1 and _same(seen[0][0], inputs) and _same(seen[0][1], results)
    return results, kernels if same else None


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor in memory as the kernels expect it."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
