# SPDX-License-Identifier: MIT
"""A saved state goes on on another device and in another precision."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EKFAC, EMSA, KFAC, SGDVGR, DDPNOpt, Feedback, VanillaDDP

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")

Make = Callable[[nn.Module], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "kfac alone": lambda m: KFAC(m),
    "ekfac alone": lambda m: EKFAC(m),
    "vgr": lambda m: SGDVGR(m, momentum=0.5),
    "emsa": lambda m: EMSA(m, rho=20.0),
    "vanilla ddp": lambda m: VanillaDDP(m),
    "momentum": lambda m: DDPNOpt(m, 0.05, momentum=0.9),
    "no weight gradients": lambda m: DDPNOpt(m, 0.05, weight_gradients=False),
    "around adamw": lambda m: Feedback(m, torch.optim.AdamW(m.parameters(), 1e-2)),
    "brake": lambda m: Feedback(
        m, torch.optim.SGD(m.parameters(), 0.05, momentum=0.9), mode="brake"
    ),
}


def _twin(curvature: str, feedback: bool | str, gram: str) -> Make:
    return lambda m: DDPNOpt(m, 0.02, curvature=curvature, feedback=feedback, gram=gram)


for _name in ("identity", "rmsprop", "adamw", "kfac", "ekfac"):
    for _depth in (True, "open_loop"):
        MAKE[f"{_name}, {_depth}"] = _twin(_name, _depth, "sketch" if _depth is True else "exact")


def net(dtype: torch.dtype, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 9), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(9, 5)).to(device, dtype)


def steps(model: nn.Module, opt: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    own = next(model.parameters())
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64).to(own)
        y = torch.randint(0, 5, (12,), generator=generator).to(own.device)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def moved(
    make: Make, model: nn.Module, opt: torch.optim.Optimizer, dtype: torch.dtype, device: str
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both as they come from a file, loaded to the CPU, into a new model elsewhere."""
    buffer = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True, map_location="cpu")
    other = net(dtype, device)
    made = make(other)
    other.load_state_dict(weights)
    made.load_state_dict(state)
    return other, made


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.cpu().double() - q.cpu().double()).abs().max().detach()) for p, q in pairs)


def tensors(node: Any) -> Iterable[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from tensors(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from tensors(value)


@pytest.mark.parametrize("name", MAKE)
def test_between_precisions(name: str) -> None:
    """The rest is that of a training in the new precision from the same (rounded) state."""
    make = MAKE[name]
    single = net(torch.float32)
    first = make(single)
    steps(single, first, range(3))
    double, second = moved(make, single, first, torch.float64, "cpu")
    assert distance(single, double) == 0.0
    for state in second.state.values():
        for tensor in tensors(state):
            # Counters of steps stay as they are.
            assert tensor.dtype == torch.float64 or tensor.numel() == 1
    again, third = moved(make, double, second, torch.float64, "cpu")
    steps(double, second, range(3, 6))
    steps(again, third, range(3, 6))
    assert distance(double, again) == 0.0
    steps(single, first, range(3, 6))
    assert 0.0 < distance(single, double) < 2e-3
    # And back: the same type of state as before.
    back, fourth = moved(make, double, second, torch.float32, "cpu")
    steps(back, fourth, range(6, 8))
    steps(double, second, range(6, 8))
    assert 0.0 < distance(back, double) < 2e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MAKE)
def test_between_devices(name: str) -> None:
    make = MAKE[name]
    straight = net(torch.float64)
    steps(straight, make(straight), range(9))
    model: nn.Module = net(torch.float64)
    opt = make(model)
    steps(model, opt, range(3))
    for device, begin in (("cuda", 3), ("cpu", 6)):
        model, opt = moved(make, model, opt, torch.float64, device)
        steps(model, opt, range(begin, begin + 3))
    assert distance(model, straight) < 1e-9
