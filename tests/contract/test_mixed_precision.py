# SPDX-License-Identifier: MIT
"""Autocast, GradScaler and low precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import assert_same, data, distance, mlp

quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

LR = 0.5
VALUES = [Moreau(), GaussNewton(), LowRank()]


class Kind(nn.Module):
    """Remembers the type of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return x


def single(seed: int = 0) -> nn.Sequential:
    return mlp(seed).float()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x, y = data(seed, 12)
    return x.float(), y


def autocast_step(
    model: nn.Module, opt: torch.optim.Optimizer, seed: int, loss: Callable[..., Tensor]
) -> None:
    x, y = batch(seed)
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model(x), y)
    value.backward()
    opt.step()


@quiet
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast(value: object, feedback: object, smoothing: float) -> None:
    base, kind = single(), Kind()
    model = nn.Sequential(base[0], kind, *base[1:])
    opt = DDPNOpt(model, lr=LR, value=value, feedback=feedback)
    for seed in range(8):
        autocast_step(
            model, opt, seed, lambda z, y: F.cross_entropy(z, y, label_smoothing=smoothing)
        )
        assert opt.last_step.terminal == "cross_entropy"
    assert set(kind.seen) == {torch.bfloat16}
    assert all(p.dtype is torch.float32 and torch.isfinite(p).all() for p in model.parameters())


@quiet
def test_autocast_is_near_full_precision() -> None:
    model, twin, plain = single(), single(), single()
    autocast_step(model, DDPNOpt(model, lr=2.0), 0, F.cross_entropy)
    autocast_step(plain, torch.optim.SGD(plain.parameters(), 2.0), 0, F.cross_entropy)
    x, y = batch(0)
    opt = DDPNOpt(twin, lr=2.0)
    F.cross_entropy(twin(x), y).backward()
    opt.step()
    assert distance(model, twin) < 0.1 * distance(plain, twin)


def test_autocast_does_not_recognise_more() -> None:
    model, twin = single(), single()

    def focal(z: Tensor, y: Tensor) -> Tensor:
        p = z.float().softmax(1)[torch.arange(len(y)), y]
        return ((1 - p) ** 2 * -p.log()).mean()

    with pytest.warns(DDPNOptWarning, match="terminal"):
        autocast_step(model, DDPNOpt(model, lr=LR), 0, focal)
    autocast_step(twin, torch.optim.SGD(twin.parameters(), LR), 0, focal)
    assert_same(model, twin)


@quiet
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**4])
def test_grad_scaler(value: object, scale: float) -> None:
    model, twin = single(), single()
    opt, other = DDPNOpt(model, lr=LR, value=value), DDPNOpt(twin, lr=LR, value=value)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for seed in range(4):
        x, y = batch(seed)
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        other.step()
        assert opt.last_step.terminal == "cross_entropy"
    assert_same(model, twin, 1e-5)


@quiet
@pytest.mark.parametrize("value", VALUES)
def test_grad_scaler_with_clipping(value: object) -> None:
    model, twin = single(), single()
    opt, other = DDPNOpt(model, lr=LR, value=value), DDPNOpt(twin, lr=LR, value=value)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(4):
        x, y = batch(seed)
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
    assert_same(model, twin, 1e-5)


@quiet
@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_skipped_by_the_scaler_leaves_nothing(accumulate: int) -> None:
    """An overflow: the scaler doesn't call step; the next iteration is as if it had not been."""
    model, twin = single(), single()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in (0, 1, 2):
        x, y = batch(seed)
        opt.zero_grad()
        for part in range(accumulate):
            parts = slice(part * 12 // accumulate, (part + 1) * 12 // accumulate)
            loss = F.cross_entropy(model(x[parts]), y[parts]) / accumulate
            scaler.scale(loss).backward()
        if seed == 1:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        if seed != 1:
            other.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            other.step()
    assert scaler.get_scale() == 2.0**9
    assert_same(model, twin, 1e-5)


@quiet
def test_open_loop_with_a_scaler() -> None:
    """The gain is that of the step really taken: the scale is no part of S after the first step."""
    model, twin = single(), single()
    opt = DDPNOpt(model, lr=LR, feedback="open_loop")
    other = DDPNOpt(twin, lr=LR, feedback="open_loop")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        x, y = batch(seed)
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        if seed == 0:
            twin.load_state_dict(model.state_dict())
            continue
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        other.step()
    assert_same(model, twin, 1e-4)


@quiet
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("value", VALUES)
def test_single_precision_is_near_double(feedback: object, value: object) -> None:
    model, twin = single(), mlp()
    twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    opt = DDPNOpt(model, lr=LR, value=value, feedback=feedback)
    other = DDPNOpt(twin, lr=LR, value=value, feedback=feedback)
    for seed in range(3):
        x, y = batch(seed)
        for m, o, inputs in ((model, opt, x), (twin, other, x.double())):
            o.zero_grad()
            F.cross_entropy(m(inputs), y).backward()
            o.step()
    assert_same(model.double(), twin, 1e-5)
