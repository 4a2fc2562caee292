# SPDX-License-Identifier: MIT
"""A mode of torch functions that sees the calls of a pass, and stays out of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from ddpnopt.functional import COMPOSITE, Layers, product, unfolded
from ddpnopt.parameters import identity
from ddpnopt.typing import Tensor

#: Attributes of a tensor that are functions of it.
VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
#: Methods that only tell something about a tensor.
QUERIES = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "type"}
    | {"is_contiguous", "is_floating_point", "is_complex", "element_size", "get_device", "__len__"}
    | {"detach", "__hash__", "__bool__", "item", "tolist", "data_ptr", "__repr__", "__format__"}
    | {"register_hook", "retain_grad", "requires_grad_", "backward", "is_inference", "numpy"}
)
#: What is asked of a tensor's gradient, which there is none of when a pass is run again.
OF_GRADIENTS = frozenset({"requires_grad", "is_leaf", "retain_grad", "register_hook"})
#: Functions that take gradients.
DIFFERENTIATING = frozenset({torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward})
#: Operators that write to their first argument; methods that do end in an underscore.
WRITING = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"}
    | {"__ifloordiv__", "__imod__", "__ipow__"}
)

#: Nobody watches.
NOTHING = nullcontext()


class Quiet(TorchFunctionMode, ABC):
    """A mode that can be switched off where it stands: one left behind does no harm."""

    on = True
    #: Layers that run as functions, by the identity of their weight, and who is told.
    functional: Mapping[int, tuple[str, nn.Module]] = {}
    layers: Layers | None = None

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module] | None:
        """The layer that a product with this weight is, with its name; None if it is none."""
        return self.functional.get(identity(weight))

    def _product(
        self, x: Tensor, layer: tuple[str, nn.Module], func: Any, args: Any, kwargs: Any
    ) -> Any:
        """A layer runs as a function."""
        assert self.layers is not None
        name, module = layer
        with quiet(self):
            self.layers.begin(name, module, x)
        made = self.call(func, args, kwargs)
        with quiet(self):
            return self.layers.end(name, module, x, made)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function; what is only asked of a tensor is no call."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.on and func in COMPOSITE:
            with self:
                return unfolded(func)(*args, **kwargs)
        if self.on and self.layers is not None:
            given = product(func, args, kwargs)
            layer = self.dense(given[1], given[2]) if given is not None else None
            if given is not None and layer is not None and isinstance(given[0], Tensor):
                return self._product(given[0], layer, func, args, kwargs)
        if name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")
            if attribute in OF_GRADIENTS and self.on:
                return self.asked(func, attribute, args, kwargs)
            if attribute not in VIEWS:
                return func(*args, **kwargs)
        elif self.on and (name in OF_GRADIENTS or func in DIFFERENTIATING):
            return self.asked(func, name, args, kwargs)
        elif name in QUERIES or name == "__set__":
            return func(*args, **kwargs)
        return self.call(func, args, kwargs) if self.on else func(*args, **kwargs)

    @abstractmethod
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that computes."""

    @abstractmethod
    def asked(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """The model asks something of a tensor's gradient, or takes gradients on the way."""

    def leave_stack(self) -> None:
        """Stand no more in the stack of modes, wherever that is."""
        if all(mode is not self for mode in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            return
        above = []
        while (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def quiet(watch: Quiet | None) -> AbstractContextManager[None]:
    """Within the block calls of our own are not watched."""
    return NOTHING if watch is None or not watch.on else _unwatched(watch)


@contextmanager
def _unwatched(watch: Quiet) -> Iterator[None]:
    # An interrupt may drop this before its block begins; it is closed when it is collected, and
    # must not put back then what an outer one, which has ended, had made of it.
    listening = torch._C._is_torch_function_enabled()
    watch.on = False
    try:
        with torch._C.DisableTorchFunction() if listening else NOTHING:  # or calls would ask
            yield
    finally:
        watch.on = True


def overwritten(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a call is going to write to, if it says so by its name or an argument."""
    name = getattr(func, "__name__", "")
    writes = name in WRITING or (name[-1:] == "_" and name[-2:] != "__" and name != "detach_")
    if not (writes or kwargs.get("inplace") is True):
        return None
    first = args[0] if args else kwargs.get("input")
    return first if isinstance(first, Tensor) else None


def results(made: Any, first: Tensor | None) -> Sequence[Tensor]:
    """What a call has made: its result, or what it has written to if it returns nothing."""
    return floating(first if made is None and first is not None else made)


def rebuilt(value: Any, parts: list[Any]) -> Any:
    """A tuple or list of the same kind with other members."""
    make = getattr(value, "_make", type(value))
    return make(parts)


def floating(made: Any) -> Sequence[Tensor]:
    """The floating-point tensors in a call's result, in order."""
    if isinstance(made, Tensor):
        return (made,) if made.is_floating_point() or made.is_complex() else ()
    if isinstance(made, tuple | list):
        return [t for one in made for t in floating(one)]
    return ()
