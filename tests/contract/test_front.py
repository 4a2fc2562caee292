# SPDX-License-Identifier: MIT
"""Samples weighted once in front of BatchNorm: the update is a re-weighted loss's exact gradient.

The references are plain autograd and torch.optim on copies of the model.
"""

from __future__ import annotations

import copy
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

LR, BATCH = 0.4, 12
DEPTHS = (True, "open_loop")
QUIET = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")


def mlp_bn() -> nn.Sequential:
    """BatchNorm between all layers; the boundary is the last layer's input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Linear(7, 4),
    ).double()


def last_bn() -> nn.Sequential:
    """BatchNorm is the last layer: the boundary is the output."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.BatchNorm1d(4)
    ).double()


def cnn_bn() -> nn.Sequential:
    """A convolution and two dense layers; the boundary is the first dense layer's input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.Tanh(),
        nn.Linear(5, 4),
    ).double()


#: The model, and where its front ends.
NETS: dict[str, Any] = {"mlp": (mlp_bn, 6), "cnn": (cnn_bn, 5), "last": (last_bn, 5)}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (BATCH,), generator=generator)


def take(model: nn.Module, opt: torch.optim.Optimizer, seed: int = 0) -> None:
    opt.zero_grad()
    x, y = batch(seed)
    F.cross_entropy(model(x), y).backward()
    opt.step()


def coefficients(opt: DDPNOpt) -> Tensor:
    assert opt.last_step is not None and opt.last_step.front is not None
    coefficient = opt.last_step.front.coefficient
    assert coefficient is not None
    return coefficient


def weighted_gradients(model: nn.Module, c: Tensor, seed: int) -> None:
    """The gradient of the loss with each sample's share multiplied by its coefficient."""
    x, y = batch(seed)
    (F.cross_entropy(model(x), y, reduction="none") * c).mean().backward()


def front_of(model: nn.Sequential, end: int) -> list[nn.Parameter]:
    return list(model[:end].parameters())


BORROWED: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": ({}, torch.optim.SGD, {}),
    "momentum": ({"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    "decay": ({"weight_decay": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
    "both": (
        {"momentum": 0.8, "weight_decay": 0.1},
        torch.optim.SGD,
        {"momentum": 0.8, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("borrowed", BORROWED)
@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("value", ["moreau", "gauss_newton"])
@QUIET
def test_front_takes_the_exact_gradient_of_the_weighted_loss(
    net: str, borrowed: str, feedback: Any, value: str
) -> None:
    """One coefficient a sample turns the loss into another; the front steps on its gradient."""
    build, end = NETS[net]
    options, kind, plain_options = BORROWED[borrowed]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, value=value, **options)
    plain = kind(front_of(twin, end), lr=LR, **plain_options)  # type: ignore[call-arg]
    for seed in range(3):
        take(model, opt, seed)
        twin.zero_grad()
        weighted_gradients(twin, coefficients(opt), seed)
        plain.step()
        for p, q in zip(front_of(model, end), front_of(twin, end), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
        twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_samples_are_bounded_and_differ(net: str, feedback: Any) -> None:
    """Otherwise the equality above would say nothing."""
    model = NETS[net][0]()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    take(model, opt)
    c = coefficients(opt)
    assert c.shape == (BATCH,) and bool((c > 0).all()) and float(c.min()) < 0.97
    assert float(c.max() - c.min()) > 1e-3


def boundary_gradients(model: nn.Sequential, end: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(B, ...) g at the boundary state, and the front's plain gradients."""
    x, y = batch(seed)
    state = model[:end](x)
    parameters = front_of(model, end)
    found = torch.autograd.grad(F.cross_entropy(model[end:](state), y), [state, *parameters])
    return found[0].flatten(1), list(found[1:])


@pytest.mark.parametrize("net", ["mlp", "cnn", "last"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@QUIET
def test_first_gain_is_the_plain_gradients(net: str, momentum: float) -> None:
    """S_i - S_above = K |g_i|^2 / w with K = life |gbar|^2 / sum |g|^2 and w = 1/B."""
    build, end = NETS[net]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, momentum=momentum)
    take(model, opt)
    g, plain = boundary_gradients(twin, end, 0)
    squares = g.square().sum(1)
    K = LR / (1 - momentum) * sum(float(p.square().sum()) for p in plain) / float(squares.sum())
    assert opt.last_step is not None and opt.last_step.front is not None
    # S grows on the way back: the first layer behind the boundary has the largest.
    above = opt.last_step.layers[0].S if opt.last_step.layers else torch.zeros(BATCH)
    S = opt.last_step.front.S
    assert S is not None and above is not None
    torch.testing.assert_close(S, above + K * BATCH * squares, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@QUIET
def test_gain_is_the_running_average_of_what_was_seen(
    net: str, feedback: Any, momentum: float
) -> None:
    """K / life = |d|^2 / sum |c g|^2 for SGD, averaged with decay 0.9; the next S uses it."""
    build, end = NETS[net]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, momentum=momentum, feedback=feedback)
    expected = None
    for seed in range(4):
        twin.load_state_dict(model.state_dict())
        g, _ = boundary_gradients(twin, end, seed)
        twin.load_state_dict(model.state_dict())
        take(model, opt, seed)
        squares = g.square().sum(1)
        assert opt.last_step is not None and opt.last_step.front is not None
        if expected is not None:
            K = expected * LR / (1 - momentum)
            layers = opt.last_step.layers
            above = layers[0].S if layers else torch.zeros(BATCH)
            assert above is not None and opt.last_step.front.S is not None
            torch.testing.assert_close(
                opt.last_step.front.S, above + K * BATCH * squares, rtol=1e-9, atol=1e-12
            )
        c = coefficients(opt)
        twin.zero_grad()
        weighted_gradients(twin, c, seed)
        d = sum(float(p.grad.square().sum()) for p in front_of(twin, end) if p.grad is not None)
        now = d / float((c.square() * squares).sum())
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert opt.engine.running["*"] == pytest.approx(expected, rel=1e-9)


@QUIET
def test_gain_follows_a_schedule_at_once() -> None:
    """K is kept per unit of the learning rate: a rate cut by 10 cuts the front's S by 10."""
    grown = []
    for factor in (1.0, 0.1):
        model = mlp_bn()
        opt = DDPNOpt(model, lr=LR)
        take(model, opt)
        opt.param_groups[0]["lr"] = LR * factor
        take(model, opt, 1)
        assert opt.last_step is not None and opt.last_step.front is not None
        S, above = opt.last_step.front.S, opt.last_step.layers[0].S
        assert S is not None and above is not None
        grown.append(S - above)
    torch.testing.assert_close(grown[1], 0.1 * grown[0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("curvature", ["identity", "rmsprop", "adamw"])
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_low_rank_equals_dense(curvature: str, feedback: Any) -> None:
    """The same quadratic value function in two forms, in front of the mixing, too."""
    nets = []
    for value in ("low_rank", "dense"):
        model = mlp_bn()
        opt = DDPNOpt(model, lr=0.02, curvature=curvature, value=value, feedback=feedback)
        for seed in range(3):
            take(model, opt, seed)
        nets.append(model)
    assert_same(*nets, tolerance=1e-8)


CURVATURES = ["identity", "rmsprop", "adamw", "kfac", "ekfac"]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_every_curvature_has_a_front_and_resumes_to_the_bit(curvature: str, feedback: Any) -> None:
    model = mlp_bn()
    opt = DDPNOpt(model, lr=0.02, curvature=curvature, feedback=feedback)
    for seed in range(3):
        take(model, opt, seed)
    assert opt.engine.running["*"] > 0
    other = mlp_bn()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    second = DDPNOpt(other, lr=0.02, curvature=curvature, feedback=feedback)
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(3, 6):
        take(model, opt, seed)
        take(other, second, seed)
    assert_same(model, other)
    assert opt.engine.running == second.engine.running


@pytest.mark.parametrize("curvature", ["rmsprop", "adamw"])
@QUIET
def test_scale_free_front_is_not_the_plain_step(curvature: str) -> None:
    """M is fed with the plain gradient; the re-weighting is not divided out again."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=0.05, curvature=curvature)
    off = DDPNOpt(twin, lr=0.05, curvature=curvature, feedback=False)
    for seed in range(2):
        take(model, opt, seed)
        take(twin, off, seed)
    assert float((model[0].weight - twin[0].weight).detach().abs().max()) > 1e-4


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
            reported = opt.engine._open_report
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
