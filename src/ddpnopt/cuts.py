# SPDX-License-Identifier: MIT
"""Temporary hooks on the layers of a replay: what reaches a layer, and the pass cut there.

Cut at its layers, a network falls apart into the functions between them. One more pass gives all of
them at once, each with a graph of its own: the dynamics x' = f(x, u) of every time step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpnopt.arguments import ordered, tensors_of
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import Hook, Probing
from ddpnopt.layers import rule_for
from ddpnopt.modes import Quiet, quiet
from ddpnopt.replay import Replay, preserved
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.typing import Tensor
from ddpnopt.undoing import Undoing

#: Modules without memory or randomness: each a fixed function of the one tensor it is given.
PURE = frozenset(
    {nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d}
    | {nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU}
    | {nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink}
)


def hook_replays(
    undoing: Undoing,
    modules: Mapping[str, nn.Module],
    reach: Callable[[str, Tensor], None],
    watch: Callable[[], Quiet | None] = lambda: None,
) -> None:
    """Call ``reach(name, x)`` with the state before each of the modules computes.

    Args:
        undoing: Takes the hooks off.
        modules: The layers by name.
        reach: What to call; ``watch()`` does not see what it does.
        watch: Sees the calls of the replay that is running.
    """

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        with quiet(watch()):
            inputs = tensors_of(ordered(module, args, kwargs))
            rule = rule_for(module)
            reach(name, rule.pack(module, inputs) if rule is not None else inputs[0])

    for name, module in modules.items():
        hook = partial(before, name)
        undoing.add(partial(_unhook, module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take a hook off without its handle, which an interrupt may have lost."""
    for number in [n for n, one in module._forward_pre_hooks.items() if one is hook]:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


@contextmanager
def hooked_outputs(module: nn.Module, reach: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block call ``reach(h)`` with what the module returns."""

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        reach(output)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@dataclass(eq=False)
class Cut:
    """One time step of a pass that was cut at its layers.

    Attributes:
        stage: The layer.
        x: Its state, a leaf of the step's graph.
        h: Its output: a leaf of the graph of `end` (cut there, too), or computed from x.
        end: The next layer's state, or the model's output at the last layer.
    """

    stage: Stage
    x: Tensor
    h: Tensor
    end: Tensor


class _Reached(Exception):
    """Ends a replay where the rest of the model is not needed."""


class _Cutter:
    """Cuts one replay; see `cut`."""

    def __init__(self, stages: Sequence[Stage], outputs: bool) -> None:
        self.stages, self.outputs = list(stages), outputs
        self.states: list[Tensor] = []
        self.h: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.until = len(self.stages)
        self.put: tuple[int, Tensor] | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A layer is reached: the step before it ends here, and a new one begins."""
        at = len(self.states)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        expected = self.stages[at].module if at < len(self.stages) else None
        if module is not expected or len(inputs) != 1 or not args:
            raise UnsupportedModelError(
                "the model can't be cut into time steps: it takes another path when run again, or "
                f"a layer ({type(module).__name__}) is called with more than one state"
            )
        if at:
            self.ends.append(inputs[0])
        if at == self.until:
            raise _Reached
        x = inputs[0].detach().requires_grad_(inputs[0].is_floating_point())
        self.states.append(x)
        # A layer may overwrite what it is given; the leaf itself must stay.
        return (x.clone(), *args[1:]), kwargs

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A layer has computed."""
        if self.put is not None and self.put[0] == len(self.h):
            output = self.put[1]
        elif self.outputs:
            output = output.detach().requires_grad_()
        self.h.append(output)
        if len(self.h) == len(self.stages):
            self.ends.append(output)
        return output.clone()


@contextmanager
def _hooked(stages: Sequence[Stage], cutter: _Cutter) -> Iterator[None]:
    with ExitStack() as stack:
        for module in {id(s.module): s.module for s in stages}.values():
            before = module.register_forward_pre_hook(cutter.before, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(cutter.after).remove)
        yield


def cut(
    trajectory: Trajectory, model: nn.Module, outputs: bool, until: int | None = None
) -> list[Cut]:
    """Run a recorded call again with every layer's state (and output) cut from what is before.

    Args:
        trajectory: The pass; its weights must be those of the pass.
        model: The recorded model, whose buffers and generators are left as they are.
        outputs: Cut behind the layers, too: `Cut.h` is a leaf.
        until: Stop where this stage is reached: what lies behind is not run.

    Returns:
        The steps of the layers that were reached, in order.

    Raises:
        UnsupportedModelError: The call can't be repeated, or takes another path.
    """
    cutter = _Cutter(trajectory.active, outputs)
    cutter.until = len(cutter.stages) if until is None else until
    _run(trajectory, model, cutter)
    found = zip(cutter.stages, cutter.states, cutter.h, cutter.ends, strict=False)
    return [Cut(*parts) for parts in found]


def segment(trajectory: Trajectory, model: nn.Module, at: int, h: Tensor) -> Tensor:
    """The next layer's state if layer ``at`` had the output h; on h's graph.

    Args:
        trajectory: The pass.
        model: The recorded model.
        at: Index among the layers in feedback.
        h: What the layer is to return.

    Raises:
        UnsupportedModelError: The call can't be repeated, or takes another path.
    """
    if at == len(trajectory.active) - 1:
        return h
    cutter = _Cutter(trajectory.active, outputs=False)
    cutter.until, cutter.put = at + 1, (at, h)
    _run(trajectory, model, cutter)
    return cutter.ends[at]


def paths(trajectory: Trajectory) -> list[Sequence[nn.Module] | None]:
    """The modules between a layer and the next, where they are the function that `segment` is.

    That is known of an nn.Sequential (and those inside it), with `PURE` modules between the layers,
    and without hooks of the user's, which may change what the next layer gets.

    Returns:
        One for each layer in feedback, the last one's empty; None where only `segment` will do.
    """
    call, layers = trajectory.again(), [stage.module for stage in trajectory.active]
    found: list[Sequence[nn.Module] | None] = [None] * (len(layers) - 1)
    flat = _flat(call.module)
    autocast = any(enabled for enabled, _ in call.autocast.values())
    if not autocast and not call.kwargs and all(layer in flat for layer in layers):
        at = [flat.index(layer) for layer in layers]
        between = [flat[i + 1 : j] for i, j in itertools.pairwise(at)]
        found = [
            modules if _unhooked(after) and all(type(m) in PURE for m in modules) else None
            for modules, after in zip(between, layers[1:], strict=True)
        ]
    return [*found, ()]


def in_order(module: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Whether a module is known to run these one after another, whatever it is given."""
    flat = set(map(id, _flat(module)))
    return all(id(layer) in flat for layer in layers)


def _flat(module: nn.Module) -> list[nn.Module]:
    """What a module runs, one after another; the module itself where that is not known."""
    if type(module) is not nn.Sequential or "forward" in vars(module):
        return [module]
    parts = [_flat(child) if _unhooked(child) else [child] for child in module]
    return [inner for part in parts for inner in part]


def _unhooked(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return all(isinstance(hook, Hook) for hook in hooks)  # a recorder's own change nothing


def _run(trajectory: Trajectory, model: nn.Module, cutter: _Cutter) -> None:
    call = trajectory.again()
    call.check_inputs()
    with Probing(), preserved(model), torch.enable_grad(), _hooked(trajectory.active, cutter):
        try:
            Replay(call, grad=True).run_in_place()
        except _Reached:
            return  # what was asked for
    if len(cutter.h) < len(cutter.stages):
        raise UnsupportedModelError(
            "the model can't be cut into time steps: it takes another path when run again"
        )
