# SPDX-License-Identifier: MIT
"""States, outputs, weights and connections that are not those of the recorded chain any more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, TerminalError, UnsupportedModelError
from oracles.common import assert_same, assert_unchanged, data, iterate, mlp, snapshot

LR = 0.7
DEPTHS: list[dict[str, Any]] = [
    {"feedback": True},
    {"feedback": "open_loop"},
    {"feedback": True, "value": "low_rank"},
    {"feedback": True, "value": "dense"},
]


class Overwriting(nn.Module):
    """Overwrites the state of its second layer after use, where autograd does not object."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        state = 2 * self.first(x)
        z = self.second(state)
        state.mul_(0.5)
        return z


def backward(model: nn.Module, seed: int = 0) -> None:
    x, y = data(seed)
    F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_state_overwritten_after_its_layer_is_refused(frozen: bool) -> None:
    """Autograd keeps no input for a weight without a gradient, so it does not notice."""
    model = Overwriting()
    model.second.weight.requires_grad_(not frozen)
    opt = DDPNOpt(model, lr=LR, weight_gradients=frozen)
    before = snapshot(model)
    backward(model)
    with pytest.raises(UnsupportedModelError, match="'second'.*in place"):
        opt.step()
    assert_unchanged(model, before)


class Doubling(nn.Module):
    """Makes its output of the last layer's, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = mlp(), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mul_(2) if self.in_place else 2 * self.net(x)


def doubled_loss(model: nn.Module, terminal: str) -> Tensor:
    """A loss of twice the output."""
    x, y = data(0)
    z = model(x).mul_(2)
    return F.mse_loss(z, torch.zeros_like(z)) if terminal == "mse" else F.cross_entropy(z, y)


@pytest.mark.parametrize("options", DEPTHS[:3])
def test_output_overwritten_in_the_model_is_what_it_returns(options: dict[str, Any]) -> None:
    model, twin = Doubling(True), Doubling(False)
    opt = DDPNOpt(model, lr=LR, **options)
    iterate(model, opt, [0, 1])
    iterate(twin, DDPNOpt(twin, lr=LR, **options), [0, 1])
    assert_same(model, twin)
    assert opt.last_step is not None and opt.last_step.terminal == "cross_entropy"


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_output_overwritten_behind_the_model_is_not_recognised(feedback: object) -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)  # type: ignore[arg-type]
    other = torch.optim.SGD(twin.parameters(), lr=LR)
    with pytest.warns(DDPNOptWarning, match="in place|not recognised"):
        doubled_loss(model, "auto").backward()
        opt.step()
    doubled_loss(twin, "auto").backward()
    other.step()
    assert_same(model, twin)
    assert opt.last_step is not None and opt.last_step.terminal == "unrecognised"


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("terminal", ["cross_entropy", "mse"])
def test_output_overwritten_contradicts_a_named_terminal(feedback: object, terminal: str) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, terminal=terminal)  # type: ignore[arg-type]
    before = snapshot(model)
    doubled_loss(model, terminal).backward()
    with pytest.raises(TerminalError, match="in place"):
        opt.step()
    assert_unchanged(model, before)


class Feature(nn.Module):
    """Returns its hidden state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net[:2](x)
        return self.net[2:](h), h


@pytest.mark.parametrize("options", DEPTHS)
@pytest.mark.parametrize("detached", [True, False])
def test_feature_used_twice(options: dict[str, Any], detached: bool) -> None:
    """An auxiliary loss on a hidden state: part of the state that the loss sees; see tests/graphs.

    The dense value function has the state of a chain alone, and refuses it.
    """
    model = Feature()
    opt = DDPNOpt(model, lr=LR, **options)
    before = snapshot(model)
    x, y = data(0)
    z, h = model(x)
    auxiliary = (h.detach() if detached else h).square().mean()
    (F.cross_entropy(z, y) + auxiliary).backward()
    if detached or options.get("value") != "dense":
        opt.step()
        assert opt.last_step is not None and len(opt.last_step.layers) == 3
        return
    with pytest.raises(UnsupportedModelError, match="'net.2'.*auxiliary"):
        opt.step()
    assert_unchanged(model, before)


@pytest.mark.parametrize("options", DEPTHS)
def test_model_on_its_own_output_is_refused(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    opt = DDPNOpt(model, lr=LR, **options)
    before = snapshot(model)
    _, y = data(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    F.cross_entropy(model(model(x)), y).backward()
    with pytest.raises(UnsupportedModelError, match="own output|more than once|called"):
        opt.step()
    assert_unchanged(model, before)


def test_model_on_its_own_detached_output_is_a_plain_pass() -> None:
    """What autograd does not connect is no loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    _, y = data(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    for net in (model, twin):
        opt = DDPNOpt(net, lr=LR)
        with torch.no_grad():
            start = twin(x) if net is twin else None
        if start is None:
            start = net(x).detach()
        F.cross_entropy(net(start), y).backward()
        opt.step()
    assert_same(model, twin)


def perturbed(model: nn.Module, opt: torch.optim.Optimizer, seeds: range) -> None:
    """Sharpness-aware steps: the gradient is taken at weights that are not stepped from."""
    for seed in seeds:
        opt.zero_grad()
        backward(model, seed)
        ascent = [0.05 * p.grad for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for p, e in zip(model.parameters(), ascent, strict=True):
                p.add_(e)
        opt.zero_grad()
        backward(model, seed)
        with torch.no_grad():
            for p, e in zip(model.parameters(), ascent, strict=True):
                p.sub_(e)
        opt.step()


@pytest.mark.parametrize("options", [o for o in DEPTHS if o["feedback"] is True])
def test_weights_changed_before_the_step_are_refused(options: dict[str, Any]) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, **options)
    with pytest.raises(UnsupportedModelError, match="'0'.*open_loop"):
        perturbed(model, opt, range(1))


def test_one_weight_changed_by_hand_is_refused_and_named() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    backward(model)
    with torch.no_grad():
        model[2].bias.add_(0.1)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="'2'.*open_loop"):
        opt.step()
    assert_unchanged(model, before)


def test_weights_may_change_in_the_open_loop() -> None:
    """Its step is p.grad: the same as plain SGD's on the gradients that it leaves."""
    model, twin = mlp(), mlp()
    perturbed(model, DDPNOpt(model, lr=LR, feedback="open_loop"), range(1))
    other = DDPNOpt(twin, lr=LR, feedback="open_loop")
    start = snapshot(twin)
    backward(twin)
    ascent = [0.05 * p.grad for p in twin.parameters() if p.grad is not None]
    with torch.no_grad():
        for p, e in zip(twin.parameters(), ascent, strict=True):
            p.add_(e)
    other.zero_grad()
    backward(twin)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            assert p.grad is not None
            p.copy_(start[name] - LR * p.grad)
    assert_same(model, twin, 1e-14)


class Ends(nn.Module):
    """The first and the last sample see each other between the layers."""

    def __init__(self, ends: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.ends = mlp(), ends

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:2](x)
        source, target = self.ends
        rows = list(h.unbind(0))
        rows[target] = rows[target] + 0.3 * rows[source]
        return self.net[2:](torch.stack(rows))


@pytest.mark.parametrize("ends", [(0, -1), (-1, 0), (3, 0), (3, -1)])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_mixing_of_some_samples_is_found(ends: tuple[int, int], feedback: object) -> None:
    """The first passes perturb the middle sample, the first and the last.

    Once it is found, the layer in front of it takes the gradient of the re-weighted loss.
    """
    model = Ends(ends)
    opt = DDPNOpt(model, lr=LR, feedback=feedback)  # type: ignore[arg-type]
    iterate(model, opt, range(3))
    twin = copy.deepcopy(model)
    iterate(model, opt, [3])
    assert opt.last_step is not None
    assert [name for name, _ in opt.last_step.plain] == ["net.0"]
    assert {layer.name for layer in opt.last_step.layers} == {"net.2", "net.4"}
    front = opt.last_step.front
    assert front is not None and front.coefficient is not None
    assert float(front.coefficient.min()) < 1
    x, y = data(3)
    (F.cross_entropy(twin(x), y, reduction="none") * front.coefficient).mean().backward()
    torch.optim.SGD(twin.net[0].parameters(), lr=LR).step()
    assert_same(model.net[0], twin.net[0], 1e-12)
