# SPDX-License-Identifier: MIT
"""The training loop's contract where samples are weighted once, in front of BatchNorm."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, NonFiniteError
from ddpnopt.value import Moreau
from oracles.common import assert_same, assert_unchanged, snapshot
from oracles.fronts import (
    BATCH,
    DEPTHS,
    LR,
    NETS,
    batch,
    coefficients,
    front_of,
    mlp_bn,
    take,
    weighted_gradients,
)

QUIET = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")


@pytest.mark.parametrize("curvature", ["identity", "rmsprop", "adamw"])
def test_without_feedback_it_is_torch_to_the_bit(curvature: str) -> None:
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=0.02, curvature=curvature, feedback=False)
    other = {
        "identity": lambda: torch.optim.SGD(twin.parameters(), lr=0.02),
        "rmsprop": lambda: torch.optim.RMSprop(twin.parameters(), lr=0.02),
        "adamw": lambda: torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.0),
    }[curvature]()
    for seed in range(4):
        take(model, opt, seed)
        take(twin, other, seed)
    assert_same(model, twin)


@QUIET
def test_plain_gradients_stay_in_closed_loop() -> None:
    """And they hold the re-weighted ones in open loop."""
    model, open_model, twin = mlp_bn(), mlp_bn(), mlp_bn()
    x, y = batch()
    for net in (model, open_model):
        opt = DDPNOpt(net, lr=LR, feedback=net is model or "open_loop")
        F.cross_entropy(net(x), y).backward()
        if net is open_model:
            reported = opt.engine.open_report
            assert reported is not None and reported.front is not None
            c = reported.front.coefficient
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    twin.zero_grad()
    assert c is not None
    weighted_gradients(twin, c, 0)
    for p, q in zip(front_of(open_model, 6), front_of(twin, 6), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("feedback", DEPTHS)
def test_evaluation_mode_needs_no_front(feedback: Any) -> None:
    """BatchNorm with stored statistics keeps samples apart: every layer has its feedback."""
    model = mlp_bn().eval()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DDPNOptWarning)
        take(model, opt)
    assert opt.last_step is not None and opt.last_step.front is None
    assert {"0", "3", "6"} <= {layer.name for layer in opt.last_step.layers}


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_two_passes_are_two_weightings(feedback: Any) -> None:
    """Accumulation: each pass has its own BatchNorm statistics and its own coefficients."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    found: list[Tensor] = []
    opt.zero_grad()
    for seed in (0, 1):
        x, y = batch(seed)
        (F.cross_entropy(model(x), y) / 2).backward()
        front = opt.engine.recorder.arrivals.completed[-1].front  # type: ignore[union-attr]
        assert front is not None
        found.append(front.coefficient)
    opt.step()
    for seed, c in zip((0, 1), found, strict=True):
        weighted_gradients(twin, c / 2, seed)
    for p, q in zip(front_of(model, 6), front_of(twin, 6), strict=True):
        torch.testing.assert_close(p, q - LR * q.grad, rtol=1e-11, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_scaled_losses_step_as_unscaled_ones(feedback: Any) -> None:
    """As GradScaler does: the loss times 1024, p.grad divided again before the step."""
    model, twin = mlp_bn(), mlp_bn()
    scaled = DDPNOpt(model, lr=LR, feedback=feedback, terminal="cross_entropy")
    opt = DDPNOpt(twin, lr=LR, feedback=feedback, terminal="cross_entropy")
    for seed in range(5):
        scaled.zero_grad()
        x, y = batch(seed)
        (F.cross_entropy(model(x), y) * 1024).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.grad.div_(1024)  # type: ignore[union-attr]
        scaled.step()
        take(twin, opt, seed)
        if seed == 0:  # the first step cannot know the scale that will be divided out
            twin.load_state_dict(model.state_dict())
            opt.engine.running = dict(scaled.engine.running)
    assert float(coefficients(opt).min()) < 0.97
    torch.testing.assert_close(coefficients(scaled), coefficients(opt), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_clipping_shrinks_the_whole_step(feedback: Any) -> None:
    """p.grad times r steps by r times the weighted gradient."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    opt.step()
    r = opt.engine.rescale
    assert r < 0.9
    weighted_gradients(twin, coefficients(opt), 0)
    for p, q in zip(front_of(model, 6), front_of(twin, 6), strict=True):
        torch.testing.assert_close(p, q - LR * r * q.grad, rtol=1e-6, atol=1e-9)  # type: ignore[operator]


@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("stepped", [True, False])
@QUIET
def test_graph_dies_with_its_step(feedback: Any, stepped: bool) -> None:
    """Neither the recorded pass nor a state inside the front outlives the step."""
    model = mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    held: list[weakref.ref[Any]] = []
    model[2].register_forward_hook(lambda _m, _i, out: held.append(weakref.ref(out)))
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    trajectory = weakref.ref(opt.engine.recorder.arrivals.completed[-1])  # type: ignore[union-attr]
    del loss
    if stepped:
        opt.step()
    else:
        opt.zero_grad()
    gc.collect()
    assert trajectory() is None
    assert held and held[0]() is None


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_optimizer_and_model_die(feedback: Any) -> None:
    """A dropped optimizer with its model is freed by the collector at the latest."""
    model = mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    take(model, opt)
    references = [weakref.ref(model), weakref.ref(opt)]
    del model, opt
    gc.collect()
    assert [r() for r in references] == [None, None]


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_failed_step_changes_nothing(feedback: Any) -> None:
    """Weights, statistics and K of the front are put back; the next step works."""
    model = mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    take(model, opt)
    running = dict(opt.engine.running)
    x, y = batch(1)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    opt.param_groups[0]["lr"] = 1e308
    with pytest.raises(NonFiniteError):
        for p in model.parameters():
            p.grad.mul_(1e10)  # type: ignore[union-attr]
        opt.step()
    assert_unchanged(model, before)
    assert opt.engine.running == running
    opt.param_groups[0]["lr"] = LR
    take(model, opt, 2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_backward_twice_through_one_graph_adds_up(feedback: Any) -> None:
    """retain_graph: half the loss twice is the loss once, up to what S sees of it."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    weighted_gradients(twin, coefficients(opt), 0)
    for p, q in zip(front_of(model, 6), front_of(twin, 6), strict=True):
        assert bool(p.isfinite().all())
        moved, gradient = (q - p).detach().flatten(), q.grad.flatten()  # type: ignore[union-attr]
        if float(gradient.norm()) > 1e-9:
            assert float(F.cosine_similarity(moved, gradient, dim=0)) > 0.9


@pytest.mark.parametrize("net", NETS)
def test_front_is_reported_and_told_once(net: str) -> None:
    build, end = NETS[net]
    model = build()
    opt = DDPNOpt(model, lr=LR)
    with pytest.warns(DDPNOptWarning, match="weighted once.*samples are mixed.*BatchNorm") as told:
        for seed in range(3):
            take(model, opt, seed)
    assert sum("weighted once" in str(w.message) for w in told) == 1
    report = opt.last_step
    assert report is not None and report.front is not None and report.depth == "closed_loop"
    place = "the output" if end == len(model) else f"'{end}'"
    assert place in str(told[0].message)
    names = {name for name, _ in report.plain}
    assert {str(i) for i, m in enumerate(model[:end]) if list(m.parameters())} <= names
    assert report.front.coefficient_mean is not None and 0 < report.front.coefficient_mean <= 1
    assert report.front.S_mean is not None and report.front.S_mean > 0


@QUIET
def test_weight_zero_strength_is_the_plain_step() -> None:
    """Without damping every coefficient is one, in front of the mixing, too."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=LR, value=Moreau(strength=0.0), feedback="open_loop")
    sgd = torch.optim.SGD(twin.parameters(), lr=LR)
    for seed in range(3):
        take(model, opt, seed)
        take(twin, sgd, seed)
    torch.testing.assert_close(coefficients(opt), torch.ones(BATCH, dtype=torch.float64))
    assert_same(model, twin, tolerance=1e-12)
