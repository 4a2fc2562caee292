# SPDX-License-Identifier: MIT
"""All or nothing: whatever fails in a step, and wherever, nothing has happened.

`DDPNOPT_FAULTS=1` injects a fault at every operation (half an hour) instead of some of them.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ddpnopt import reweighting
from ddpnopt.modes import Quiet, quiet
from reliability.faults import (
    MODELS,
    OPTIMIZERS,
    Fault,
    Interrupt,
    Rig,
    differences,
    stride,
)

KINDS = (torch.OutOfMemoryError, KeyboardInterrupt)
#: What a failed forward or backward pass leaves alone; p.grad and randomness are torch's affair.
LASTING = {"state", "options", "members", "hooks", "tensor_hooks", "dispatch_modes", "training"}
LASTING |= {"grad_enabled", "autocast", "fused"}
#: Objects differ between twins.
OWN = {"buffers", "members"}


@pytest.fixture(autouse=True)
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(model: str, optimizer: str) -> tuple[Rig, Rig]:
    """Two alike, two steps old."""
    rigs = Rig.of(model, optimizer), Rig.of(model, optimizer)
    for seed in range(2):
        for rig in rigs:
            torch.manual_seed(seed)
            rig.iterate(seed)
    return rigs


def same_next_step(rig: Rig, twin: Rig, seed: int) -> None:
    """Both go on, and end where the other does."""
    for one in (rig, twin):
        torch.manual_seed(seed)
        one.iterate(seed)
    apart = set(differences(twin.everything(), rig.everything())) - OWN
    assert not apart, apart


def ready(*rigs: Rig) -> None:
    """Everything for a step is there."""
    for rig in rigs:
        torch.manual_seed(77)
        rig.opt.zero_grad()
        rig.forward(5).backward()


def faults_in_step(model: str, optimizer: str, every: int, first: int) -> int:
    """Faults injected, until one comes too late; each must change nothing."""
    rig, twin = pair(model, optimizer)
    number, count = first, 0
    while True:
        ready(rig, twin)
        before = rig.everything()
        kind = KINDS[count % 2]
        try:
            with Fault(number, kind) as fault:
                rig.step()
        except kind as error:
            assert "injected" in str(error)
            changed = differences(before, rig.everything())
            assert not changed, (number, str(error), changed)
        else:
            assert fault.count < number
            return count
        same_next_step(rig, twin, 6 + count % 5)
        number, count = number + every, count + 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_in_a_step(model: str, optimizer: str) -> None:
    """Out of memory, or Ctrl-C, instead of any operation of torch."""
    shift = 7 * list(OPTIMIZERS).index(optimizer) + 3 * list(MODELS).index(model)
    every = stride(1597 if model == "transformer" else 797)
    assert faults_in_step(model, optimizer, every, 1 + shift % every) or every > 1


@pytest.mark.parametrize("optimizer", ["identity", "low_rank", "open_kfac", "without_gradients"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_in_forward_and_backward(model: str, optimizer: str, phase: str) -> None:
    """Also inside the library's own hooks; p.grad is torch's affair until zero_grad."""
    rig, twin = pair(model, optimizer)
    number, count = 1, 0
    while True:
        kind = KINDS[count % 2]
        rig.opt.zero_grad()
        before = rig.everything()
        try:
            if phase == "forward":
                with Fault(number, kind):
                    rig.forward(5)
            else:
                loss = rig.forward(5)
                with Fault(number, kind):
                    loss.backward()
        except kind:
            changed = LASTING & set(differences(before, rig.everything()))
            assert not changed, (number, changed)
        else:
            break
        rig.model.load_state_dict(before["tensors"])  # BatchNorm has seen a batch more
        same_next_step(rig, twin, 6 + count % 5)
        assert not _get_current_function_mode_stack()
        number, count = number + stride(17 if phase == "forward" else 179), count + 1
    assert count


@pytest.mark.parametrize("optimizer", ["identity", "feedback_adamw", "open_identity"])
@pytest.mark.parametrize("model", ["mlp", "residual"])
def test_interrupts_between_calls(model: str, optimizer: str) -> None:
    """Ctrl-C wherever Python lets it in: the step has not begun, or is over."""
    rig, twin = pair(model, optimizer)
    number, count = 1, 0
    while True:
        ready(rig, twin)
        before = rig.everything()
        try:
            with Interrupt(number) as interrupt:
                rig.opt.step()
        except KeyboardInterrupt:
            if differences(before, rig.everything()):
                twin.opt.step()
                apart = set(differences(twin.everything(), rig.everything())) - OWN
                assert not apart, (number, apart)
        else:
            assert not interrupt.fired
            break
        same_next_step(rig, twin, 6 + count % 5)
        number, count = number + stride(1907), count + 1
    assert count


class Bomb:
    """A user's hook that raises at the chosen call."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.armed, self.ran = error, False, False

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.ran = True
        if self.armed:
            raise self.error("boom")


@pytest.mark.parametrize("optimizer", ["identity", "feedback_momentum"])
@pytest.mark.parametrize("model", MODELS)
def test_modules_that_raise(model: str, optimizer: str) -> None:
    """At every module of the second forward pass, and of several interleaved ones."""
    rig, twin = pair(model, optimizer)
    for number, (name, module) in enumerate(list(rig.model.named_modules())[1:]):
        error = (RuntimeError, KeyboardInterrupt)[number % 2]
        bomb = Bomb(error)
        handle = module.register_forward_pre_hook(bomb)
        for one in (rig, twin):
            torch.manual_seed(77)
            one.opt.zero_grad()
            for seed in range(1 + (number + len(optimizer)) // 2 % 2):
                one.forward(seed).backward()
        before = rig.everything()
        bomb.armed = bomb.ran  # some modules lend only their weights to a function
        if bomb.armed:
            with pytest.raises(error, match="boom"):
                rig.opt.step()
            assert not differences(before, rig.everything()), name
        handle.remove()
        same_next_step(rig, twin, 8)


def test_an_interrupted_pass_is_forgotten() -> None:
    """Torch runs no hook where Ctrl-C ends a forward pass; the next call of the model cleans up."""
    rig, _ = pair("residual", "without_gradients")
    bomb = Bomb(KeyboardInterrupt)
    handle = rig.model.inner.register_forward_hook(lambda m, a, h: bomb(m, a))
    wanted = [p.requires_grad for p in rig.model.parameters()]
    for clean in ("eval", "zero_grad", "train", "detach"):
        bomb.armed = True
        with pytest.raises(KeyboardInterrupt):
            rig.forward(3)
        bomb.armed = False
        torch.ones(2) + 1  # passes through, whatever is left
        if clean == "eval":
            with torch.no_grad():
                rig.forward(3)
            assert not _get_current_function_mode_stack()
            rig.opt.zero_grad()
        elif clean == "zero_grad":
            rig.opt.zero_grad()
        elif clean == "train":
            rig.iterate(4)
        else:
            rig.opt.detach()
        assert not _get_current_function_mode_stack(), clean
        assert [p.requires_grad for p in rig.model.parameters()] == wanted, clean
    handle.remove()


def test_a_backward_pass_that_did_not_end_is_not_stepped_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In open loop some gradients may be re-weighted and others not."""
    rig, twin = pair("mlp", "open_rmsprop")
    rig.opt.zero_grad()
    loss = rig.forward(3)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(reweighting, "write", fail)
        loss.backward()
    before = rig.everything()
    with pytest.raises(RuntimeError, match="zero_grad"):
        rig.opt.step()
    assert not differences(before, rig.everything())
    same_next_step(rig, twin, 4)


def test_a_state_can_be_loaded_again_and_again() -> None:
    """Torch adds to the defaults as it loads; that is no option which a saved group must have."""
    rig, _ = pair("mlp", "rmsprop")
    state = rig.opt.state_dict()
    for _ in range(3):
        rig.opt.load_state_dict(state)
    rig.iterate(3)


def test_the_injection_is_seen() -> None:
    """The harness itself: an optimizer that is not all or nothing is found out."""
    torch.manual_seed(0)
    rig = Rig.of("mlp", "identity")
    rig.opt = torch.optim.SGD(rig.model.parameters(), 0.1, foreach=False)
    ready(rig)
    before = rig.everything()
    with pytest.raises(torch.OutOfMemoryError), Fault(3, torch.OutOfMemoryError):
        rig.opt.step()
    assert differences(before, rig.everything()) == ["tensors"]


def test_an_interrupt_before_a_quiet_block_leaves_torch_functions_enabled() -> None:
    """Dropped as it begins, it is closed late, when what stood around it has ended."""

    class Watch(Quiet):
        def call(self, func: Any, args: Any, kwargs: Any) -> Any:
            return func(*args, **kwargs)

        def asked(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
            return func(*args, **kwargs)

    watch = Watch()

    def interrupted(outer: AbstractContextManager[object]) -> None:
        with outer:
            block = quiet(watch)
            block.__enter__()
            raise KeyboardInterrupt

    for outer in (torch._C.DisableTorchFunction(), quiet(watch), nullcontext()):
        with pytest.raises(KeyboardInterrupt) as caught:
            interrupted(outer)
        del caught
        gc.collect()
        assert torch._C._is_torch_function_enabled() and watch.on
