# SPDX-License-Identifier: MIT
"""The second forward pass: same arguments, same randomness, one pass's effects."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import UnsupportedModelError
from oracles.common import (
    assert_same,
    assert_unchanged,
    data,
    distance,
    generators,
    iterate,
    mlp,
    snapshot,
)

LR = 0.7
quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


def backward(model: nn.Module, seed: int = 0) -> None:
    x, y = data(seed)
    F.cross_entropy(model(x), y).backward()


class Noise(nn.Module):
    """Multiplicative noise from one of three generators; remembers what it drew."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.seen = source, []

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "torch":
            mask = torch.rand_like(x)
        elif self.source == "numpy":
            mask = torch.from_numpy(np.random.rand(*x.shape))
        else:
            mask = torch.full_like(x, random.random())
        self.seen.append(mask)
        return x * (0.5 + mask)


def noisy(source: str) -> nn.Sequential:
    base = mlp()
    return nn.Sequential(base[0], base[1], Noise(source), base[2], base[3], base[4])


@quiet
@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_randomness(source: str, feedback: object) -> None:
    model = noisy(source)
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    for seed in range(2):
        opt.zero_grad()
        backward(model, seed)
        between = random.random(), np.random.rand(), torch.rand(())  # the loop's own draws
        before = generators()
        opt.step()
        assert generators() == before
        assert between is not None
    seen = model[2].seen
    if feedback is True:
        assert len(seen) == 4
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
        assert not torch.equal(seen[0], seen[2])
    else:
        assert len(seen) == 2


@quiet
def test_dropout_rollout_uses_the_same_masks() -> None:
    """Dropout equals a net with the same masks written down."""
    base = mlp()
    model = nn.Sequential(*base[:2], nn.Dropout(0.5), *base[2:])
    twin = copy.deepcopy(base)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(6, 6, dtype=torch.float64), 0.5)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * mask

    other = nn.Sequential(*twin[:2], Fixed(), *twin[2:])
    torch.manual_seed(3)
    iterate(model, DDPNOpt(model, lr=LR), [0])
    iterate(other, DDPNOpt(other, lr=LR), [0])
    assert distance(base, mlp()) > 0
    assert_same(base, twin, 1e-14)


class Counter(nn.Module):
    """Buffers changed in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + 0.1 * self.calls.to(x.dtype)


@quiet
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_buffers_end_as_after_one_pass(feedback: object) -> None:
    base = mlp()
    model = nn.Sequential(base[0], base[1], Counter(), base[2], base[3], base[4])
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    backward(model)
    opt.step()
    twin(data()[0])
    for name, value in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], value), name


def test_batch_norm_buffers_end_as_after_one_pass() -> None:
    base = mlp()
    model = nn.Sequential(base[0], nn.BatchNorm1d(6).double(), *base[1:])
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=LR)
    backward(model)
    opt.step()
    twin(data()[0])
    assert int(model[1].num_batches_tracked) == 1
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value, rtol=0, atol=0)


@quiet
def test_accumulation_with_a_buffer() -> None:
    """Two passes leave the buffers of two passes."""
    base = mlp()
    model = nn.Sequential(base[0], base[1], Counter(), base[2], base[3], base[4])
    opt = DDPNOpt(model, lr=LR)
    backward(model, 0)
    backward(model, 1)
    opt.step()
    assert float(model[2].calls) == 2


class InPlaceInput(nn.Module):
    """Scales its input in place, then runs the layers: itself, or in one call that owns them."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.net = mlp()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        if not self.inside:
            return self.net(x)
        for layer in self.net:
            x = layer(x)
        return x


@quiet
def test_input_modified_before_the_call_that_owns_the_layers() -> None:
    """The deepest such call is run again, with the arguments that it got."""
    model, twin = InPlaceInput(inside=False), mlp()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    backward(model)
    opt.step()
    x, y = data()
    F.cross_entropy(twin(1.5 * x), y).backward()
    other.step()
    assert_same(model.net, twin, 1e-14)


def test_input_modified_by_the_model_is_refused() -> None:
    model = InPlaceInput(inside=True)
    opt = DDPNOpt(model, lr=LR)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="in.place"):
        backward(model)
        opt.step()
    assert_unchanged(model, before)


def test_input_overwritten_by_the_loop_is_refused() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    before = snapshot(model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    x.zero_()
    with pytest.raises(UnsupportedModelError, match="in.place"):
        opt.step()
    assert_unchanged(model, before)


class InPlaceState(nn.Module):
    """Adds to the second layer's input after that layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        base = mlp()
        self.first, self.second, self.third = base[0], base[2], base[4]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).clone()
        z = self.third(torch.tanh(self.second(h)))
        with torch.no_grad():
            h.data.add_(1.0)  # .data: autograd's own check does not see it
        return z


def test_state_modified_behind_autograd_is_named_or_harmless() -> None:
    """A change that autograd can't see spoils its gradient, too; it must not do worse."""
    model = InPlaceState()
    opt = DDPNOpt(model, lr=LR)
    before = snapshot(model)
    try:
        backward(model)
        opt.step()
    except UnsupportedModelError as error:
        assert "second" in str(error)
        assert_unchanged(model, before)
    else:
        assert all(torch.isfinite(p).all() for p in model.parameters())


@quiet
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_in_place_activations(activation: type[nn.Module], feedback: object) -> None:
    model, twin = mlp(0, activation, inplace=True), mlp(0, activation)
    iterate(model, DDPNOpt(model, lr=LR, feedback=feedback), range(3))
    iterate(twin, DDPNOpt(twin, lr=LR, feedback=feedback), range(3))
    assert_same(model, twin, 1e-14)


class Parts(nn.Module):
    """Two parts that the loop calls itself; no single call owns the layers."""

    def __init__(self) -> None:
        super().__init__()
        base = mlp()
        self.body, self.head = base[:4], base[4]


def test_parts_called_from_the_loop_are_refused() -> None:
    model = Parts()
    opt = DDPNOpt(model, lr=LR)
    before = snapshot(model)
    x, y = data()
    with pytest.raises(UnsupportedModelError, match=r"body[\s\S]*head|head[\s\S]*body"):
        F.cross_entropy(model.head(model.body(x)), y).backward()
        opt.step()
    assert_unchanged(model, before)


class Outer(nn.Module):
    """The layers live one call deeper, with keyword and nested arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, batch: dict[str, list[Tensor]], *, scale: float = 1.0) -> Tensor:
        return self.inner(batch["x"], scale=scale)["logits"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, parts: list[Tensor], scale: float) -> dict[str, Tensor]:
        return {"logits": self.net(scale * torch.cat(parts, 1))}


@quiet
@pytest.mark.parametrize("call", ["outer", "inner"])
def test_keyword_and_nested_arguments(call: str) -> None:
    model, twin = Outer(), mlp()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    for seed in range(3):
        x, y = data(seed)
        opt.zero_grad()
        if call == "outer":
            z = model({"x": list(x.split(2, 1))}, scale=0.5)
        else:  # the deepest module that owns all layers, called by the loop
            z = model.inner(list(x.split(2, 1)), scale=0.5)["logits"]
        F.cross_entropy(z, y).backward()
        opt.step()
        other.zero_grad()
        F.cross_entropy(twin(0.5 * x), y).backward()
        other.step()
    assert_same(model.inner.net, twin, 1e-14)


@quiet
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
def test_rollout_starts_from_the_buffers_of_its_pass(value: str) -> None:
    """With an idle rate nothing moves, although the function depends on a buffer it changes."""
    base = mlp()
    model = nn.Sequential(base[0], base[1], Counter(), base[2], base[3], base[4])
    opt = DDPNOpt(model, lr=1e-9, value=value)
    opt.diagnose = True
    backward(model)
    opt.step()
    for layer in opt.last_step.layers:
        assert layer.feedback_norm < 1e-6 * layer.k_norm
