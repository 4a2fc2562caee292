# SPDX-License-Identifier: MIT
"""The plain loop's promises around an optimizer that is somebody else's."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from ddpnopt import Feedback, NonFiniteError, UnsupportedModelError, open_loop
from wrapped.common import batch, dense

DEPTHS = [True, "open_loop", False]
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


def adamw(model: nn.Module, **options: Any) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), **{"lr": 0.05, **options})


def advance(model: nn.Module, opt: optim.Optimizer, numbers: Any = range(3)) -> None:
    for number in numbers:
        x, y = batch(model, number)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: Any, second: Any) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("depth", DEPTHS)
def test_hooks_of_wrapper_and_inner_run_once_a_step(depth: Any) -> None:
    model = dense()
    inner = adamw(model)
    opt = Feedback(model, inner, feedback=depth)
    seen: list[str] = []
    start = weights(model)
    for name, one in (("wrapper", opt), ("inner", inner)):
        one.register_step_pre_hook(
            lambda o, a, k, n=name: seen.append(f"{n} before {same(start, weights(model))}")
        )
        one.register_step_post_hook(
            lambda o, a, k, n=name: seen.append(f"{n} after {same(start, weights(model))}")
        )
    advance(model, opt, [0])
    assert seen == [
        "wrapper before True",
        "inner before True",
        "inner after False",
        "wrapper after False",
    ]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_pre_hook_that_clips(depth: Any) -> None:
    def run(hooked: bool) -> list[Tensor]:
        model = dense()
        inner = optim.SGD(model.parameters(), lr=2.0)
        opt = Feedback(model, inner, feedback=depth)
        if hooked:
            inner.register_step_pre_hook(
                lambda o, a, k: nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None
            )
        for number in range(3):
            x, y = batch(model, number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if not hooked:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
        return weights(model)

    assert same(run(True), run(False))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("kind", ["lambda", "onecycle"])
def test_schedulers(depth: Any, on: str, kind: str) -> None:
    model = dense()
    inner = adamw(model)
    opt = Feedback(model, inner, feedback=depth)
    assert isinstance(opt, optim.Optimizer)
    assert opt.param_groups is inner.param_groups
    target = opt if on == "wrapper" else inner
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "lambda":
            scheduler: Any = optim.lr_scheduler.LambdaLR(target, lambda n: 1 / (n + 1))
        else:
            scheduler = optim.lr_scheduler.OneCycleLR(target, 0.1, total_steps=5)
        rates = []
        for number in range(3):
            advance(model, opt, [number])
            scheduler.step()
            rates.append(inner.param_groups[0]["lr"])
    assert len(set(rates)) == 3
    assert rates[-1] == opt.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Rprop"])
def test_state_dict_resumes_to_the_bit(depth: Any, kind: str) -> None:
    def build() -> tuple[nn.Module, Feedback]:
        model = dense()
        return model, Feedback(
            model, getattr(optim, kind)(model.parameters(), lr=0.03), feedback=depth
        )

    model, opt = build()
    advance(model, opt, range(3))
    buffer = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other = build()
    twin.load_state_dict(saved["m"])
    other.load_state_dict(saved["o"])
    for one, o in ((model, opt), (twin, other)):
        advance(one, o, range(3, 6))
    assert same(weights(model), weights(twin))
    bare = getattr(optim, kind)(dense().parameters(), lr=0.5).state_dict()
    other.load_state_dict(bare)
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("depth", DEPTHS)
def test_closure_and_inner_load_after_construction(depth: Any) -> None:
    model, twin = dense(), dense()
    inner, other = adamw(model), adamw(twin)
    opt, second = Feedback(model, inner, feedback=depth), Feedback(twin, other, feedback=depth)
    advance(model, opt)
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.load_state_dict(copy.deepcopy(inner.state_dict()))
    x, y = batch(model, 7)

    def closure() -> Tensor:
        second.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        return loss

    assert float(second.step(closure).detach()) > 0
    advance(model, opt, [7])
    assert same(weights(model), weights(twin))


class Failing(optim.SGD):
    """Fails at the last parameter, having changed all others, its groups and itself."""

    armed = False
    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                if self.armed and p.shape == (3,):
                    self.calls = 9
                    raise RuntimeError("on purpose")
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("depth", DEPTHS)
def test_all_or_nothing_inside_the_inner_step(depth: Any) -> None:
    model = dense()
    inner = Failing(model.parameters(), lr=0.1)
    opt = Feedback(model, inner, feedback=depth)
    advance(model, opt)
    x, y = batch(model, 5)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    inner.armed = True
    with pytest.raises(RuntimeError, match="on purpose"):
        opt.step()
    assert same(before, weights(model))
    after = opt.state_dict()
    assert after["inner"] == state["inner"]
    assert inner.calls == 0
    assert inner.param_groups[0]["k"] == 3
    inner.armed = False
    advance(model, opt, [5])
    assert not same(before, weights(model))


@pytest.mark.parametrize("depth", DEPTHS)
def test_nonfinite(depth: Any) -> None:
    model = dense()
    hooks: list[str] = []
    inner = adamw(model)
    inner.register_step_post_hook(lambda o, a, k: hooks.append("after"))
    opt = Feedback(model, inner, feedback=depth, nonfinite="skip")
    advance(model, opt)
    before, x, y = weights(model), *batch(model, 4)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    next(model.parameters()).grad[0] = float("nan")
    opt.step()
    assert opt.skipped == 1
    assert len(hooks) == 3
    assert same(before, weights(model))
    strict = Feedback(model, inner, feedback=depth)
    strict.zero_grad()
    F.cross_entropy(model(x), y).backward()
    next(model.parameters()).grad[0] = float("nan")
    with pytest.raises(NonFiniteError, match="0"):
        strict.step()
    assert same(before, weights(model))


def spoil(model: nn.Module, opt: Any, value: float) -> Tensor:
    """Make one number of the last weight's first moment infinite, or none."""
    weight = [p for p in model.parameters() if p.dim() > 1][-1]
    opt.state[weight]["exp_avg"][0, 0] = value
    return weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_optimizer_whose_state_is_not_finite_is_not_wrapped(value: float) -> None:
    model = dense()
    inner = adamw(model)
    advance(model, inner)
    weight = spoil(model, inner, value)
    (name,) = (name for name, p in model.named_parameters() if p is weight)
    before, state = weights(model), copy.deepcopy(inner.state_dict())
    with pytest.raises(NonFiniteError, match=rf"state of '{name}' is not finite .*exp_avg.*clear"):
        Feedback(model, inner)
    assert same(before, weights(model)) and str(state) == str(inner.state_dict())
    inner.state[weight].clear()  # as it says
    advance(model, Feedback(model, inner))
    assert all(bool(t.isfinite().all()) for t in weights(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_state_that_is_not_finite_is_named_at_the_step(depth: Any, value: float) -> None:
    model = dense()
    inner = adamw(model)
    opt = Feedback(model, inner, feedback=depth)
    advance(model, opt)
    weight = spoil(model, inner, value)
    (name,) = (name for name, p in model.named_parameters() if p is weight)
    before, state = weights(model), copy.deepcopy(inner.state_dict())
    with pytest.raises(NonFiniteError, match=rf"state of '{name}' is not finite .*exp_avg.*clear"):
        advance(model, opt, [4])
    assert same(before, weights(model)) and str(state) == str(inner.state_dict())
    inner.state[weight].clear()
    advance(model, opt, [4])
    assert not same(before, weights(model))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_state_that_overflows_in_the_step_was_finite_before(depth: Any) -> None:
    model = dense()
    inner = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = Feedback(model, inner, feedback=depth)
    advance(model, opt)
    weight = next(model.parameters())
    inner.state[weight]["momentum_buffer"].fill_(3e38)
    x, y = batch(model, 4)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    weight.grad = torch.full_like(weight, 3e38)
    with pytest.raises(NonFiniteError, match="new weights of .* are not finite"):
        opt.step()
    assert bool(inner.state[weight]["momentum_buffer"].isfinite().all())


def test_half_copies_are_refused_and_detach_leaves_the_inner_optimizer() -> None:
    model, twin = dense(), dense()
    opt, plain = Feedback(model, adamw(model)), adamw(twin)
    with pytest.raises(TypeError, match="can't be copied by half"):
        copy.copy(opt)
    assert "AdamW" in repr(opt) or "lr: 0.05" in repr(opt)
    with opt:
        pass
    advance(model, opt)
    advance(twin, plain)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("depth", DEPTHS)
def test_dropping_frees(depth: Any) -> None:
    model = dense()
    inner = adamw(model)
    opt = Feedback(model, inner, feedback=depth)
    advance(model, opt)
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    optimizer = weakref.ref(inner)
    del inner
    gc.collect()
    assert optimizer() is None


def test_the_handle_lives_with_its_optimizer() -> None:
    model, twin = dense(), dense()
    inner = adamw(model)
    handle = weakref.ref(open_loop(model, inner))
    advance(model, inner)
    assert handle().last_step.depth == "open_loop"
    with pytest.raises(UnsupportedModelError, match="remove"):
        open_loop(model, inner)
    with pytest.raises(UnsupportedModelError, match="remove"):
        Feedback(model, inner)
    handle().remove()
    gc.collect()
    assert handle() is None
    other = adamw(twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(inner.state_dict()))
    for one, o in ((model, inner), (twin, other)):
        advance(one, o)
    assert same(weights(model), weights(twin))
    open_loop(model, inner)
    ref = weakref.ref(inner)
    del inner
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["open_loop", "handle", True])
def test_grad_scaler(fused: bool, way: Any) -> None:
    """A power of two as scale: the same as without it; an overflow skips the step."""

    def run(scaled: bool) -> tuple[nn.Module, list[Tensor]]:
        model = dense()
        inner = adamw(model, fused=fused)
        opt: Any = inner
        if way == "handle":
            open_loop(model, inner)
        else:
            opt = Feedback(model, inner, feedback=way)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for number in range(3):
            x, y = batch(model, number)
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(opt)
            scaler.update()
        before = weights(model)
        if scaled:
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            next(model.parameters()).grad[0] = float("inf")
            scaler.step(opt)
            assert same(before, weights(model))
        return model, before

    for a, b in zip(run(True)[1], run(False)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_groups_added_and_several_optimizers(depth: Any) -> None:
    model = dense()
    inner = optim.SGD(model[0].parameters(), lr=0.1)
    opt = Feedback(model, inner, feedback=depth)
    opt.add_param_group({"params": list(model[2].parameters()), "lr": 0.2})
    with pytest.raises(ValueError, match="model"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(inner.param_groups) == 2
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        advance(model, opt)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert moved == [True] * 4 + [False] * 2
