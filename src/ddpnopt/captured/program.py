# SPDX-License-Identifier: MIT
"""A traced iteration as a straight line of operators, and as a function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from ddpnopt.captured.formulas import FORMULAS, FUSED
from ddpnopt.typing import Tensor

aten = torch.ops.aten
#: Places of arguments that operators write to without their schema's saying so: running statistics.
UNDECLARED: dict[Any, tuple[int, ...]] = {
    getattr(aten, name).default: (3, 4)
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
}


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program.

    Attributes:
        index: Its number.
        storage: Equal for tensors that share memory.
        dim: Its number of dimensions.
    """

    index: int
    storage: int
    dim: int


@dataclass(frozen=True, eq=False)
class Call:
    """An operator that has run.

    Attributes:
        func: The operator.
        args: Its arguments, tensors as `Value`.
        kwargs: Likewise.
        made: What it returned.
    """

    func: Any
    args: Any
    kwargs: Any
    made: Any

    @property
    def inputs(self) -> list[Value]:
        """The tensors that it is given."""
        return _values((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Value]:
        """The tensors that it returns."""
        return _values(self.made)

    @property
    def written(self) -> list[Value]:
        """The tensors that it writes to."""
        names = [a.name for a in self.func._schema.arguments]
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        writes = [a.name for a in self.func._schema.arguments if _is_write(a)]
        if self.func in FUSED and given.get("grad_scale") is None:
            writes = [name for name in writes if name != "grads"]  # they are only unscaled there
        undeclared = [self.args[place] for place in UNDECLARED.get(self.func, ())]
        return _values([*(given[name] for name in writes if name in given), *undeclared])


def mutated(func: Any) -> bool:
    """Whether an operator writes to an argument."""
    return func in UNDECLARED or any(_is_write(argument) for argument in func._schema.arguments)


def drawn(func: Any) -> bool:
    """Whether an operator may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _values(tree: Any) -> list[Value]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Value)]


class Program:
    """Operators in order, each of which something that remains depends on.

    Args:
        calls: All operators that have run.
        arguments: Values that differ from run to run, in order.
        externals: All other tensors that were there before.
        results: What is asked for.
        scratch: Externals whose contents nobody needs afterwards.

    Attributes:
        calls: Those that are needed.
        externals: Those that they use; what is made from numbers alone, once, among them.
        changed: Tensors from before that every run writes to.
        writes_arguments: So it does to arguments, which are not its own.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        arguments: Sequence[Value],
        externals: dict[Value, Tensor],
        results: Sequence[Value],
        scratch: Iterable[Value] = (),
    ) -> None:
        self.arguments, self.results = list(arguments), list(results)
        remains = {v.storage for v in (*arguments, *externals)} - {v.storage for v in scratch}
        self.calls = _needed(calls, remains, results)
        written = {v.storage for call in self.calls for v in call.written}
        self.externals = dict(externals)
        self._hoist(written)
        read = {v for call in self.calls for v in call.inputs} | set(results)
        self.externals = {v: t for v, t in self.externals.items() if v in read}
        self.changed = {v: t for v, t in self.externals.items() if v.storage in written}
        self.writes_arguments = any(v.storage in written for v in self.arguments)

    def _hoist(self, written: set[int]) -> None:
        """What is made from numbers alone, and never written to, is made once."""
        kept = []
        for call in self.calls:
            varies = call.inputs or drawn(call.func)
            if varies or any(v.storage in written for v in call.outputs):
                kept.append(call)
                continue
            made = call.func(*call.args, **call.kwargs)
            tensors = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            self.externals.update(zip(call.outputs, tensors, strict=True))
        self.calls = kept

    def graph(self, native: bool) -> fx.GraphModule:
        """The program as a function of the arguments and the externals, in order.

        Args:
            native: For operators that are called one by one; else for a compiler.
        """
        return graph_of([*self.arguments, *self.externals], self.calls, self.results, native)


def graph_of(
    given: Sequence[Value], calls: Sequence[Call], results: Sequence[Value], native: bool
) -> fx.GraphModule:
    """Operators in order as a function.

    Args:
        given: Its arguments.
        calls: The operators.
        results: What it returns.
        native: For operators that are called one by one; else for a compiler, and what it returns
            has `_numbers` behind the results.
    """
    graph = fx.Graph()
    nodes = {v: graph.placeholder(f"t{v.index}") for v in given}
    node_of = _called if native else _compiled
    for call in calls:
        args, kwargs = tree_map(
            lambda leaf: nodes[leaf] if isinstance(leaf, Value) else leaf, (call.args, call.kwargs)
        )
        node = node_of(graph, call, tuple(args), kwargs)
        if isinstance(call.made, Value):
            nodes.setdefault(call.made, node)
        elif call.made is not None:
            for place, value in enumerate(call.made):
                if isinstance(value, Value) and value not in nodes:
                    nodes[value] = (
                        node[place]
                        if isinstance(node, list)
                        else graph.call_function(getitem, (node, place))
                    )
    graph.output([nodes[v] for v in (*results, *([] if native else _numbers(calls, results)))])
    return fx.GraphModule(torch.nn.Module(), graph)


def _numbers(calls: Sequence[Call], results: Iterable[Value]) -> list[Value]:
    """Numbers made of numbers, as operators on larger tensors use them.

    Unless it is asked for such a number, too, the compiler works it out again for every few entries
    of the tensors: the powers of Adam's decay rates took longer than all else of an update.
    """
    made: dict[Value, None] = {}
    used = dict.fromkeys(results, False)
    for call in calls:
        numbers = all(v.dim == 0 for v in (*call.inputs, *call.outputs))
        old = {v.storage for v in call.inputs}
        if numbers and call.inputs and not call.written:
            made.update((v, None) for v in call.outputs if v.storage not in old)
        elif any(v.dim for v in call.inputs):  # numbers that are put together are no loop
            used.update((v, True) for v in call.inputs if v in made and v not in used)
    return [v for v, asked in used.items() if asked]


def _needed(calls: Sequence[Call], remains: Iterable[int], results: Sequence[Value]) -> list[Call]:
    """Calls whose outcome is asked for, or written to memory that remains or is read later."""
    live = {v.storage for v in results} | set(remains)
    wanted = set(results)
    kept = []
    for call in reversed(calls):
        writes = any(v.storage in live for v in call.written)
        # What is drawn decides what is drawn after it.
        if writes or drawn(call.func) or any(v in wanted for v in call.outputs):
            kept.append(call)
            wanted.update(call.inputs)
            live.update(v.storage for v in call.inputs)
    return kept[::-1]


#: Operators of one form whose methods take the same arguments.
METHODS = frozenset(
    "view add_ sub_ mul_ div_ pow_ copy_ clamp_ expand new_zeros abs_ sqrt_ fill_ zero_ "
    "reciprocal_ square_ addcmul_ addcdiv_ lerp_ unsqueeze".split()
)


def _called(graph: fx.Graph, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A call by torch's own function of the same name, which takes half the time to call."""
    name = call.func._schema.name.split("::")[1]
    if name in METHODS:
        return graph.call_method(name, args, kwargs)
    found = None if "out" in kwargs else getattr(torch, name, None)
    return graph.call_function(call.func if found is None else found, args, kwargs)


def _compiled(graph: fx.Graph, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as a compiler can fuse it with others."""
    if call.func is aten._foreach_norm.Scalar:
        order = args[1:] or (2,)
        return [graph.call_function(aten.linalg_vector_norm.default, (t, *order)) for t in args[0]]
    alone = kwargs.get("alpha", 1) == kwargs.get("beta", 1) == 1
    if call.func is aten.addmm.default and alone and call.inputs[0].dim == 2:
        product = graph.call_function(aten.mm.default, args[1:])
        # As a sum the compiler would make an `addmm` of it again, which copies the matrix first.
        negative = graph.call_function(aten.neg.default, (product,))
        return graph.call_function(aten.sub.Tensor, (args[0], negative))
    scaled = kwargs.get("grad_scale") is not None or kwargs.get("found_inf") is not None
    if call.func in FUSED and not scaled:
        given = {name: value for name, value in kwargs.items() if value is not None}
        return graph.call_function(FUSED[call.func], args, given)
    return graph.call_function(FORMULAS.get(call.func, call.func), args, kwargs)
