# SPDX-License-Identifier: MIT
"""Hooks that turn inert on copies, detaching, and several optimizers side by side."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpnopt import DDPNOpt
from oracles.common import assert_same, data, distance, iterate, mlp

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

LR = 0.7


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [by_deepcopy, by_pickle, by_save]


def hooks(model: nn.Module) -> int:
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )
    count = sum(len(getattr(m, name, ())) for m in model.modules() for name in names)
    tensors = [len(p._backward_hooks or ()) for p in model.parameters()]
    overridden = sum("forward" in vars(m) for m in model.modules())
    return count + sum(tensors) + overridden


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("when", ["before", "forward", "after"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_copy_is_an_ordinary_model(copier: object, when: str, feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    x, y = data(0)
    twin = copier(model) if when == "before" else None
    loss = F.cross_entropy(model(x), y)
    if when == "forward":
        twin = copier(model)
    loss.backward()
    opt.step()
    if when == "after":
        twin = copier(model)
    reference = mlp()
    reference.load_state_dict(twin.state_dict())
    twin.zero_grad()
    iterate(twin, torch.optim.SGD(twin.parameters(), 0.1), range(3))
    iterate(reference, torch.optim.SGD(reference.parameters(), 0.1), range(3))
    assert_same(twin, reference)


@pytest.mark.parametrize("copier", COPIES)
def test_copy_does_not_disturb_the_original(copier: object) -> None:
    model, reference = mlp(), mlp()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(reference, lr=LR)
    x, y = data(0)
    z = model(x)
    twin = copier(model)
    F.cross_entropy(twin(data(3)[0]), data(3)[1]).backward()
    F.cross_entropy(z, y).backward()
    twin(data(4)[0])
    F.cross_entropy(twin(data(5)[0]), data(5)[1]).backward()
    opt.step()
    iterate(reference, other, [0])
    assert_same(model, reference)


@pytest.mark.parametrize("copier", COPIES)
def test_copy_takes_another_ddpnopt(copier: object) -> None:
    model = mlp()
    DDPNOpt(model, lr=LR)
    twin, reference = copier(model), mlp()
    iterate(twin, DDPNOpt(twin, lr=LR), range(3))
    iterate(reference, DDPNOpt(reference, lr=LR), range(3))
    assert_same(twin, reference)


def test_moving_average_of_the_weights() -> None:
    model, reference = mlp(), mlp()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(reference, lr=LR)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for seed in range(3):
        iterate(model, opt, [seed])
        average.update_parameters(model)
        average(data(seed)[0])
    iterate(reference, other, range(3))
    assert_same(model, reference)
    assert distance(average.module, model) > 0


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
def test_detach_removes_every_hook(feedback: object) -> None:
    model, reference = mlp(), mlp()
    assert hooks(model) == 0
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    iterate(model, opt, range(2))
    opt.detach()
    assert hooks(model) == 0
    opt.detach()  # twice is fine
    reference.load_state_dict(model.state_dict())
    model.zero_grad()
    iterate(model, torch.optim.SGD(model.parameters(), 0.1), range(2))
    iterate(reference, torch.optim.SGD(reference.parameters(), 0.1), range(2))
    assert_same(model, reference)


def test_context_manager_detaches() -> None:
    model, reference = mlp(), mlp()
    with DDPNOpt(model, lr=LR) as opt:
        iterate(model, opt, range(2))
    assert hooks(model) == 0
    iterate(reference, DDPNOpt(reference, lr=LR), range(2))
    assert_same(model, reference)
    other = mlp()
    with pytest.raises(ZeroDivisionError), DDPNOpt(other):
        raise ZeroDivisionError
    assert hooks(other) == 0


def test_detach_keeps_the_users_hooks() -> None:
    model = mlp()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = hooks(model)
    opt = DDPNOpt(model, lr=LR)
    opt.detach()
    assert hooks(model) == before
    model(data()[0])
    assert calls == [1]


def test_second_optimizer_after_the_first_was_dropped() -> None:
    model, reference = mlp(), mlp()
    opt = DDPNOpt(model, lr=0.1)
    del opt
    gc.collect()
    iterate(model, DDPNOpt(model, lr=LR), range(2))
    iterate(reference, DDPNOpt(reference, lr=LR), range(2))
    assert_same(model, reference)


def test_idle_optimizer_on_the_same_model() -> None:
    model, reference = mlp(), mlp()
    idle = DDPNOpt(model, lr=0.1)
    iterate(model, DDPNOpt(model, lr=LR), range(2))
    iterate(reference, DDPNOpt(reference, lr=LR), range(2))
    assert_same(model, reference)
    assert idle.param_groups[0]["lr"] == 0.1


def test_head_with_ddpnopt_and_body_with_torch() -> None:
    """An optimizer on a part of the model sees that part as its model."""
    base, reference = mlp(), mlp()
    body, head = base[:2], base[2:]
    reference_body, reference_head = reference[:2], reference[2:]
    opt = DDPNOpt(head, lr=LR)
    sgd = torch.optim.SGD(body.parameters(), 0.1)
    other = DDPNOpt(reference_head, lr=LR)
    plain = torch.optim.SGD(reference_body.parameters(), 0.1)
    for seed in range(3):
        x, y = data(seed)
        opt.zero_grad(), sgd.zero_grad()
        F.cross_entropy(head(body(x)), y).backward()
        opt.step(), sgd.step()
        # The reference's head alone, on features that carry no graph.
        other.zero_grad(), plain.zero_grad()
        features = reference_body(x)
        leaf = features.detach().requires_grad_()
        F.cross_entropy(reference_head(leaf), y).backward()
        features.backward(leaf.grad)
        other.step(), plain.step()
    assert_same(base, reference, 1e-14)
    assert [layer.name for layer in opt.last_step.layers] == ["2", "4"]


@pytest.mark.parametrize("order", ["head_first", "body_first"])
def test_two_on_one_model(order: str) -> None:
    """Each owns some of the parameters; both step once an iteration."""
    model = mlp()
    first = DDPNOpt(model, lr=LR, params=model[2:].parameters())
    second = DDPNOpt(model, lr=0.1, params=model[:2].parameters(), feedback=False)
    opts = (first, second) if order == "head_first" else (second, first)
    start = mlp()
    for seed in range(3):
        x, y = data(seed)
        for opt in opts:
            opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for opt in opts:
            opt.step()
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, q)


def test_two_on_one_model_first_step() -> None:
    """The head's optimizer steps as if the body were frozen; the body's is plain SGD."""
    model, frozen, plain = mlp(), mlp(), mlp()
    frozen[0].requires_grad_(False)
    first = DDPNOpt(model, lr=LR, params=model[2:].parameters())
    second = DDPNOpt(model, lr=0.1, params=model[:2].parameters(), feedback=False)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    first.step()
    second.step()
    iterate(frozen, DDPNOpt(frozen, lr=LR), [0])
    iterate(plain, torch.optim.SGD(plain.parameters(), 0.1), [0])
    assert_same(model[2:], frozen[2:], 1e-14)
    assert_same(model[:2], plain[:2], 1e-15)
