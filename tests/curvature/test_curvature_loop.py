# SPDX-License-Identifier: MIT
"""Curvatures in every form of the loop: groups, schedules, checkpoints, scales, frozen weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EKFAC, KFAC, DDPNOpt, curvature
from ddpnopt.value import Dense, LowRank, Moreau
from oracles.common import assert_same
from oracles.kronecker import data, net, train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
NAMES = ("adamw", "kfac", "ekfac", "trust")


def images(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randn(7, 4, 6, 5, generator=g).double(), torch.randint(3, (7,), generator=g))
        for _ in range(steps)
    ]


# AdamW in the loop ------------------------------------------------------------------------------


def small_cnn() -> nn.Module:
    torch.manual_seed(5)
    first = (nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def adamw_pair(model: nn.Module, twin: nn.Module) -> tuple[DDPNOpt, torch.optim.AdamW]:
    def groups(m: nn.Module) -> list[dict[str, Any]]:
        p = list(m.parameters())
        return [
            {"params": p[:2], "lr": 0.02, "weight_decay": 0.2},
            {"params": p[2:], "lr": 0.003, "weight_decay": 0.0},
        ]

    opt = DDPNOpt(
        model, curvature=curvature.AdamW((0.8, 0.95), 1e-4), feedback=False, params=groups(model)
    )
    return opt, torch.optim.AdamW(groups(twin), betas=(0.8, 0.95), eps=1e-4)


def test_adamw_with_groups_schedule_and_clipping() -> None:
    model, twin = small_cnn(), small_cnn()
    for m, opt in zip((model, twin), adamw_pair(model, twin), strict=True):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)
        for x, y in images(50):
            opt.zero_grad()
            F.cross_entropy(m(x), y).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.2)
            opt.step()
            schedule.step()
    assert_same(model, twin, 1e-14)


def test_added_adamw_group_has_no_momentum() -> None:
    model = net()
    first, *others = model.parameters()
    opt = DDPNOpt(model, curvature="adamw", params=[{"params": [first]}])
    with pytest.raises(ValueError, match="adamw"):
        opt.add_param_group({"params": others, "momentum": 0.9})


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_training_has_the_same_bits(name: str, feedback: Any) -> None:
    model = net()
    opt = DDPNOpt(model, lr=0.02, curvature=name, feedback=feedback)
    batches = data(23)
    train(model, opt, batches[:11])
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = net()
    resumed = DDPNOpt(twin, lr=0.7, curvature=name, feedback=feedback)
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(model, opt, batches[11:])
    train(twin, resumed, batches[11:])
    assert_same(model, twin)


# Kronecker in the loop --------------------------------------------------------------------------


@pytest.mark.parametrize("own", [KFAC, EKFAC])
def test_own_optimizer_is_the_borrowed_one(own: type[KFAC]) -> None:
    model, twin = net(), net()
    options = {"damping": 0.02, "decay": 0.9, "update_every": 3}
    curved = (curvature.KFAC if own is KFAC else curvature.EKFAC)(**options)
    train(model, own(model, lr=0.03, momentum=0.5, weight_decay=0.01, **options), data(9))
    other = DDPNOpt(
        twin, lr=0.03, curvature=curved, feedback=False, momentum=0.5, weight_decay=0.01
    )
    train(twin, other, data(9))
    assert_same(model, twin)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_coefficients_of_one_are_the_borrowed_step(name: str) -> None:
    model, twin = net(), net()
    value = Moreau(strength=0.0)
    opt = DDPNOpt(model, lr=0.03, curvature=name, value=value, feedback="open_loop")
    train(model, opt, data(12))
    train(twin, DDPNOpt(twin, lr=0.03, curvature=name, feedback=False), data(12))
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_scaled_losses_give_the_same_step(name: str, feedback: Any) -> None:
    """loss * 1024 and p.grad / 1024, as a gradient scaler does it.

    The open loop learns of the scale one step late, so that the first step is one of length 0.
    """
    model, twin = net(), net()
    opt = DDPNOpt(model, lr=0.0, curvature=name, feedback=feedback)
    other = DDPNOpt(twin, lr=0.0, curvature=name, feedback=feedback)
    for x, y in data(6):
        opt.zero_grad()
        (F.cross_entropy(model(x), y) * 1024).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= 1024
        opt.step()
        train(twin, other, [(x, y)])
        opt.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.03
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layer_has_no_closed_loop(name: str) -> None:
    """Its input doesn't move, so that one step of it is the same in open loop."""
    model, twin = net(), net()
    value = Moreau(coupling=False)
    train(model, DDPNOpt(model, lr=0.03, curvature=name, value=value), data(1))
    opt = DDPNOpt(twin, lr=0.03, curvature=name, value=value, feedback="open_loop")
    train(twin, opt, data(1))
    for p, q in zip(model[0].parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)
    assert not torch.allclose(model.get_parameter("4.weight"), twin.get_parameter("4.weight"))


@pytest.mark.parametrize("backup", ["proximal", "closed_loop", "riccati"])
@pytest.mark.parametrize("name", NAMES)
def test_every_backup_is_exact_at_low_rank(name: str, backup: str) -> None:
    model, twin = net(), net()
    low = DDPNOpt(model, lr=0.05, curvature=name, value=LowRank(backup=backup))
    train(model, low, data(4))
    train(twin, DDPNOpt(twin, lr=0.05, curvature=name, value=Dense(backup=backup)), data(4))
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("own", [KFAC, EKFAC])
def test_frozen_parameters_stay(own: type[KFAC], part: str) -> None:
    model = net()
    frozen = model.get_parameter(f"2.{part}").requires_grad_(False)
    before = frozen.detach().clone()
    opt = own(model, lr=0.05)
    batch = data(1)[0]
    first = F.cross_entropy(model(batch[0]), batch[1]).item()
    train(model, opt, [batch] * 20)
    assert torch.equal(frozen, before) and frozen not in opt.state
    assert F.cross_entropy(model(batch[0]), batch[1]).item() < first


def test_a_frozen_bias_is_no_input() -> None:
    model = net()
    model.get_parameter("2.bias").requires_grad_(False)
    opt = KFAC(model)
    train(model, opt, data(2))
    assert [opt.state[model.get_parameter(f"{i}.weight")]["A"].shape[-1] for i in (0, 2, 4)] == [
        7,
        8,
        6,
    ]


class Shifted(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.shift))


@pytest.mark.parametrize("own", [KFAC, EKFAC])
def test_parameters_without_a_layer_take_gradient_steps(own: Callable[..., KFAC]) -> None:
    model = Shifted()
    twin = copy.deepcopy(model)
    x, y = data(1)[0]
    F.cross_entropy(twin(x), y).backward()
    opt = own(model, lr=0.1)
    train(model, opt, [(x, y)])
    assert twin.shift.grad is not None
    torch.testing.assert_close(model.shift, twin.shift - 0.1 * twin.shift.grad)


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_models_train(name: str, feedback: Any) -> None:
    model = net().to(torch.bfloat16)
    opt = DDPNOpt(model, lr=0.02, curvature=name, feedback=feedback)
    x, y = data(1)[0]
    batch = (x.to(torch.bfloat16), y)
    first = F.cross_entropy(model(batch[0]), y).item()
    train(model, opt, [batch] * 30)
    assert F.cross_entropy(model(batch[0]), y).item() < first
