# SPDX-License-Identifier: MIT
"""Random nets, options and batches: a right step, or an error that names what is wrong.

Never a weight or state that is not finite, never a change where there was an error.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import PAPER, DDPNOpt, Feedback
from ddpnopt.errors import NonFiniteError, TerminalError, UnsupportedModelError
from oracles.common import assert_same
from oracles.effort import effort

EXAMPLES = effort("DDPNOPT_EXAMPLES", 20, 200)
NAMED = (NonFiniteError, TerminalError, UnsupportedModelError)
CLASSES = 3
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Hardtanh)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RATES = st.one_of(st.sampled_from([1e-12, 0.1, 1.0, 1e6]), st.floats(1e-12, 1e6))


@st.composite
def dense(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Dense nets, also over (B, T, d), some with a width of 0."""
    widths = [draw(st.integers(1, 4)), *draw(st.lists(st.integers(0, 5), max_size=3))]
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers.append(nn.Linear(i, o, bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))(inplace=draw(st.booleans())))
    layers.append(nn.Linear(widths[-1], CLASSES))
    return nn.Sequential(*layers), (*draw(st.sampled_from([(), (4,)])), widths[0])


@st.composite
def convolutional(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Grouped, dilated and strided convolutions."""
    options = {
        "groups": draw(st.sampled_from([1, 2])),
        "dilation": draw(st.sampled_from([1, 2])),
        "stride": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect"])),
    }
    act = draw(st.sampled_from(ACTIVATIONS))(inplace=draw(st.booleans()))
    norm = draw(st.sampled_from([nn.Identity(), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)]))
    first = nn.Conv2d(2, 4, 3, padding=1, **options)
    last = nn.Linear(16, CLASSES)
    middle = nn.Conv2d(4, 4, 3, padding=1, groups=draw(st.sampled_from([1, 4])))
    return nn.Sequential(
        first, norm, act, middle, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), last
    ), (2, 7, 7)


@st.composite
def optimizers(draw: st.DrawFn) -> Any:
    """A constructor with options."""
    lr = draw(RATES)
    common: dict[str, Any] = {
        "value": draw(st.sampled_from(["moreau", "gauss_newton", "low_rank", "dense", PAPER])),
        "feedback": draw(st.sampled_from([True, "open_loop", False])),
        "nonfinite": draw(st.sampled_from(["raise", "skip"])),
        "terminal": draw(st.sampled_from(["auto", "cross_entropy"])),
        "weight_gradients": draw(st.booleans()),
    }
    curvature = draw(st.sampled_from(["identity", "rmsprop", "adamw", "kfac", "ekfac"]))
    momentum = 0.0 if curvature == "adamw" else draw(st.sampled_from([0.0, 0.9]))
    decay = draw(st.sampled_from([0.0, 0.1]))
    if draw(st.booleans()):
        own = {"lr": lr, "curvature": curvature, "momentum": momentum, "weight_decay": decay}
        return lambda model: DDPNOpt(model, **own, **common)
    kind = draw(st.sampled_from([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]))
    return lambda model: Feedback(model, kind(model.parameters(), lr), **common)


@st.composite
def batches(draw: st.DrawFn) -> Any:
    """What makes (x, y) of a shape and dtype."""
    samples = draw(st.sampled_from([0, 1, 2, 5]))
    kind = draw(st.sampled_from(["plain", "nan", "inf", "denormal", "constant", "large", "huge"]))
    layout = draw(st.sampled_from(["plain", "strided", "channels_last"]))
    labels = draw(st.sampled_from(["plain", "one class", "ignored", "out of range"]))

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.randn(samples, *shape, dtype=torch.float64)
        if kind in ("nan", "inf"):
            x.view(-1)[:1] = float(kind)
        scale = {"denormal": 1e-40, "constant": 0.0, "large": 1e4, "huge": 1e30}.get(kind, 1.0)
        x = (x * scale).to(dtype)
        if layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        elif layout == "channels_last" and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        y = torch.randint(0, CLASSES, (samples, *(shape[:-1] if len(shape) == 2 else ())))
        if labels == "one class":
            y = y * 0
        elif labels == "ignored":
            y.view(-1)[::2] = -100
        elif labels == "out of range":
            y.view(-1)[:1] = 10**6
        return x, y

    return make


def finite(opt: torch.optim.Optimizer, model: nn.Module) -> bool:
    states = (v for state in opt.state.values() for v in state.values())
    tensors = [*model.parameters(), *(v for v in states if isinstance(v, Tensor))]
    return all(bool(t.isfinite().all()) for t in tensors)


@settings(max_examples=EXAMPLES)
@given(
    st.one_of(dense(), convolutional()),
    optimizers(),
    st.lists(batches(), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_right_or_named(
    net: Any, make: Any, inputs: list[Any], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model, shape = net
    model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opt = make(model)
        except (ValueError, UnsupportedModelError):
            return
        for batch in inputs:
            x, y = batch(shape, dtype)
            before = [p.detach().clone() for p in model.parameters()]
            opt.zero_grad()
            try:
                z = model(x)
                loss = F.cross_entropy(z.flatten(0, -2), y.flatten())
            except (RuntimeError, ValueError, IndexError):
                continue  # torch's own: a label out of range, BatchNorm of one value
            try:
                loss.backward()
                opt.step()
            except NAMED:
                assert all(map(torch.equal, before, model.parameters()))
            assert finite(opt, model)


@settings(max_examples=EXAMPLES // 2)
@given(st.one_of(dense(), convolutional()), st.integers(0, 999), st.booleans())
def test_layouts_do_not_matter(net: Any, seed: int, inplace: bool) -> None:
    """Strided and channels-last batches step as contiguous ones do, in float64."""
    torch.manual_seed(seed)
    model, shape = net
    model.double()
    ends = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, *shape, dtype=torch.float64)
    strided = torch.stack([x, x], -1)[..., 0]
    other = x.to(memory_format=torch.channels_last) if x.dim() == 4 else strided
    y = torch.randint(0, CLASSES, (4, *(shape[:-1] if len(shape) == 2 else ())))
    for given_x in (x, strided, other):
        model.load_state_dict(start)
        with warnings.catch_warnings(), DDPNOpt(model, terminal="cross_entropy") as opt:
            warnings.simplefilter("ignore")
            opt.zero_grad()
            F.cross_entropy(model(given_x).flatten(0, -2), y.flatten()).backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for one in ends[1:]:
        for a, b in zip(ends[0], one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=EXAMPLES)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.one_of(st.floats(), st.integers(-2, 2)),
            "momentum": st.floats(),
            "weight_decay": st.floats(),
            "curvature": st.one_of(st.text(max_size=8), st.integers(), st.none()),
            "value": st.one_of(st.text(max_size=8), st.integers(), st.none()),
            "terminal": st.one_of(st.text(max_size=8), st.integers(), st.none()),
            "feedback": st.one_of(st.text(max_size=8), st.booleans(), st.none()),
            "gram": st.one_of(st.text(max_size=8), st.none()),
            "nonfinite": st.one_of(st.text(max_size=8), st.none()),
        },
    )
)
def test_constructor_arguments(options: dict[str, Any]) -> None:
    """An optimizer, or an error that names an option; and then no hook is left."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    try:
        opt = DDPNOpt(model, **options)
    except (ValueError, TypeError) as error:
        assert any(name in str(error) for name in (*options, "curvature"))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    else:
        assert all(math.isfinite(float(g["lr"])) for g in opt.param_groups)


def test_saturated_logits_of_another_loss() -> None:
    """Told apart without dividing by a probability of 0."""
    model = nn.Linear(2, 3)
    opt = DDPNOpt(model, lr=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            opt.zero_grad()
            F.mse_loss(
                model(torch.tensor([[1e4, -1e4], [-1e4, 3e4]])), torch.zeros(2, 3)
            ).backward()
            opt.step()
    assert opt.last_step is not None and opt.last_step.depth == "off"


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_rate_out_of_the_weights_range(nonfinite: str) -> None:
    model = nn.Linear(2, 3).half()
    opt = DDPNOpt(model, lr=1e6, nonfinite=nonfinite, terminal="cross_entropy")
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.ones(2, 2).half()), torch.tensor([0, 1])).backward()
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="lr=.*float16"):
            opt.step()
    else:
        opt.step()
        assert opt.skipped == 1
    assert all(map(torch.equal, before, model.parameters()))


def test_half_precision_with_and_without_an_empty_batch() -> None:
    """The running mean keeps its type, whichever way the gradient was made."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = DDPNOpt(model, curvature="adamw", lr=0.01, weight_gradients=False)
        for samples in (0, 4, 0, 4):
            opt.zero_grad()
            x, y = torch.randn(samples, 3).bfloat16(), torch.zeros(samples, dtype=torch.long)
            F.cross_entropy(model(x), y, reduction="sum").backward()
            opt.step()
    assert finite(opt, model)


def test_width_zero_is_plain() -> None:
    """What lies around it steps as torch's SGD does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 3))
    twin = nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 3))
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = ((model, DDPNOpt(model, lr=0.1)), (twin, torch.optim.SGD(twin.parameters(), 0.1)))
        for one, opt in pairs:
            F.cross_entropy(one(torch.ones(4, 3)), torch.tensor([0, 1, 2, 0])).backward()
            opt.step()
    assert_same(model, twin)
