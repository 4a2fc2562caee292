# SPDX-License-Identifier: MIT
"""The networks and the optimizers that the benchmarks compare.

Every optimizer is one row of `VARIANTS`; every network one row of `NETS`. Data are random: the cost
of a step does not depend on what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Net:
    """A network of the benchmark.

    Attributes:
        title: how the tables name it.
        build: makes the freshly initialised module.
        input_shape: shape of one sample.
        batch: samples in a step.
    """

    title: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch: int

    def data(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """One batch: inputs (batch, *input_shape), standard normal, and labels (batch,)."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, *self.input_shape, generator=generator)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        return x.to(device), y.to(device)


@dataclass(frozen=True)
class Variant:
    """An optimizer of the benchmark, with what else belongs to its training step.

    Attributes:
        make: makes the optimizer for a module.
        clip: maximal gradient norm for `clip_grad_norm_` before the step; None: not called.
        nets: numbers of the nets on which it is affordable and meaningful.
    """

    make: Callable[[nn.Module], torch.optim.Optimizer]
    clip: float | None = None
    nets: tuple[int, ...] = (1, 2, 3)


def dense_net(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """Dense layers of the given widths with an activation between every two of them."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def conv_net() -> nn.Sequential:
    """Four 3x3 convolutions of 32 channels, pooling by 2 and by 4, dense 512-64-10."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


NETS: Mapping[int, Net] = {
    1: Net(
        "64-32x4-10 Tanh",
        lambda: dense_net((64, 32, 32, 32, 32, CLASSES), nn.Tanh),
        (64,),
        batch=32,
    ),
    2: Net(
        "784-512x4-10 ReLU",
        lambda: dense_net((784, 512, 512, 512, 512, CLASSES), nn.ReLU),
        (784,),
        batch=128,
    ),
    3: Net("4 conv 32 + 512-64-10 ReLU", conv_net, (3, 32, 32), batch=128),
}


@dataclass(frozen=True)
class _DDP:
    """Factory of a `DDPNOpt`; imports the library late, so that torch's rows run without it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    value: str | None = None

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        import ddpnopt

        value = {"value": ddpnopt.PAPER} if self.value == "paper" else {}
        if self.value not in (None, "paper"):
            value = {"value": self.value}
        return ddpnopt.DDPNOpt(model, **{"lr": 0.05, **value, **self.options})


@dataclass(frozen=True)
class _Own:
    """Factory of another optimizer of the library, by its name there."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        import ddpnopt

        made: torch.optim.Optimizer = getattr(ddpnopt, self.name)(model, **self.options)
        return made


BASELINE = "SGD"

VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(lambda m: torch.optim.SGD(m.parameters(), lr=0.05)),
    "SGD + clip": Variant(lambda m: torch.optim.SGD(m.parameters(), lr=0.05), clip=1.0),
    "SGD momentum": Variant(lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "Adam": Variant(lambda m: torch.optim.Adam(m.parameters(), lr=1e-3)),
    "RMSprop": Variant(lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3)),
    "DDPNOpt off": Variant(_DDP({"feedback": False})),
    "DDPNOpt open loop": Variant(_DDP({"feedback": "open_loop"})),
    "DDPNOpt closed loop": Variant(_DDP()),
    "DDPNOpt closed, no weight grads": Variant(_DDP({"weight_gradients": False})),
    "DDPNOpt open, no weight grads": Variant(
        _DDP({"feedback": "open_loop", "weight_gradients": False})
    ),
    "DDPNOpt closed, gram exact": Variant(_DDP({"gram": "exact"}), nets=(3,)),
    "DDPNOpt closed, gram sketch": Variant(_DDP({"gram": "sketch"}), nets=(3,)),
    "DDPNOpt RMSprop open loop": Variant(
        _DDP({"lr": 1e-3, "curvature": "rmsprop", "feedback": "open_loop"})
    ),
    "DDPNOpt RMSprop closed loop": Variant(_DDP({"lr": 1e-3, "curvature": "rmsprop"})),
    "DDPNOpt gauss_newton": Variant(_DDP(value="gauss_newton")),
    "DDPNOpt PAPER": Variant(_DDP(value="paper")),
    "DDPNOpt low_rank": Variant(_DDP(value="low_rank")),
    "DDPNOpt dense": Variant(_DDP(value="dense"), nets=(1,)),
    "KFAC": Variant(_Own("KFAC")),
    "EKFAC": Variant(_Own("EKFAC")),
    "SGD-VGR": Variant(_Own("SGDVGR")),
    "E-MSA": Variant(_Own("EMSA"), nets=(1,)),
    "vanilla DDP": Variant(_Own("VanillaDDP"), nets=(1,)),
    "DDPNOpt second order": Variant(
        _DDP({"value": {"name": "dense", "dynamics": "second_order"}}), nets=(1,)
    ),
}
