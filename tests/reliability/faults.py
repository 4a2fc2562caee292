# SPDX-License-Identifier: MIT
"""Faults at the n-th torch operation or call of a phase, and everything that must survive them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import ddpnopt
from ddpnopt import DDPNOpt, Feedback, open_loop
from oracles.common import generators
from oracles.effort import effort

BATCH, CLASSES = 6, 3
LIBRARY = str(Path(ddpnopt.__file__).parent)
#: Torch's own wrapper around every optimizer's step, when that is over.
AFTERWARDS = "profiler"


def stride(usual: int) -> int:
    """Distance between two faults; DDPNOPT_FAULTS=1 injects one at every operation."""
    return effort("DDPNOPT_FAULTS", usual, 1 + usual // 8)


class Fault(TorchDispatchMode):
    """Raises instead of the n-th operation that reaches torch's dispatcher; counts them all."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += AFTERWARDS not in str(func)
        if self.count == self.number:
            self.number = -1
            raise self.error(f"injected at {func}")
        return func(*args, **(kwargs or {}))


class Interrupt:
    """Ctrl-C at the n-th place where Python may run a signal's handler.

    Those are the entries of functions and the returns of calls, wherever they are, as long as the
    library is somewhere up the stack.
    """

    def __init__(self, number: int) -> None:
        self.number, self.count, self.fired = number, 0, False

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "c_return"):
            return
        self.count += 1
        # In a generator or a callback of weakref Python itself would swallow it.
        own = frame.f_code.co_name not in ("<genexpr>", "_cb")
        if self.fired or self.count < self.number or not own:
            return
        up: FrameType | None = frame
        while up is not None and not up.f_code.co_filename.startswith(LIBRARY):
            up = up.f_back
        if up is not None:
            self.fired = True
            raise KeyboardInterrupt("injected")

    def __enter__(self) -> Interrupt:
        # An interrupt between the beginning of `with torch._C.DisableTorchFunction()` and its first
        # line is never undone by Python: this guard puts the thread's state back.
        self._guard = torch._C.DisableTorchFunction()
        self._guard.__enter__()
        self._guard.__exit__(None, None, None)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        self._guard.__exit__(None, None, None)


class Residual(nn.Module):
    """Two branches that meet, with a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(5, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.last(h + torch.relu(self.inner(h)))
        return out


class Block(nn.Module):
    """A transformer's block over three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(x)).mean(1))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, CLASSES)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 3),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "cnn": (convolutional, (2, 4, 4)),
    "residual": (Residual, (5,)),
    "transformer": (Block, (3, 5)),
}


def _own(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: DDPNOpt(model, lr=0.1, **options)


def _adamw(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: Feedback(model, torch.optim.AdamW(model.parameters(), 0.01), **options)


def _momentum(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return Feedback(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **options)

    return make


class Handled(torch.optim.AdamW):
    """An optimizer with an open loop; the handle's state counts as its own here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), 0.01)
        self.handle = open_loop(model, self)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "handle": self.handle.state_dict()} if hasattr(self, "handle") else state


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "identity": _own(momentum=0.5),
    "rmsprop": _own(curvature="rmsprop", weight_decay=0.1),
    "adamw": _own(curvature="adamw"),
    "kfac": _own(curvature="kfac", momentum=0.5),
    "ekfac": _own(curvature="ekfac"),
    "low_rank": _own(value="low_rank"),
    "without_gradients": _own(weight_gradients=False),
    "open_identity": _own(feedback="open_loop", momentum=0.5),
    "open_rmsprop": _own(feedback="open_loop", curvature="rmsprop"),
    "open_kfac": _own(feedback="open_loop", curvature="kfac"),
    "feedback_adamw": _adamw(),
    "feedback_momentum": _momentum(),
    "brake": _adamw(mode="brake"),
    "open_feedback": _momentum(feedback="open_loop"),
    "handle": Handled,
}


def equal(a: Any, b: Any) -> bool:
    """To the bit, nested."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


@dataclass
class Rig:
    """A model with its optimizer, and the plain loop in three phases."""

    model: nn.Module
    opt: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, model: str, optimizer: str) -> Rig:
        make, shape = MODELS[model]
        torch.manual_seed(0)
        net = make()
        return cls(net, OPTIMIZERS[optimizer](net), shape)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(BATCH, *self.shape, generator=generator)
        return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def forward(self, seed: int) -> Tensor:
        x, y = self.batch(seed)
        return F.cross_entropy(self.model(x), y)

    def iterate(self, seed: int) -> None:
        self.opt.zero_grad()
        self.forward(seed).backward()
        self.opt.step()

    def step(self) -> None:
        """The optimizer's step; of an open loop beside an optimizer, what comes before it."""
        if isinstance(self.opt, Handled):
            self.opt.handle._before(self.opt, (self.opt,), {})
        else:
            self.opt.step()

    def everything(self) -> dict[str, Any]:
        """A copy of all that a failed phase must leave alone."""
        model = self.model
        inner = getattr(self.opt, "optimizers", [self.opt])
        return {
            "tensors": {k: v.clone() for k, v in model.state_dict().items()},
            "buffers": [id(b) for b in model.buffers()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "wanted": [p.requires_grad for p in model.parameters()],
            "state": copy.deepcopy(self.opt.state_dict()),
            "options": [
                {k: copy.deepcopy(v) for k, v in g.items() if k != "params"}
                for one in inner
                for g in one.param_groups
            ],
            "members": [[id(p) for p in g["params"]] for one in inner for g in one.param_groups],
            **self.surroundings(),
        }

    def surroundings(self) -> dict[str, Any]:
        """What a failed forward or backward pass must leave alone, too."""
        hooked = [
            [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
            for m in self.model.modules()
        ]
        tensors = [
            [len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())]
            for p in self.model.parameters()
        ]
        return {
            "random": generators(),
            "hooks": hooked,
            "tensor_hooks": tensors,
            "modes": len(_get_current_function_mode_stack()),
            "dispatch_modes": len(_get_current_dispatch_mode_stack()),
            "training": [m.training for m in self.model.modules()],
            "grad_enabled": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "fused": torch.backends.mha.get_fastpath_enabled(),
        }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What has changed."""
    return [name for name in before if not equal(before[name], after[name])]
