# SPDX-License-Identifier: MIT
"""Every option of every public object, given what it is not: refused by its name, or taken."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ddpnopt
from ddpnopt import curvature, value
from ddpnopt.experiments.optimizers import build_optimizer
from ddpnopt.experiments.specs import parse_optimizer

#: Texts, containers, switches and numbers that no option, or only some, can mean.
GIVEN: tuple[Any, ...] = (
    *("abc", "", "0.5", None, True, object(), 1j, [1], (1, 2), {}),
    *(-1, 0, 1, 2.5, -2.5, 1e-400, math.nan, math.inf, 10**400),
    *(torch.tensor(1.0), torch.ones(3)),
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def around(make: Callable[..., Any]) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        model = net()
        return make(model, torch.optim.SGD(model.parameters(), 0.1), **options)

    return build


def own(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **options: make(net(), **options)


def loss(**options: Any) -> Any:
    return ddpnopt.MMCLoss(**{"num_classes": 3, "dim": 4, **options})


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{name: (one, one) for name, one in vars(curvature).items() if name in curvature.__all__},
    **{name: (one, one) for name, one in vars(value).items() if name in value.__all__},
    **{
        f"ddpnopt.{name}": (getattr(ddpnopt, name), own(getattr(ddpnopt, name)))
        for name in ("DDPNOpt", "KFAC", "EKFAC", "EMSA", "VanillaDDP", "SGDVGR")
    },
    "Feedback": (ddpnopt.Feedback, around(ddpnopt.Feedback)),
    "open_loop": (ddpnopt.open_loop, around(ddpnopt.open_loop)),
    "MMCLoss": (ddpnopt.MMCLoss, loss),
}
NOT_OPTIONS = {"self", "model", "params", "optimizer"}
CASES = [
    (kind, option)
    for kind, (signature, _) in KINDS.items()
    if inspect.isclass(signature) and not inspect.isabstract(signature) or kind == "open_loop"
    for option in inspect.signature(signature).parameters
    if option not in NOT_OPTIONS
]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_taken_or_refused_by_name(kind: str, option: str) -> None:
    for given in GIVEN:
        if option == "dim" and isinstance(given, int) and given > 2**62:
            continue  # torch's own limit of a tensor's size
        try:
            KINDS[kind][1](**{option: given})
        except (ValueError, TypeError) as error:
            assert option in str(error), (given, error)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Moreau", {"own_layer": "no"}),
        ("GaussNewton", {"match_curvature": "false"}),
        ("LowRank", {"rank": 2.5}),
        ("ddpnopt.DDPNOpt", {"weight_gradients": "false"}),
        ("ddpnopt.DDPNOpt", {"lr": "0.1"}),
        ("KFAC", {"update_every": math.inf}),
        ("AdamW", {"betas": 0.9}),
    ],
)
def test_refused(kind: str, options: dict[str, Any]) -> None:
    """What would be taken for something else, or fail at a step."""
    with pytest.raises(ValueError, match=next(iter(options))):
        KINDS[kind][1](**options)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("adam:betas=0.9", "betas"),
        ("sgd:momentum=abc", "momentum"),
        ("feedback-adamw:betas=1", "betas"),
        ("ddpnopt-kfac:curvature.damping=no", "damping"),
        ("ddpnopt:value.own_layer=no", "own_layer"),
        ("feedback-muon:nesterov=true", "nesterov"),
    ],
)
def test_on_the_command_line(text: str, option: str) -> None:
    """An error that names the option, also where torch's own constructor compares first."""
    name, options = parse_optimizer(text)
    with pytest.raises(ValueError, match=option):
        build_optimizer(name, net(), 0.1, options)
