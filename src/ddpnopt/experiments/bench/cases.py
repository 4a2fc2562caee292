# SPDX-License-Identifier: MIT
"""The networks and the optimizers that the benchmark compares.

Every optimizer is one row of `VARIANTS`; every network one row of `NETS` or `LARGE`. Data are
random: the cost of a step does not depend on what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import ddpnopt
from ddpnopt.curvature import EKFAC, KFAC
from ddpnopt.experiments.bench import peers

CLASSES = 10
#: The ratios are to this one.
BASELINE = "SGD"


@dataclass(frozen=True)
class Net:
    """A network of the benchmark.

    Attributes:
        title: How the tables name it.
        build: Makes the freshly initialised module.
        input_shape: Shape of one sample.
        batch: Samples in a step.
        loss: (outputs, targets) -> mean loss.
        autocast: Run forward pass and loss in bfloat16 by `torch.autocast`.
    """

    title: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch: int
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    autocast: bool = False

    def objective(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        if not self.autocast:
            return self.loss(model(x), y)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.loss(model(x), y)

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
        make: Makes the optimizer for a module.
        clip: Maximal gradient norm for `clip_grad_norm_` before the step; None: not called.
        nets: Numbers of the nets on which it is affordable and meaningful.
        period: Steps between two refreshes of its curvature: what is timed or counted covers
            whole periods.
        means: Steps until its running means have settled, from when on it can be recorded.
        package: Module that it needs beside ddpnopt's own; None: nothing.
        captured: How its iterations are run: "" as they are written, else by `ddpnopt.capture`:
            "replayed", "compiled", or as plain loops with the "step compiled", or with the passes,
            too ("loop compiled").
    """

    make: Callable[[nn.Module], torch.optim.Optimizer]
    clip: float | None = None
    nets: tuple[int, ...] = (1, 2, 3)
    period: int = 1
    means: int = 20
    package: str | None = None
    captured: str = ""

    @property
    def settle(self) -> int:
        """Steps before anything is timed or counted.

        A DDPNOpt checks its linear maps in its first three; four iterations go before one is
        recorded, and one more is compared. KFAC and EKFAC are recorded once their running means
        have settled, and steps that decompose apart from the others.
        """
        return (8 if self.period == 1 else self.means + 2 * self.period) if self.captured else 4

    @property
    def compiled(self) -> bool:
        """Whether torch's compiler has a part in it."""
        return self.captured.endswith("compiled")

    @property
    def installed(self) -> bool:
        """Whether it can be made here."""
        return self.package is None or find_spec(self.package) is not None


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

#: Nets whose memory is measured, each in a process of its own.
LARGE: Mapping[str, Net] = {
    "dense": Net(
        "4096x6-10 ReLU, 100.7 M parameters",
        lambda: dense_net((*(4096,) * 7, CLASSES), nn.ReLU),
        (4096,),
        batch=64,
    ),
    "chain": Net(
        "50 layers of 256, ReLU",
        lambda: dense_net((*(256,) * 50, CLASSES), nn.ReLU),
        (256,),
        batch=128,
    ),
}
#: The same, of a size that takes a second.
SMALL: Mapping[str, Net] = {
    "dense": Net(
        "512x6-10 ReLU (quick)", lambda: dense_net((*(512,) * 7, CLASSES), nn.ReLU), (512,), 8
    ),
    "chain": Net(
        "50 layers of 32, ReLU (quick)",
        lambda: dense_net((*(32,) * 50, CLASSES), nn.ReLU),
        (32,),
        16,
    ),
}


@dataclass(frozen=True)
class _Torch:
    """Factory of one of torch's optimizers."""

    kind: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind(model.parameters(), **{"lr": 1e-3, **self.options})


@dataclass(frozen=True)
class _DDP:
    """Factory of a `DDPNOpt`."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return ddpnopt.DDPNOpt(model, **{"lr": 0.05, **self.options})


@dataclass(frozen=True)
class _Own:
    """Factory of another optimizer of the library."""

    kind: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind(model, **self.options)


@dataclass(frozen=True)
class _Wrapped:
    """Factory of a torch optimizer with feedback around it."""

    inner: _Torch
    feedback: bool | str

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return ddpnopt.Feedback(model, self.inner(model), feedback=self.feedback)


def _ddp(
    nets: tuple[int, ...] = (1, 2, 3), period: int = 1, means: int = 20, **options: Any
) -> Variant:
    return Variant(_DDP(options), nets=nets, period=period, means=means)


_SGD, _OPEN = torch.optim.SGD, "open_loop"
_FUSED = _Torch(torch.optim.AdamW, {"fused": True})
_MOMENTUM = _Torch(_SGD, {"lr": 0.05, "momentum": 0.9})

VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(_Torch(_SGD, {"lr": 0.05})),
    "SGD + clip": Variant(_Torch(_SGD, {"lr": 0.05}), clip=1.0),
    "SGD momentum": Variant(_MOMENTUM),
    "Adam": Variant(_Torch(torch.optim.Adam)),
    "AdamW": Variant(_Torch(torch.optim.AdamW)),
    "RMSprop": Variant(_Torch(torch.optim.RMSprop)),
    "DDPNOpt off": _ddp(feedback=False),
    "DDPNOpt closed loop": _ddp(),
    "DDPNOpt closed, no weight grads": _ddp(weight_gradients=False),
    "DDPNOpt open loop": _ddp(feedback=_OPEN),
    "DDPNOpt open, no weight grads": _ddp(feedback=_OPEN, weight_gradients=False),
    "DDPNOpt closed, gram sketch": _ddp((3,), gram="sketch"),
    "DDPNOpt open, gram sketch": _ddp((3,), feedback=_OPEN, gram="sketch"),
    "DDPNOpt RMSprop closed loop": _ddp(lr=1e-3, curvature="rmsprop"),
    "DDPNOpt RMSprop open loop": _ddp(lr=1e-3, curvature="rmsprop", feedback=_OPEN),
    "DDPNOpt AdamW closed loop": _ddp(lr=1e-3, curvature="adamw"),
    "Feedback(SGD momentum)": Variant(_Wrapped(_MOMENTUM, True)),
    "Feedback(SGD momentum), open loop": Variant(_Wrapped(_MOMENTUM, _OPEN)),
    "Feedback(AdamW)": Variant(_Wrapped(_Torch(torch.optim.AdamW), True)),
    "Feedback(AdamW), open loop": Variant(_Wrapped(_Torch(torch.optim.AdamW), _OPEN)),
    "AdamW fused": Variant(_FUSED),
    "Feedback(AdamW fused)": Variant(_Wrapped(_FUSED, True)),
    "Feedback(AdamW fused), open loop": Variant(_Wrapped(_FUSED, _OPEN)),
    "DDPNOpt KFAC closed, every 10": _ddp(period=10, curvature=KFAC(update_every=10)),
    "DDPNOpt EKFAC closed, every 10": _ddp(period=10, curvature=EKFAC(update_every=10)),
    "DDPNOpt KFAC closed, statistics every 10": _ddp(
        period=10, means=110, curvature=KFAC(update_every=10, statistics_every=10)
    ),
    "DDPNOpt EKFAC closed, statistics every 10": _ddp(
        period=10, means=110, curvature=EKFAC(update_every=10, statistics_every=10)
    ),
    "DDPNOpt low_rank": _ddp(value="low_rank"),
    "DDPNOpt gauss_newton": _ddp(value="gauss_newton"),
    "DDPNOpt PAPER": _ddp(value=ddpnopt.PAPER),
    "DDPNOpt dense": _ddp((1,), value="dense"),
    "DDPNOpt second order": _ddp((1,), value={"name": "dense", "dynamics": "second_order"}),
    "KFAC, every 10": Variant(_Own(ddpnopt.KFAC), period=10),
    "EKFAC, every 10": Variant(_Own(ddpnopt.EKFAC), period=10),
    "KFAC, statistics every 10": Variant(_Own(ddpnopt.KFAC, {"statistics_every": 10}), period=10),
    "EKFAC, statistics every 10": Variant(_Own(ddpnopt.EKFAC, {"statistics_every": 10}), period=10),
    "SGD-VGR": Variant(_Own(ddpnopt.SGDVGR)),
    "E-MSA": Variant(_Own(ddpnopt.EMSA), nets=(1,)),
    "vanilla DDP": Variant(_Own(ddpnopt.VanillaDDP), nets=(1,)),
    "SOAP, every 10": Variant(peers.soap, period=10, package="pytorch_optimizer"),
    "Shampoo, every 10": Variant(peers.shampoo, period=10, package="pytorch_optimizer"),
    "SINGD dense, every step": Variant(peers.singd, package="singd"),
    "SINGD dense, every 10": Variant(peers.singd_every_10, period=10, package="singd"),
}


#: What `ddpnopt.capture` is measured with; the first is plain SGD, for comparison.
_CAPTURED = (
    "DDPNOpt off",
    "DDPNOpt closed loop",
    "DDPNOpt closed, no weight grads",
    "DDPNOpt open loop",
    "DDPNOpt open, no weight grads",
    "DDPNOpt RMSprop closed loop",
    "DDPNOpt AdamW closed loop",
    "DDPNOpt KFAC closed, every 10",
    "DDPNOpt EKFAC closed, every 10",
    "DDPNOpt KFAC closed, statistics every 10",
    "DDPNOpt EKFAC closed, statistics every 10",
    "DDPNOpt low_rank",
    "Feedback(AdamW fused)",
    "Feedback(AdamW fused), open loop",
)
#: Names of the ways to run what is recorded.
CAPTURES = ("replayed", "compiled", "step compiled", "loop compiled")
VARIANTS = {
    **VARIANTS,
    **{
        f"{name}, {how}": replace(VARIANTS[name], captured=how)
        for name in _CAPTURED
        for how in CAPTURES
    },
}


def chosen(patterns: list[str], net: int) -> dict[str, Variant]:
    """The optimizers to measure on a net, the baseline first; also those not installed.

    Args:
        patterns: Names or shell patterns ("DDPNOpt*"), case ignored; empty: all.
        net: Number of the net.

    Raises:
        ValueError: A pattern fits no optimizer; the message lists them.
    """
    wanted = [p.casefold() for p in patterns]
    for pattern, lower in zip(patterns, wanted, strict=True):
        if not any(fnmatch(name.casefold(), lower) for name in VARIANTS):
            known = ", ".join(VARIANTS)
            raise ValueError(f"--only {pattern!r}: no optimizer of that name; known: {known}")
    return {
        name: variant
        for name, variant in VARIANTS.items()
        if name == BASELINE
        or (
            net in variant.nets
            and (not wanted or any(fnmatch(name.casefold(), pattern) for pattern in wanted))
        )
    }
