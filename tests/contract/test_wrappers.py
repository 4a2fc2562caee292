# SPDX-License-Identifier: MIT
"""Checkpointing, compilation and distributed training: exact, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ddpnopt import DDPNOpt
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_same, assert_unchanged, data, iterate, mlp, snapshot

LR = 0.7
quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


class Checkpointed(nn.Module):
    """Some of the layers are recomputed inside backward."""

    def __init__(self, reentrant: bool, start: int = 2, stop: int = 4) -> None:
        super().__init__()
        self.net = mlp()
        self.reentrant, self.start, self.stop = reentrant, start, stop

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[: self.start](x)
        block = self.net[self.start : self.stop]
        x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.net[self.stop :](x)


@quiet
@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("block", [(2, 4), (0, 3), (1, 5), (0, 5)])
def test_non_reentrant_checkpointing(
    feedback: object, value: object, block: tuple[int, int]
) -> None:
    model, twin = Checkpointed(False, *block), mlp()
    iterate(model, DDPNOpt(model, lr=LR, feedback=feedback, value=value), range(3))
    iterate(twin, DDPNOpt(twin, lr=LR, feedback=feedback, value=value), range(3))
    assert_same(model.net, twin, 1e-14)


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_checkpointing_without_weight_gradients(feedback: object) -> None:
    model, twin = Checkpointed(False), mlp()
    options = {"lr": LR, "feedback": feedback, "value": Moreau(coupling=False)}
    iterate(model, DDPNOpt(model, weight_gradients=False, **options), range(3))
    iterate(twin, DDPNOpt(twin, **options), range(3))
    assert_same(model.net, twin, 1e-11)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_reentrant_checkpointing_is_refused(feedback: object) -> None:
    model = Checkpointed(True)
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"(?i)reentrant"):
        iterate(model, opt, [0])
    assert_unchanged(model, before)


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.net, 2, x, use_reentrant=False)


@quiet
def test_checkpoint_sequential() -> None:
    model, twin = Segments(), mlp()
    iterate(model, DDPNOpt(model, lr=LR), range(2))
    iterate(twin, DDPNOpt(twin, lr=LR), range(2))
    assert_same(model.net, twin, 1e-14)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["compiled", "plain"])
def test_compiled_is_right_or_refused(feedback: object, backend: str, given: str) -> None:
    model, twin = mlp(), mlp()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    before = snapshot(model)
    try:
        opt = DDPNOpt(compiled if given == "compiled" else model, lr=LR, feedback=feedback)
        iterate(compiled, opt, range(3))
    except RuntimeError as error:
        assert "compile" in str(error)
        assert_unchanged(model, before)
        return
    iterate(twin, DDPNOpt(twin, lr=LR, feedback=feedback), range(3))
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_distributed_without_a_group_is_refused(
    feedback: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="distributed"):
        iterate(model, DDPNOpt(model, lr=LR, feedback=feedback), [0])
    assert_unchanged(model, before)


def test_distributed_without_a_group_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    iterate(model, opt, [0])
    before = snapshot(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(UnsupportedModelError, match="distributed"):
        iterate(model, opt, [1])
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_gradient_penalty_or_refused(feedback: object) -> None:
    """A loss that differentiates through the model's input is no loss of the output alone."""
    model = mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    before = snapshot(model)
    x, y = data()
    x.requires_grad_()
    try:
        z = model(x)
        (g,) = torch.autograd.grad(F.cross_entropy(z, y), x, create_graph=True)
        (F.cross_entropy(z, y) + g.pow(2).sum()).backward()
        opt.step()
    except UnsupportedModelError as error:
        assert str(error)
        assert_unchanged(model, before)
        return
    twin = mlp()
    sgd = torch.optim.SGD(twin.parameters(), LR)
    x = x.detach().requires_grad_()
    z = twin(x)
    (g,) = torch.autograd.grad(F.cross_entropy(z, y), x, create_graph=True)
    (F.cross_entropy(z, y) + g.pow(2).sum()).backward()
    sgd.step()
    assert_same(model, twin, 1e-12)
