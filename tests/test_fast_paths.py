# SPDX-License-Identifier: MIT
"""Ways that only save work give what the plain ways give."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt import DDPNOpt, directions, rows
from ddpnopt.directions import ROUNDING
from ddpnopt.gradients import SAMPLED, Fingerprint
from ddpnopt.layers import FALLBACK, MatrixRule, rule_for
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.conv import ConvRule
from ddpnopt.layers.coordinates import Coordinates
from ddpnopt.layers.correlation import tap_gradients, tap_gram
from ddpnopt.likelihoods import hard_label_cost, softmax_cost
from ddpnopt.linearise import FROM_VALUE
from ddpnopt.randomness import TRIALS

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "circular"]),
    groups=st.sampled_from([1, 2]),
    columns=st.integers(1, 2),
    data=st.data(),
)
def test_taps_are_the_samples_gradients(
    axes: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int | str,
    groups: int,
    columns: int,
    data: st.DataObject,
) -> None:
    if padding == "same":
        stride = 1
    mode = {"padding_mode": "circular", "padding": 1} if padding == "circular" else {}
    options = {"padding": padding, **mode, "stride": stride, "dilation": dilation}
    conv = CONVOLUTIONS[axes](2, 4, kernel, groups=groups, **options).double()
    sizes = [data.draw(st.integers(5, 7)) for _ in range(axes)]
    x = torch.randn(3, 2, *sizes, dtype=torch.float64)
    V = torch.randn(columns, *conv(x).shape, dtype=torch.float64)
    expected = FALLBACK.sample_gradients(conv, x, V, 3)["weight"]
    taps = torch.stack(list(tap_gradients(conv, x, V)))
    found = taps.permute(3, 1, 2, 4, 5, 0).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    P = torch.rand_like(conv.weight)
    gram, kept = tap_gram(conv, x, V, P, keep=columns == 1)
    flat = expected.flatten(2)
    exact = torch.einsum("rbu,sbu->brs", flat * P.flatten(), flat)
    torch.testing.assert_close(gram, exact, rtol=1e-12, atol=1e-12)
    assert (kept is None) == (columns > 1)


def image_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()


def dense_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 5)
    ).double()


def after(
    model: nn.Module, shape: tuple[int, ...], between: str = "", steps: int = 4, **options: object
) -> list[Tensor]:
    """The weights after some steps, something done to the gradients in between."""
    opt = DDPNOpt(model, lr=0.3, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (6,), generator=generator)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if between == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        if between == "one entry":
            grad = next(model.parameters()).grad
            assert grad is not None
            grad.view(-1)[3] += 0.1
        opt.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("curvature", ["identity", "rmsprop", "adamw", "kfac", "ekfac"])
@pytest.mark.parametrize("held", [False, True])
def test_kept_gradients_of_convolutions(
    curvature: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    original = ConvRule.kept_gram

    def spy(self: ConvRule, *args: object) -> object:
        found = original(self, *args)  # type: ignore[arg-type]
        kept.append(found is not None)
        return found

    def rotated(self: ConvRule, *args: object) -> object:
        found = formed(self, *args)  # type: ignore[arg-type]
        kept.append(found is not None)
        return found

    formed = ConvRule.rotated
    monkeypatch.setattr(ConvRule, "kept_gram", spy)
    monkeypatch.setattr(ConvRule, "rotated", rotated)
    options = {"curvature": curvature, "weight_gradients": not held}
    if curvature != "identity":
        options["lr"] = 0.3
    options.pop("lr", None)
    torch.manual_seed(3)
    fast = after(image_net(), (2, 9, 9), **options)
    assert any(kept)
    monkeypatch.setattr(ConvRule, "kept_gram", LayerRule.kept_gram)
    monkeypatch.setattr(ConvRule, "rotated", MatrixRule.rotated)
    torch.manual_seed(3)
    slow = after(image_net(), (2, 9, 9), **options)
    # Dividing by the root of its own square enlarges the rounding of a gradient near zero.
    atol = 1e-11 if curvature in ("rmsprop", "adamw") else 1e-12
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("between", ["", "clip", "one entry"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"weight_gradients": False}],
    ids=["plain", "decay", "held"],
)
def test_directions_from_coordinates(
    name: str, between: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "weight_gradients" in options and between:
        pytest.skip("there are no weight gradients to change")
    monkeypatch.setattr(directions, "SMALL", 0)
    pays: list[bool] = []

    def always(V: Tensor, inputs: int) -> bool:
        pays.append(True)
        return True

    monkeypatch.setattr(Coordinates, "pays", staticmethod(always))
    torch.manual_seed(3)
    fast = after(dense_net(), (9,), between, curvature=name, **options)
    assert pays
    monkeypatch.setattr(Coordinates, "pays", staticmethod(lambda V, inputs: False))
    torch.manual_seed(3)
    slow = after(dense_net(), (9,), between, curvature=name, **options)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (6, 3, 3, 5, 7))),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.25, 1.0, 8.0]),
    change=st.sampled_from(["entry", "row", "column", "rank one", "scaled"]),
    seed=st.integers(0, 10**6),
)
def test_what_is_not_the_plain_gradient_is_seen(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float, change: str, seed: int
) -> None:
    b, g, t, o, i = shape
    draw = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, generator=draw)

    U, V = normal(b, g, t, i), normal(b, g, t, o)
    found = Coordinates(U, V, U, V, False, (U, V))
    plain = torch.einsum("bgto,bgti->goi", V, U) * scale
    tolerance = ROUNDING[dtype]
    rounded = plain * (1 + 4 * torch.finfo(dtype).eps * normal(g, o, i))
    joins = seed % 2 and i > 1

    def differs(M: Tensor) -> bool:
        weight, bias = (M[..., :-1], M[..., -1]) if joins else (M, None)
        return found.differs(weight, bias, scale, tolerance)

    cancels = float(plain.norm() / (V.norm() * U.norm() * scale)) < 1e-2
    assert cancels or not differs(rounded)
    other, size = plain.clone(), 0.01 * plain.norm()
    row, column = seed % o, seed % i
    if change == "entry":
        other[0, row, column] += size
    elif change == "row":
        other[0, row] += size * normal(i)
    elif change == "column":
        other[0, :, column] += size * normal(o)
    elif change == "rank one":
        other += size * normal(g, o, 1) * normal(i)
    else:
        other *= 0.98
    far = float((other - plain).norm()) > 1e-3 * float(plain.norm()) > 0
    assert not far or differs(other)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 40.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_hard_label_cost(scale: float, ignored: bool) -> None:
    z = (torch.randn(8, 5, dtype=torch.float64) * scale).requires_grad_()
    y = torch.randint(5, (8,))
    y[0] = -100 if ignored else y[0]
    loss = nn.functional.cross_entropy(z, y, reduction="sum") / 8
    (G,) = torch.autograd.grad(loss, z)
    z = z.detach()
    used = G.abs().amax(1) > 0
    exact = softmax_cost("it", z, G, torch.where(used, 1 / 8, 0.0)[:, None], -1, 8)
    found = hard_label_cost("it", z, G, 1 / 8)
    if found is None:  # no row says enough
        assert float(G.abs().amax()) < 1e-3 / 8
        return
    for name in ("w", "kappa", "excess"):
        one, other = getattr(found, name)[used], getattr(exact, name)[used]
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.factor(None), exact.factor(None))
    assert bool(found.kappa.isfinite().all()) and bool(found.excess.isfinite().all())
    new = torch.randn_like(z)
    assert found.value is not None and exact.value is not None
    torch.testing.assert_close(found.value(new), exact.value(new))


@pytest.mark.parametrize("change", ["scaled", "smoothed", "weighted", "one row"])
def test_another_loss_is_not_confirmed(change: str) -> None:
    z = torch.randn(8, 5, requires_grad=True)
    y = torch.randint(5, (8,))
    options = {
        "smoothed": {"label_smoothing": 0.01},
        "weighted": {"weight": torch.linspace(0.5, 2, 5)},
    }.get(change, {})
    loss = nn.functional.cross_entropy(z, y, **options)  # type: ignore[arg-type]
    (G,) = torch.autograd.grad(loss * (1.01 if change == "scaled" else 1.0), z)
    if change == "one row":
        G[3] *= 1.5
    assert hard_label_cost("it", z.detach(), G, 1 / 8) is None


def rounded(
    dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scores in half precision, and their gradient by a loss of them in single, as autocast has."""
    z = (torch.randn(8, 5) * scale).to(dtype).requires_grad_()
    (G,) = torch.autograd.grad(loss(z.float(), torch.randint(5, (8,))), z)
    assert G.dtype == dtype
    return z.detach(), G


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hard_labels_in_half_precision(dtype: torch.dtype, scale: float) -> None:
    z, G = rounded(dtype, nn.functional.cross_entropy, scale)
    used = G.abs().amax(1) > 0
    exact = softmax_cost("it", z, G, torch.where(used, 1 / 8, 0.0)[:, None], -1, 8)
    found = hard_label_cost("it", z, G, 1 / 8)
    assert found is not None
    for name in ("w", "kappa", "excess"):
        one, other = getattr(found, name)[used], getattr(exact, name)[used]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.factor(None), exact.factor(None))
    assert hard_label_cost("it", z, torch.zeros_like(G), 1 / 8) is None  # says nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [1, 2])
def test_hard_labels_in_chunks(
    dtype: torch.dtype, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(6, 5, 5).to(dtype).requires_grad_()
    y = torch.randint(5, (6, 5))
    y[0] = y[3, 1:] = -100  # a chunk of them says nothing
    wide = z if dtype == torch.float64 else z.float()
    (G,) = torch.autograd.grad(nn.functional.cross_entropy(wide.movedim(axis, 1), y), z)
    z, w = z.detach(), 1 / int((y >= 0).sum())
    whole = hard_label_cost("it", z, G, w, axis, 6)
    monkeypatch.setitem(rows.CHUNK, "cpu", 25)
    found = hard_label_cost("it", z, G, w, axis, 6)
    assert whole is not None and found is not None
    for name in ("w", "kappa", "excess"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    torch.testing.assert_close(found.factor(None), whole.factor(None))
    G[4].mul_(1.2)
    assert hard_label_cost("it", z, G, w, axis, 6) is None
    assert hard_label_cost("it", z, torch.zeros_like(G), w, axis, 6) is None


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(z, -1).gather(-1, y[:, None])
    return -((1 - p).square() * p.log()).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: 1.05 * nn.functional.cross_entropy(z, y),
        lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.05),
        lambda z, y: nn.functional.cross_entropy(z, y, weight=torch.linspace(0.9, 1.1, 5)),
        lambda z, y: nn.functional.cross_entropy(1.1 * z, y),
        focal,
    ],
)
def test_another_loss_is_not_confirmed_by_half_precision(
    dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    z, G = rounded(dtype, loss)
    assert hard_label_cost("it", z, G, 1 / 8) is None


class LateNoise(nn.Module):
    """Draws from a global generator, but not in its first passes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.passes = kind, 0
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.passes >= 2 * (TRIALS + 2):
            self.drawn.append(random.random() if self.kind == "python" else self._numpy())
            h = h * self.drawn[-1]
        self.passes += 1
        out: Tensor = self.second(h)
        return out

    def _numpy(self) -> float:
        return float(np.random.rand() if self.kind == "rand" else np.random.randn())


@pytest.mark.parametrize("kind", ["python", "rand", "randn"])
def test_a_model_that_begins_to_draw(kind: str) -> None:
    np.random.seed(0)
    random.seed(0)
    model = LateNoise(kind)
    opt = DDPNOpt(model, lr=0.1)
    for _ in range(TRIALS + 8):
        opt.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
        opt.step()
    pairs = list(zip(model.drawn[::2], model.drawn[1::2], strict=True))
    assert len(pairs) >= 5
    assert all(nominal == again for nominal, again in pairs)
    assert len({nominal for nominal, _ in pairs}) == len(pairs)


def test_fingerprint_of_large_gradients() -> None:
    p = [torch.zeros(3 * SAMPLED, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for one in p:
        one.grad = torch.randn_like(one)
    print_ = Fingerprint()
    print_.take(p)
    assert print_.rescaling() == 1.0
    for one in p:
        assert one.grad is not None
        one.grad *= 0.25
    assert print_.rescaling() == pytest.approx(0.25)
    assert p[0].grad is not None
    p[0].grad += torch.randn_like(p[0])
    assert print_.rescaling() == 1.0


def test_fingerprint_where_gradients_vanish() -> None:
    p = [torch.zeros(3, requires_grad=True) for _ in range(5)]
    for one in p:
        one.grad = torch.randn_like(one)
    print_ = Fingerprint()
    print_.take(p)
    for one in p:
        assert one.grad is not None
        one.grad *= 0.25
    p[0].grad = p[1].grad = None
    assert print_.rescaling() == pytest.approx(0.25)


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, torch.relu])
def test_slopes_from_values(function: Callable[[Tensor], Tensor]) -> None:
    h = torch.randn(4, 7).double().requires_grad_()
    y = function(h)
    assert y.grad_fn is not None
    (slope,) = torch.autograd.grad(y, h, torch.ones_like(y))
    torch.testing.assert_close(FROM_VALUE[y.grad_fn.name()](y.detach()), slope)


def test_rules_of_calls() -> None:
    layer = nn.Linear(3, 2)
    assert rule_for(layer) is rule_for(nn.Linear(3, 2))
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert rule_for(layer) is FALLBACK
