# SPDX-License-Identifier: MIT
"""Takes down every operator of an iteration as it runs: forward pass, backward pass and step."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ddpnopt.captured.program import Call, Value, drawn, mutated
from ddpnopt.typing import Tensor

aten = torch.ops.aten
#: What gives the same memory under another name.
SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
#: What reads numbers without an operator.
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
#: Types whose operators are seen as what they are.
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Reads(TorchFunctionMode):
    """Sees numbers being read that are read by no operator.

    Args:
        tracer: Is told.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        split = func in (torch.tensor_split, torch.Tensor.tensor_split)
        if func in READS or (split and isinstance((*args, None)[1], torch.Tensor)):
            self._tracer.refuse(f"a number is read from a tensor ({_place()})")
        return func(*args, **(kwargs or {}))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that run within the block, and on which tensors.

    Attributes:
        calls: The operators in order, without those of tensors that were made from numbers alone.
        externals: Tensors that were there before, or are such constants.
        half: Some tensor has half precision.
        random: Numbers are drawn from the CPU's default generator.
        postponed: Why this iteration is not a usual one; empty if it is.
        refusal: Why the operators can't be run again in place of the code; empty if they can.
        ends: How many operators had run when a phase had ended.

    Args:
        draws: They may draw: the generator's state before them is known at every run.
    """

    def __init__(self, draws: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self.random = draws, False
        self.calls: list[Call] = []
        self.externals: dict[Value, Tensor] = {}
        self.half = False
        self.postponed = self.refusal = ""
        self.ends: list[int] = []
        self._conditions: list[tuple[Tensor, bool]] = []
        self._values = WeakIdKeyDictionary()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._literals: set[Value] = set()
        self._given: set[Value] = set()
        self._deciding = False
        self._count = 0
        # Not by isinstance, which asks objects that only stand for others.
        self._before = {id(t): weakref.ref(t) for t in gc.get_objects() if type(t) in PLAIN}

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that what comes is known to use."""
        self._given.update(map(self.value, tensors))

    def refuse_others(self, known: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Refuse tensors from before that are neither given nor known.

        Args:
            known: Tensors that stay the same.
            made: What is asked for.
        """
        told = self._given | self._literals | {self.value(t) for t in known}
        used = {v for call in self.calls for v in call.inputs} | set(map(self.value, made))
        if any(v in used and v not in told for v in self.externals):
            self.refuse("it uses a tensor that is neither the model's nor the pass's")

    def value(self, t: Tensor) -> Value:
        """What stands for a tensor; one that is not known was there before."""
        if t not in self._values:
            self.externals[self._new(t)] = t
        found: Value = self._values[t]
        return found

    def decide(self, condition: Tensor) -> bool:
        """The value of a boolean tensor, which becomes a condition."""
        self._deciding = True
        try:
            holds = bool(condition)
        finally:
            self._deciding = False
        if not self.refusal:
            self._conditions.append((condition, holds))
        return holds

    def conclude(self) -> Tensor:
        """Whether all decisions are as they were; to be called within the block, at its end."""
        if self.refusal or not self._conditions:
            return torch.ones((), dtype=torch.bool)
        return torch.stack([c if holds else ~c for c, holds in self._conditions]).all()

    def postpone(self, why: str) -> None:
        """This iteration is not to be run again."""
        self.postponed = why

    def phase_ends(self) -> None:
        """A phase of the iteration has ended."""
        self.ends.append(len(self.calls))

    def strangers(self) -> bool:
        """Whether a tensor was used that was not there before, and was made out of sight."""
        known = {
            v.storage for v, t in self.externals.items() if v in self._literals or self._old(t)
        }
        return any(v.storage not in known for v in self.externals)

    def constants_change(self) -> bool:
        """Whether a tensor that was made from numbers alone, once, is written to."""
        constant = {v.storage for v in self.externals if v in self._literals}
        return not constant.isdisjoint(self.written())

    def written(self) -> set[int]:
        """The storages that operators write to."""
        return {v.storage for call in self.calls for v in call.written}

    def _old(self, t: Tensor) -> bool:
        before = self._before.get(id(t))
        return before is not None and before() is t

    def refuse(self, why: str) -> None:
        """The first reason stands."""
        self.refusal = self.refusal or why

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        self._judge(func, args, kwargs)
        if self.refusal:
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        named = tree_map(self._named, (args, kwargs))
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if any(t.layout != torch.strided for t in results):
            self.refuse("a tensor is sparse")
            return out
        if func in SAME:
            self._values[out] = self.value(inputs[0])
            if func is aten.lift_fresh.default:
                self._literals.add(self._values[out])
            return out
        varies = mutated(func) or drawn(func)
        if inputs and not varies and all(self._values[t] in self._literals for t in inputs):
            for t in results:
                self._literals.add(self.value(t))
            return out
        for t in results:
            self.half = self.half or t.dtype in (torch.float16, torch.bfloat16)
            if t not in self._values:
                self._new(t)
        made = tree_map(self._named, out)
        self.calls.append(Call(func, named[0], named[1], made))
        return out

    def _named(self, leaf: Any) -> Any:
        return self.value(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _new(self, t: Tensor) -> Value:
        storage = t.untyped_storage()
        key = storage._cdata
        # The weak reference keeps the address from being used again.
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage), self._count  # type: ignore[no-untyped-call]
        number = self._storages[key][1]
        found = Value(self._count, number, t.dim())
        self._values[t] = found
        self._count += 1
        return found

    def _judge(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse what depends on more than the tensors that it is given."""
        if self.refusal:
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        strange = next((t for t in tensors if type(t) not in PLAIN), None)
        if strange is not None:
            self.refuse(f"a tensor is a {type(strange).__name__}")
        elif any(t.layout != torch.strided for t in tensors):
            self.refuse("a tensor is sparse")
        elif drawn(func) and not _certain(func, args, kwargs):
            usual = kwargs.get("generator") is None and all(t.device.type == "cpu" for t in tensors)
            self.random = True
            if not (self._draws and usual):
                self.refuse(f"random numbers are drawn ({func.__name__}, {_place()})")
        elif torch.Tag.data_dependent_output in func.tags and not self._deciding:
            self.refuse(f"a number is read from a tensor ({_place()})")
        elif torch.Tag.dynamic_output_shape in func.tags and _by_mask(func, tensors[1:]):
            self.refuse(f"a shape depends on numbers ({func.__name__}, {_place()})")


def _certain(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator that may drop something drops nothing."""
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and given.get("dropout_p", 0.0) == 0


def _by_mask(func: Any, indices: Sequence[Tensor]) -> bool:
    """Whether an operator's shape depends on numbers, which indexing by places does not."""
    if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return True
    return any(t.dtype in (torch.bool, torch.uint8) for t in indices)


def _place() -> str:
    """Where in the code that is, for messages: the innermost line that is not torch's."""
    own, inside = Path(__file__).parent, Path(torch.__file__).parent
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = Path(frame.filename)
        if own not in path.parents and inside not in path.parents and path.exists():
            return f"{path.name}:{frame.lineno}"
    return "inside torch"
