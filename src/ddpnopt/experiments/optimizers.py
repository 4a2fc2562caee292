# SPDX-License-Identifier: MIT
"""The optimizers that can be compared: one registry, from names to factories.

An option is a plain value. Options named `value.<option>` and `curvature.<option>` go to
DDPNOpt's value and curvature objects; any optimizer may have what the training loop does to the
gradients: `grad_clip`, the threshold of `torch.nn.utils.clip_grad_norm_`, `unit_clip`, that of
adaptive clipping, and `sharpness`, SAM's radius.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import ddpnopt
from ddpnopt.curvature import CURVATURES
from ddpnopt.experiments.better_rule import clipped, lines
from ddpnopt.experiments.names import call, lookup, split
from ddpnopt.experiments.wrapped_optimizers import INNERS, feedback
from ddpnopt.value import VALUES

#: Options of the training loop, which any optimizer may have.
LOOP_OPTIONS = ("grad_clip", "unit_clip", "sharpness")
OptionValue = bool | int | float | str | None
Options = dict[str, OptionValue]
Factory = Callable[[nn.Module, float, Options], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerChoice:
    """One row of the registry.

    Attributes:
        build: Factory (model, lr, options) -> optimizer.
        label: Name in tables and plots.
        defaults: Options that make up this choice; the user's own options override them.
    """

    build: Factory
    label: str
    defaults: Mapping[str, OptionValue] = field(default_factory=dict)


def _torch(kind: Callable[..., torch.optim.Optimizer]) -> Factory:
    def build(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
        # The multi-tensor kernels cost less Python time on small networks.
        built: torch.optim.Optimizer = call(
            kind, model.parameters(), lr, options={"foreach": True, **options}
        )
        return built

    return build


def _schedule_free(name: str) -> Factory:
    """An optimizer of the package schedulefree, of the extra "frameworks"."""

    def build(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
        try:
            package = importlib.import_module("schedulefree")
        except ImportError as error:
            raise ValueError(f"{name} needs `pip install schedulefree`") from error
        arguments: Options = {"foreach": False, **options}
        built: Any = call(getattr(package, name), model.parameters(), lr, options=arguments)
        built.train()
        assert isinstance(built, torch.optim.Optimizer)
        return built

    return build


def _self_tuned(package: str, name: str) -> Factory:
    """An optimizer of an optional package that finds its rate; `lr` is a factor on that."""

    def build(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
        try:
            kind = getattr(importlib.import_module(package), name)
        except ImportError as error:
            raise ValueError(f"{name} needs `pip install {package}`") from error
        built: torch.optim.Optimizer = call(kind, model.parameters(), lr, options=options)
        return built

    return build


def _averaged(kind: str) -> Factory:
    """Feedback around a schedule-free optimizer, its gain read and not watched."""

    def build(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
        try:
            module = importlib.import_module("ddpnopt.experiments.better_rule.averaged")
        except ImportError as error:
            raise ValueError(f"{kind} needs `pip install schedulefree`") from error
        built: torch.optim.Optimizer = module.averaged(kind)(model, lr, options)
        return built

    return build


def _own(name: str) -> Factory:
    """An optimizer of this library that takes the model and a rate."""

    def build(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = call(getattr(ddpnopt, name), model, lr, options=options)
        return built

    return build


def _emsa(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
    # Its learning rate is 1 / rho: short steps are that times the (preconditioned) gradient.
    arguments: dict[str, Any] = {"rho": 1 / lr if lr else math.inf, **options}
    built: torch.optim.Optimizer = call(ddpnopt.EMSA, model, options=arguments)
    return built


def _ddpnopt(model: nn.Module, lr: float, options: Options) -> torch.optim.Optimizer:
    value_options, rest = split(options, "value")
    curvature_options, rest = split(rest, "curvature")
    arguments: dict[str, Any] = dict(rest)
    value_name = str(arguments.pop("value", "moreau"))
    if value_name == "paper":
        if value_options:
            raise ValueError("value=paper has fixed options; use value=gauss_newton to set them")
        arguments["value"] = ddpnopt.PAPER
    else:
        value = lookup(VALUES, value_name, "value function")
        arguments["value"] = call(value, options=value_options)
    curvature = lookup(CURVATURES, str(arguments.pop("curvature", "identity")), "curvature")
    arguments["curvature"] = call(curvature, options=curvature_options)
    built: torch.optim.Optimizer = call(ddpnopt.DDPNOpt, model, lr, options=arguments)
    return built


def _ddp(label: str, **defaults: OptionValue) -> OptimizerChoice:
    dotted = {k.replace("__", "."): v for k, v in defaults.items()}
    return OptimizerChoice(_ddpnopt, label, dotted)


def _twins() -> dict[str, OptimizerChoice]:
    """DDPNOpt around every borrowed curvature, closed and open loop."""
    twins: dict[str, OptimizerChoice] = {}
    for name, kind in CURVATURES.items():
        if name == "identity":
            continue
        label = f"DDPNOpt {kind.__name__}"
        twins[f"ddpnopt-{name}"] = _ddp(label, curvature=name)
        twins[f"ddpnopt-{name}-open-loop"] = _ddp(
            f"{label} open loop", curvature=name, feedback="open_loop"
        )
    return twins


def _wrapped() -> dict[str, OptimizerChoice]:
    """`ddpnopt.Feedback` around torch's optimizers, closed and open loop."""
    found: dict[str, OptimizerChoice] = {}
    for name, (label, _) in INNERS.items():
        build, key = feedback(name), f"feedback-{name}"
        found[key] = OptimizerChoice(build, f"Feedback({label})")
        open_loop = {"feedback": "open_loop"}
        found[f"{key}-open-loop"] = OptimizerChoice(build, f"open loop ({label})", open_loop)
        brake = {"mode": "brake"}
        found[f"{key}-brake"] = OptimizerChoice(build, f"brake ({label})", brake)
        found[f"{key}-brake-open-loop"] = OptimizerChoice(
            build, f"brake, open loop ({label})", brake | open_loop
        )
        trust: dict[str, OptionValue] = {"trust": True}
        found[f"{key}-trust"] = OptimizerChoice(build, f"Feedback({label}, trust)", trust)
        found[f"{key}-trust-open-loop"] = OptimizerChoice(
            build, f"open loop ({label}, trust)", trust | open_loop
        )
    return found


OPTIMIZERS: dict[str, OptimizerChoice] = {
    "sgd": OptimizerChoice(_torch(torch.optim.SGD), "SGD"),
    "sgd-clip": OptimizerChoice(_torch(torch.optim.SGD), "SGD + clip", {"grad_clip": 1.0}),
    "sgd-agc": OptimizerChoice(_torch(torch.optim.SGD), "SGD + adaptive clip", {"unit_clip": 0.02}),
    "sam": OptimizerChoice(_torch(torch.optim.SGD), "SAM", {"sharpness": 0.05}),
    "sgd-schedule-free": OptimizerChoice(_schedule_free("SGDScheduleFree"), "schedule-free SGD"),
    "adamw-schedule-free": OptimizerChoice(
        _schedule_free("AdamWScheduleFree"), "schedule-free AdamW", {"weight_decay": 0.0}
    ),
    "momentum": OptimizerChoice(_torch(torch.optim.SGD), "SGD momentum", {"momentum": 0.9}),
    "rmsprop": OptimizerChoice(_torch(torch.optim.RMSprop), "RMSprop"),
    "adam": OptimizerChoice(_torch(torch.optim.Adam), "Adam"),
    # The library's own default, so that both sides of a comparison decay alike.
    "adamw": OptimizerChoice(_torch(torch.optim.AdamW), "AdamW", {"weight_decay": 0.0}),
    "muon": OptimizerChoice(feedback("muon"), "Muon", {"feedback": False}),
    "kfac": OptimizerChoice(_own("KFAC"), "KFAC"),
    "ekfac": OptimizerChoice(_own("EKFAC"), "EKFAC"),
    "sgd-vgr": OptimizerChoice(_own("SGDVGR"), "SGD + VGR"),
    "emsa": OptimizerChoice(_emsa, "E-MSA"),
    # The training loop's loss, named: at saturated outputs it could not be told from the gradient.
    "vanilla-ddp": OptimizerChoice(
        _own("VanillaDDP"), "Vanilla DDP", {"terminal": "cross_entropy"}
    ),
    "vanilla-ddp-second-order": OptimizerChoice(
        _own("VanillaDDP"),
        "Vanilla DDP second order",
        {"terminal": "cross_entropy", "dynamics": "second_order", "form": "dense"},
    ),
    "ddpnopt": _ddp("DDPNOpt"),
    "ddpnopt-open-loop": _ddp("DDPNOpt open loop", feedback="open_loop"),
    "ddpnopt-off": _ddp("DDPNOpt without feedback", feedback=False),
    "ddpnopt-no-own-layer": _ddp("DDPNOpt own_layer=False", value__own_layer=False),
    "ddpnopt-no-coupling": _ddp("DDPNOpt coupling=False", value__coupling=False),
    "ddpnopt-envelope": _ddp("DDPNOpt strength=1", value__strength=1.0),
    "ddpnopt-momentum": _ddp("DDPNOpt momentum", momentum=0.9),
    "ddpnopt-momentum-open-loop": _ddp(
        "DDPNOpt momentum open loop", momentum=0.9, feedback="open_loop"
    ),
    **_twins(),
    **_wrapped(),
    "prodigy": OptimizerChoice(
        _self_tuned("prodigyopt", "Prodigy"), "Prodigy", {"weight_decay": 0.0}
    ),
    "dadapt-sgd": OptimizerChoice(_self_tuned("dadaptation", "DAdaptSGD"), "D-Adapted SGD"),
    "dadapt-adam": OptimizerChoice(_self_tuned("dadaptation", "DAdaptAdam"), "D-Adapted Adam"),
    "ddpnopt-clipped": _ddp("DDPNOpt + adaptive clip", curvature=clipped.Clipped.name),
    "ddpnopt-quadratic-flow": _ddp("DDPNOpt quadratic flow", value=lines.QuadraticFlow.name),
    "feedback-sgd-schedule-free": OptimizerChoice(
        _averaged("SGDScheduleFree"), "Feedback(schedule-free SGD)"
    ),
    "feedback-adamw-schedule-free": OptimizerChoice(
        _averaged("AdamWScheduleFree"), "Feedback(schedule-free AdamW)", {"weight_decay": 0.0}
    ),
    "ddpnopt-gauss-newton": _ddp("DDPNOpt Gauss-Newton", value="gauss_newton"),
    "ddpnopt-low-rank": _ddp("DDPNOpt low rank", value="low_rank"),
    "ddpnopt-dense": _ddp("DDPNOpt dense", value="dense"),
    "ddpnopt-second-order": _ddp(
        "DDPNOpt second order",
        value="dense",
        value__backup="riccati",
        value__dynamics="second_order",
    ),
    "ddpnopt-paper": _ddp("DDPNOpt paper", value="paper"),
}


@dataclass(frozen=True)
class Built:
    """An optimizer and what the training loop must do for it.

    Attributes:
        optimizer: The optimizer.
        grad_clip: Threshold for `clip_grad_norm_`, in units of the loss's gradient; None: off.
        unit_clip: Threshold for `rival_steps.clip_by_unit`; None: off.
        sharpness: Radius of `rival_steps.sharpened`; None: off.
    """

    optimizer: torch.optim.Optimizer
    grad_clip: float | None
    unit_clip: float | None = None
    sharpness: float | None = None

    @property
    def averaged(self) -> Any:
        """The optimizer, where it has weights of its own to answer with (`eval` and `train`)."""
        return self.optimizer if hasattr(self.optimizer, "eval") else None


def build_optimizer(
    name: str, model: nn.Module, lr: float, options: Mapping[str, OptionValue] | None = None
) -> Built:
    """Build the optimizer `name` for `model`.

    Args:
        name: A name in `OPTIMIZERS`.
        model: The network whose parameters it trains.
        lr: Learning rate.
        options: Options that override the choice's defaults.

    Returns:
        The optimizer and the clipping threshold.

    Raises:
        ValueError: Unknown name or option (the message lists the known ones).
    """
    choice = lookup(OPTIMIZERS, name, "optimizer")
    merged: Options = {**choice.defaults, **(options or {})}
    loop = {option: _positive(option, merged.pop(option, None)) for option in LOOP_OPTIONS}
    return Built(choice.build(model, lr, merged), **loop)


def _positive(option: str, value: OptionValue) -> float | None:
    if value is None:
        return None
    if isinstance(value, (bool, str)) or not float(value) > 0.0:
        raise ValueError(f"{option} must be a positive number, got {value!r}")
    return float(value)


def label_of(name: str, options: Mapping[str, OptionValue] | None = None) -> str:
    """Return the name for tables and plots: the choice's label and the options set by hand."""
    label = lookup(OPTIMIZERS, name, "optimizer").label
    extra = ", ".join(f"{k}={v}" for k, v in sorted((options or {}).items()))
    return f"{label} ({extra})" if extra else label
