# SPDX-License-Identifier: MIT
"""Finds the model of an optimizer that was given parameters alone, as frameworks construct it.

The first module that is called with gradients and owns all the parameters is the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpnopt.checks import check_model
from ddpnopt.typing import Tensor


class Unbound(nn.Module):
    """Stands for a model that has not been called yet."""


def model_and_parameters(model: Any, params: Iterable[Any] | None) -> tuple[nn.Module, list[Any]]:
    """What an optimizer is constructed from: a module, its parameters, or both.

    Args:
        model: A module, or what torch's own optimizers take: parameters, named ones, groups.
        params: Of a module: those to optimise.

    Returns:
        The model (`Unbound` where only parameters are given), and the parameters or groups.

    Raises:
        TypeError: Neither, or parameters twice.
        ValueError: The module has no parameters, or not yet initialised ones.
        UnsupportedModelError: The module can't be handled (named).
    """
    if isinstance(model, nn.Module):
        check_model(model)
        return model, list(model.parameters() if params is None else params)
    if (model is None) == (params is None):
        wrong = "nothing" if model is None else "parameters twice"
        raise TypeError(
            f"DDPNOpt: {wrong} given; give it the torch.nn.Module, or its parameters or groups"
        )
    given = params if model is None else model
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(
            f"DDPNOpt(model): expected a torch.nn.Module, or an iterable of parameters or "
            f"parameter groups, got {type(given).__name__}"
        )
    return Unbound(), list(given)


class Binding:
    """Waits for the model's first call.

    Args:
        parameters: What the model has to own.
        found: Called with the model and the positional arguments of the call that has begun; what
            it raises, it raises in that call. Both are held by the binding, which the optimizer
            holds: they must not hold the optimizer.
    """

    def __init__(
        self,
        parameters: Callable[[], list[Tensor] | None],
        found: Callable[[nn.Module, tuple[Any, ...]], None],
    ) -> None:
        self._parameters, self._found = parameters, found
        ref = weakref.ref(self)

        def called(module: nn.Module, args: tuple[Any, ...]) -> None:
            binding = ref()
            if binding is not None:
                binding._look(module, args)

        self._handle = register_module_forward_pre_hook(called)
        weakref.finalize(self, self._handle.remove)

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        wanted = {id(p) for p in self._parameters() or ()}
        if wanted and wanted <= {id(p) for p in module.parameters()}:
            self._found(module, args)
            self.end()  # not before: what is interrupted is found by the next call

    def end(self) -> None:
        """Wait no more."""
        self._handle.remove()


def check_bound(waiting: bool) -> None:
    """Refuse a step whose passes had to be recorded, of a model that is not known yet.

    Raises:
        RuntimeError: So it is.
    """
    if waiting:
        raise RuntimeError(
            "step(): no forward pass was seen of a module that owns all parameters given to the "
            "optimizer. Call one module that owns them all (its parts alone, called from the "
            "loop, can't be run again), or give the optimizer the module: DDPNOpt(model, ...), as "
            "where model.compile() or a compiled function around it keeps its call from being seen"
        )
