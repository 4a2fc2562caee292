# SPDX-License-Identifier: MIT
"""p.grad is authoritative, and accumulation is the concatenated batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.value import Dense, GaussNewton, LowRank, Moreau
from oracles.common import assert_same, data, distance, iterate, mlp

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

LR = 0.7


def accumulate(model: nn.Module, opt: DDPNOpt, parts: list[int], steps: int = 2) -> None:
    for seed in range(steps):
        x, y = data(seed, 12)
        opt.zero_grad()
        for a, b in zip(x.split(parts), y.split(parts), strict=True):
            (F.cross_entropy(model(a), b, reduction="sum") / 12).backward()
        opt.step()


@pytest.mark.parametrize("parts", [[6, 6], [4, 4, 4], [3, 9], [11, 1]])
@pytest.mark.parametrize("value", [Moreau(), LowRank(), GaussNewton(), Dense()], ids=repr)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
def test_accumulation_is_the_concatenated_batch(
    parts: list[int], value: object, curvature: str
) -> None:
    lr = LR if curvature == "identity" else 0.05
    models = []
    for split in (parts, [12]):
        model = mlp()
        accumulate(model, DDPNOpt(model, lr=lr, value=value, curvature=curvature), split)
        models.append(model)
    assert_same(models[0], models[1], 1e-11)


def test_accumulation_of_single_samples() -> None:
    """One sample can't show which loss it was, so it is named."""
    models = []
    for split in ([1] * 12, [12]):
        model = mlp()
        accumulate(model, DDPNOpt(model, lr=LR, terminal="cross_entropy"), split)
        models.append(model)
    assert_same(models[0], models[1], 1e-11)


def test_accumulation_in_the_open_loop() -> None:
    models = []
    for split in ([4, 8], [12]):
        model = mlp()
        opt = DDPNOpt(model, lr=LR, value=Moreau(coupling=False), feedback="open_loop")
        accumulate(model, opt, split)
        models.append(model)
    assert_same(models[0], models[1], 1e-12)


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_accumulation_without_weight_gradients() -> None:
    models = []
    for split in ([4, 8], [12]):
        model = mlp()
        value = Moreau(coupling=False)
        opt = DDPNOpt(model, lr=LR, value=value, weight_gradients=False)
        accumulate(model, opt, split)
        models.append(model)
    assert_same(models[0], models[1], 1e-11)


def test_accumulation_of_forwards_then_backwards() -> None:
    """Both forwards first, then both backwards."""
    model, twin = mlp(), mlp()
    x, y = data(0, 12)
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    losses = [F.cross_entropy(model(a), b) / 2 for a, b in zip(x.split(6), y.split(6), strict=True)]
    for loss in losses:
        loss.backward()
    opt.step()
    F.cross_entropy(twin(x), y).backward()
    other.step()
    assert_same(model, twin, 1e-11)


def test_several_forwards_before_one_backward() -> None:
    """Siamese use is handled as the concatenated batch, or refused by name."""
    model, twin = mlp(), mlp()
    before = copy.deepcopy(model)
    x, y = data(0, 12)
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    try:
        first, second = model(x[:5]), model(x[5:])
        F.cross_entropy(torch.cat([first, second]), y).backward()
        opt.step()
    except UnsupportedModelError as error:
        assert "forward" in str(error)
        assert_same(model, before)
        return
    F.cross_entropy(twin(x), y).backward()
    other.step()
    assert_same(model, twin, 1e-11)


def one(
    model: nn.Module, change: Callable[[nn.Module], object], lr: float = LR, **options: object
) -> None:
    opt = DDPNOpt(model, lr=lr, **options)  # type: ignore[arg-type]
    x, y = data()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    change(model)
    opt.step()


def nothing(model: nn.Module) -> None:
    """Leave the gradients alone."""


def scale_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.mul_(0.25)


def scale_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.data.mul_(0.25)


def scale_numpy(model: nn.Module) -> None:
    """Invisible to the version counter."""
    for p in model.parameters():
        p.grad.numpy()[...] *= 0.25


def scale_replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = p.grad * 0.25


VALUES = [Moreau(), GaussNewton(), LowRank(), Dense(own_layer=True)]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("change", [scale_in_place, scale_data, scale_numpy, scale_replaced])
def test_uniform_rescaling_scales_the_step(value: object, change: Callable[..., None]) -> None:
    """r p.grad at rate lr is p.grad at rate r lr, in S, too."""
    model, twin = mlp(), mlp()
    one(model, change, value=value)
    one(twin, nothing, lr=LR / 4, value=value)
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("value", VALUES)
def test_clip_grad_norm_scales_the_step(value: object) -> None:
    model, twin = mlp(), mlp()
    norms = []
    one(model, lambda m: norms.append(nn.utils.clip_grad_norm_(m.parameters(), 0.05)), value=value)
    assert float(norms[0]) > 0.06
    one(twin, nothing, lr=LR * 0.05 / (float(norms[0]) + 1e-6), value=value)
    assert_same(model, twin, 1e-11)


def test_idle_clipping_changes_nothing() -> None:
    model, twin = mlp(), mlp()
    one(model, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e9))
    one(twin, nothing)
    assert_same(model, twin, 1e-14)


def test_open_loop_clips_what_it_applies() -> None:
    """In the open loop p.grad is d itself, so clipping is torch's own."""
    model, twin = mlp(), mlp()
    one(model, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05), feedback="open_loop")
    start = mlp()
    one(twin, nothing, feedback="open_loop")
    pairs = list(zip(start.parameters(), twin.parameters(), strict=True))
    norm = float(sum(((a - b) ** 2).sum() for a, b in pairs).detach()) ** 0.5 / LR
    for p, (a, b) in zip(model.parameters(), pairs, strict=True):
        torch.testing.assert_close(p, a + (b - a) * 0.05 / (norm + 1e-6), rtol=1e-12, atol=1e-12)


def test_open_loop_gradient_is_the_step() -> None:
    model = mlp()
    start = mlp()
    opt = DDPNOpt(model, lr=LR, feedback="open_loop")
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    opt.step()
    for p, a, g in zip(model.parameters(), start.parameters(), gradients, strict=True):
        torch.testing.assert_close(p, a - LR * g, rtol=1e-14, atol=1e-14)


def test_closed_loop_keeps_the_plain_gradient() -> None:
    model, twin = mlp(), mlp()
    x, y = data()
    opt = DDPNOpt(model, lr=LR)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-15, atol=1e-16)
    opt.step()
    assert distance(model, mlp()) > 0


@pytest.mark.parametrize("value", [Moreau(coupling=False), GaussNewton(), LowRank()])
def test_l2_term_added_by_hand_is_weight_decay(value: object) -> None:
    model, twin = mlp(), mlp()

    def add(m: nn.Module) -> None:
        for p in m.parameters():
            p.grad.add_(p.detach(), alpha=0.1)

    one(model, add, value=value)
    one(twin, nothing, value=value, weight_decay=0.1)
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("value", [Moreau(coupling=False), GaussNewton(), LowRank()])
def test_noise_is_kept_and_feedback_added(value: object) -> None:
    """Noise on the last layer, which has nothing above it: exactly -lr noise beside the rest."""
    model, twin, start = mlp(), mlp(), mlp()
    noise = torch.randn(3, 5, dtype=torch.float64)
    one(model, lambda m: m[4].weight.grad.add_(noise), value=value)
    one(twin, nothing, value=value)
    torch.testing.assert_close(model[4].weight, twin[4].weight - LR * noise, rtol=1e-12, atol=1e-12)
    assert_same(model[:4], twin[:4], 1e-13)
    sgd = torch.optim.SGD(start.parameters(), LR)
    x, y = data()
    F.cross_entropy(start(x), y).backward()
    sgd.step()
    assert float((twin[4].weight - start[4].weight).detach().abs().max()) > 1e-4


def test_value_clipping_is_kept() -> None:
    model, twin = mlp(), mlp()
    value = Moreau(coupling=False)
    changes = []

    def clip(m: nn.Module) -> None:
        before = m[4].weight.grad.clone()
        nn.utils.clip_grad_value_(m[4].parameters(), 0.02)
        changes.append(m[4].weight.grad - before)

    one(model, clip, value=value)
    one(twin, nothing, value=value)
    assert float(changes[0].abs().max()) > 1e-3
    torch.testing.assert_close(model[4].weight, twin[4].weight - LR * changes[0])


def test_gradient_set_to_none_leaves_the_parameter() -> None:
    model, start = mlp(), mlp()

    def drop(m: nn.Module) -> None:
        m[2].weight.grad = None

    one(model, drop)
    assert torch.equal(model[2].weight, start[2].weight)
    assert not torch.equal(model[0].weight, start[0].weight)


def test_feedback_does_something() -> None:
    """Guards the equalities above: at this rate the three depths differ."""
    results = []
    for feedback in (True, "open_loop", False):
        model = mlp()
        iterate(model, DDPNOpt(model, lr=LR, feedback=feedback), range(3))
        results.append(model)
    assert distance(results[0], results[1]) > 1e-4
    assert distance(results[1], results[2]) > 1e-4


def test_open_loop_reports_the_rescaling() -> None:
    model = torch.nn.Linear(4, 3)
    opt = DDPNOpt(model, feedback="open_loop")
    x, y = torch.randn(8, 4) * 9, torch.randint(3, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    opt.step()
    assert opt.last_step is not None
    assert opt.last_step.rescale == pytest.approx(0.1 / norm, rel=1e-3)


class Retained(nn.Module):
    """Keeps its intermediate tensors' gradients, one of them inside a layer of its own."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner = x.sin()
            self.inner.retain_grad()
            return self.inner * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Linear(4, 5), self.Scale(), nn.Linear(5, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        a = self.own(h).tanh()
        z: torch.Tensor = self.last(a)
        self.kept = (h, a, z)
        for one in self.kept:
            one.retain_grad()
        return z


@pytest.mark.parametrize("value", ["moreau", "gauss_newton"])
def test_retained_gradients_are_the_plain_ones(value: str) -> None:
    model, (x, y) = Retained(), data(0, 6)
    x, twin = x[:, :4], copy.deepcopy(model)
    DDPNOpt(model, lr=LR, value=value)
    for _ in range(4):
        for one in (model, twin):
            F.cross_entropy(one(x), y).backward()
        pairs = zip((*model.kept, model.own.inner), (*twin.kept, twin.own.inner), strict=True)
        for p, q in pairs:
            assert q.grad is not None and torch.equal(p.grad, q.grad)
