# SPDX-License-Identifier: MIT
"""What a recorded call is told by, and whether it can be run again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_leaves

from ddpnopt.captured.tracing import Tracer
from ddpnopt.curvature import Curvature
from ddpnopt.hyperparameters import hashable
from ddpnopt.inert import Hook
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor


@dataclass(frozen=True, eq=False)
class Work:
    """What one call is to do.

    Attributes:
        kind: What a record depends on besides the numbers.
        inputs: Tensors that differ from call to call, None where there is none.
        written: Does it as it is written.
        traced: Inputs, and what does it with them while it is taken down.
        generator: State of torch's generator that random numbers are drawn from; None: none are.
    """

    kind: Hashable
    inputs: Sequence[Tensor | None]
    written: Callable[[], Any]
    traced: Callable[[], tuple[Sequence[Tensor | None], Callable[[], Any]]]
    generator: Tensor | None = None

    def of(self, changed: Callable[[Tensor], Tensor]) -> Work:
        """The same with other inputs."""
        return replace(self, inputs=[None if t is None else changed(t) for t in self.inputs])


def check_optimizer(optimizer: object) -> None:
    """Refuse what has no records.

    Raises:
        TypeError: The optimizer is none of this package.
    """
    if not isinstance(optimizer, Shell):
        raise TypeError(
            f"capture: expected a DDPNOpt or a Feedback, got {type(optimizer).__name__}; torch's "
            "own optimizers have torch.compile and CUDA graphs of their own"
        )


def kind_of(leaf: Any) -> Any:
    """What a program depends on of an argument: its value where it is no tensor."""
    if isinstance(leaf, torch.Tensor):
        strides = leaf.stride() if leaf.layout == torch.strided else leaf.layout
        layout = leaf.shape, strides, leaf.is_neg(), leaf.is_conj()
        return type(leaf), layout, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def copied(leaf: Any) -> Any:
    """A tensor's copy, where it has the same layout."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    copy = leaf.detach().clone()
    return copy if copy.stride() == leaf.stride() else leaf


def autocast_of(inputs: Sequence[Tensor]) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on for a batch, and to what."""
    kind = inputs[0].device.type if inputs else "cpu"
    on = torch.is_autocast_enabled(kind)
    return on, torch.get_autocast_dtype(kind) if on else None


def has_hooks(optimizer: Shell) -> bool:
    """Whether something is to be called with every step."""
    every = (optimizer, *getattr(optimizer, "optimizers", ()))
    own = any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in every)
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def hooked(modules: Iterable[nn.Module]) -> nn.Module | None:
    """A module with hooks that are not the library's own."""
    for module in modules:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        backward = module._backward_hooks or module._backward_pre_hooks
        if backward or not all(isinstance(hook, Hook) for hook in hooks):
            return module
    return None


def kind_of_step(optimizer: Shell, known: Mapping[Tensor, Curvature]) -> Hashable:
    """What the coming step does that not every step does; None where that is not settled yet.

    Args:
        optimizer: The optimizer.
        known: Its parameters' curvatures; in order, so that each kind is somebody's.
    """
    state = optimizer.state
    kinds = tuple(
        curvature.kind(state[p]) if p in state else "new"
        for p, curvature in known.items()
        if p.requires_grad
    )
    return None if None in kinds else kinds


def look_again(tracer: Tracer, made: Any, others: Sequence[Tensor]) -> None:
    """Refuse what only shows when the iteration is over."""
    plain = (torch.Tensor, int, float, str, type(None))
    odd = next((leaf for leaf in tree_leaves(made) if not isinstance(leaf, plain)), None)
    if odd is not None:
        tracer.refuse(f"the loss function returns a {type(odd).__name__}")
    if any(p.grad is not None for p in others):
        tracer.refuse("parameters that are not the optimizer's get gradients")
    if tracer.strangers():
        tracer.refuse("a tensor is made out of sight, as with several passes in closed loop")
    if tracer.constants_change():
        tracer.refuse("a tensor made from numbers alone is changed in place")


def settings_of(optimizer: Shell, modules: Iterable[nn.Module]) -> list[Any]:
    """What makes records void when it changes."""
    engine = optimizer.engine
    settings: list[Any] = [m.training for m in modules]
    settings += [engine.recorder is None, engine.waiting]
    for group in optimizer.param_groups:
        settings += [(id(p), p.requires_grad) for p in group["params"]]
        settings += [_value(v) for name, v in group.items() if name not in ("params", "lr")]
    return [*settings, optimizer.diagnose, optimizer.options]


def _value(option: Any) -> Any:
    """An option as it is now: a dictionary may be changed in place."""
    return hashable(option) if isinstance(option, dict) else option


def parameters_of_others(optimizer: Shell, modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters of the model that some other optimizer trains, if any does."""
    own = {id(p) for p in optimizer.engine.parameters()}
    return [p for m in modules for p in m.parameters(False) if id(p) not in own]


def hint(optimizer: Shell) -> str:
    """The usual reason, where an optimizer is wrapped."""
    unfused = [
        group
        for group in optimizer.param_groups
        if "fused" in group and not (group["fused"] or group.get("capturable"))
    ]
    return "; make the wrapped optimizer with fused=True" if unfused else ""


def first_line(error: Exception) -> str:
    """Of an error's message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
