# SPDX-License-Identifier: MIT
"""Which forward pass a step belongs to, and that no other pass leaves anything alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from oracles.common import assert_same, data, mlp

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

FEEDBACKS = [True, "open_loop", False]
LR = 0.7


def backward(model: nn.Module, seed: int = 0) -> None:
    x, y = data(seed)
    F.cross_entropy(model(x), y).backward()


def fresh(feedback: object) -> tuple[nn.Sequential, DDPNOpt]:
    model = mlp()
    return model, DDPNOpt(model, lr=LR, feedback=feedback)


def expected(feedback: object, *seeds: int) -> nn.Sequential:
    model, opt = fresh(feedback)
    for seed in seeds:
        opt.zero_grad()
        backward(model, seed)
        opt.step()
    return model


def clear_by_hand(model: nn.Module, opt: DDPNOpt) -> None:
    for p in model.parameters():
        p.grad = None


CLEARS: dict[str, Callable[[nn.Module, DDPNOpt], None]] = {
    "optimizer": lambda model, opt: opt.zero_grad(),
    "optimizer_zeros": lambda model, opt: opt.zero_grad(set_to_none=False),
    "model": lambda model, opt: model.zero_grad(),
    "model_zeros": lambda model, opt: model.zero_grad(set_to_none=False),
    "by_hand": clear_by_hand,
}


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_zero_grad_anywhere(feedback: object, clear: str, place: str) -> None:
    model, opt = fresh(feedback)
    for seed in range(3):
        x, y = data(seed)
        if place == "before":
            CLEARS[clear](model, opt)
        z = model(x)
        if place == "between":
            CLEARS[clear](model, opt)
        F.cross_entropy(z, y).backward()
        opt.step()
        if place == "after":
            CLEARS[clear](model, opt)
    assert_same(model, expected(feedback, 0, 1, 2))


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("place", ["before", "between"])
def test_skipped_step(feedback: object, clear: str, place: str) -> None:
    """A backward whose gradients are cleared without a step does not count."""
    model, opt = fresh(feedback)
    backward(model, 5)
    x, y = data(0)
    if place == "before":
        CLEARS[clear](model, opt)
    z = model(x)
    if place == "between":
        CLEARS[clear](model, opt)
    F.cross_entropy(z, y).backward()
    opt.step()
    assert_same(model, expected(feedback, 0), 1e-15)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_forward_without_backward(feedback: object) -> None:
    model, opt = fresh(feedback)
    model(data(7)[0])
    backward(model, 0)
    model(data(8)[0])
    opt.step()
    assert_same(model, expected(feedback, 0))


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_record_belongs_to_the_output_that_gets_gradients(feedback: object) -> None:
    model, opt = fresh(feedback)
    (x, y), (other, _) = data(0), data(3)
    z = model(x)
    unused = model(other)
    F.cross_entropy(z, y).backward()
    opt.step()
    del unused
    assert_same(model, expected(feedback, 0))


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_evaluation_between(feedback: object) -> None:
    model, opt = fresh(feedback)
    x, y = data(0)

    def evaluate() -> None:
        model.eval()
        model(data(4)[0])
        with torch.no_grad():
            model(data(5)[0])
        with torch.inference_mode():
            model(data(6)[0])
        model.train()
        with torch.no_grad():
            model(data(6)[0])

    evaluate()
    z = model(x)
    evaluate()
    F.cross_entropy(z, y).backward()
    evaluate()
    opt.step()
    assert_same(model, expected(feedback, 0))


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_training_in_eval_mode(feedback: object) -> None:
    """Fine-tuning with the model in eval mode is training all the same: gradients flowed."""
    model, opt = fresh(feedback)
    model.eval()
    backward(model, 0)
    opt.step()
    assert_same(model, expected(feedback, 0))


class Bridge(torch.autograd.Function):
    """Identity whose output lives in a NumPy array: any alias of its storage keeps that alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[weakref.ref]) -> Tensor:
        array = np.array(x.detach().numpy())
        seen.append(weakref.ref(array))
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class Probe(nn.Module):
    """Makes the activations that pass through it observable."""

    def __init__(self, seen: list[weakref.ref]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        return Bridge.apply(x, self.seen)


def probed(feedback: object, **options: object) -> tuple[nn.Sequential, DDPNOpt, list[weakref.ref]]:
    seen: list[weakref.ref] = []
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6),
        nn.Tanh(),
        Probe(seen),
        nn.Linear(6, 5),
        Probe(seen),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    return model, DDPNOpt(model, lr=LR, feedback=feedback, **options), seen  # type: ignore[arg-type]


def alive(seen: list[weakref.ref]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in seen)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_forward_alone_leaves_nothing_alive(feedback: object) -> None:
    model, opt, seen = probed(feedback)
    for seed in range(3):
        model(data(seed)[0])
    assert len(seen) == 6 and alive(seen) == 0
    backward(model)
    opt.step()
    model(data(3)[0])
    assert alive(seen) == 0


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_forward_alone_is_freed_without_the_garbage_collector(feedback: object) -> None:
    """No reference cycle: memory must not wait for a collection."""
    model, opt, seen = probed(feedback)
    gc.collect()
    gc.disable()
    try:
        model(data(0)[0])
        assert sum(ref() is not None for ref in seen) == 0
    finally:
        gc.enable()
    opt.detach()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_evaluation_leaves_nothing_alive(feedback: object) -> None:
    model, opt, seen = probed(feedback)
    model.eval()
    with torch.no_grad():
        z = model(data(0)[0])
    assert alive(seen) == 0
    assert z.shape == (6, 3)
    opt.detach()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_finished_step_leaves_nothing_alive(feedback: object) -> None:
    model, opt, seen = probed(feedback)
    for seed in range(2):
        opt.zero_grad()
        backward(model, seed)
        opt.step()
    assert alive(seen) == 0


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("clear", CLEARS)
def test_skipped_steps_leave_nothing_alive(feedback: object, clear: str) -> None:
    model, opt, seen = probed(feedback)
    for seed in range(6):
        CLEARS[clear](model, opt)
        backward(model, seed)
    assert alive(seen) <= 2  # the last pass may still be stepped
    CLEARS[clear](model, opt)
    backward(model, 9)
    opt.step()
    assert alive(seen) == 0


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_loss_kept_by_the_loop_does_not_keep_the_record(feedback: object) -> None:
    model, opt, seen = probed(feedback)
    x, y = data(0)
    z = model(x)
    loss = F.cross_entropy(z, y)
    loss.backward()
    opt.step()
    kept = [loss.detach(), z.detach()]
    del loss, z
    assert alive(seen) == 0
    assert len(kept) == 2


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_dropped_optimizer_is_freed(feedback: object) -> None:
    """Hooks hold the optimizer weakly; the model trains on as if it had never been."""
    model, opt, seen = probed(feedback)
    backward(model)
    opt.step()
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    model.zero_grad()
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    assert alive(seen) == 0
