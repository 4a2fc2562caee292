# SPDX-License-Identifier: MIT
"""Losses over positions: a sequence is one sample, its loss the sum over its tokens.

The oracle is autograd: gradient, Hessian and slope of the loss itself, sequence by sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, recognition, rows
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.experiments.reproduce.step_cost import PeakMemory
from ddpnopt.recognition import Recogniser
from ddpnopt.terminal import Cost
from ddpnopt.value import Moreau
from oracles.common import assert_same

Loss = Callable[[Tensor], Tensor]
B, T, V = 4, 5, 7
Y = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(5))
LENGTHS = torch.tensor([5, 3, 1, 0])
MASK = torch.arange(T) < LENGTHS[:, None]
PADDED = torch.where(MASK, Y, -100)
TOKENS = int(MASK.sum())
WEIGHTS = torch.linspace(0.5, 2.0, V, dtype=torch.float64)


def ce(z: Tensor, y: Tensor, **options: object) -> Tensor:
    """Cross-entropy of flattened rows."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), **options)  # type: ignore[arg-type]


def each(z: Tensor, y: Tensor) -> Tensor:
    """(B, T), 0 at ignored tokens."""
    return F.cross_entropy(z.transpose(1, 2), y, reduction="none")


def by_sequence(z: Tensor) -> Tensor:
    """Mean over sequences of their means over tokens."""
    return (each(z, PADDED).sum(1) / LENGTHS.clamp(min=1)).mean()


#: Loss, and each sequence's w.
LOSSES: dict[str, tuple[Loss, list[float]]] = {
    "flattened": (lambda z: ce(z, Y), [1 / (B * T)] * B),
    "transposed": (lambda z: F.cross_entropy(z.transpose(1, 2), Y), [1 / (B * T)] * B),
    "sum": (lambda z: ce(z, Y, reduction="sum"), [1.0] * B),
    "scaled": (lambda z: 13107 * ce(z, Y), [13107 / (B * T)] * B),
    "padded": (lambda z: ce(z, PADDED), [1 / TOKENS] * 3 + [1.0]),
    "masked": (lambda z: (each(z, Y) * MASK).sum() / MASK.sum(), [1 / TOKENS] * 3 + [1.0]),
    "shifted": (lambda z: ce(z[:, :-1], Y[:, 1:]), [1 / (B * T - B)] * B),
    "smoothed": (lambda z: ce(z, PADDED, label_smoothing=0.1), [1 / TOKENS] * 3 + [1.0]),
    "sequences": (by_sequence, [1 / 20, 1 / 12, 1 / 4, 1.0]),
    "last token": (lambda z: F.cross_entropy(z[:, -1], Y[:, -1]), [1 / B] * B),
    "class weights": (
        lambda z: ce(z, Y, weight=WEIGHTS.to(z)),
        (WEIGHTS[Y].mean(1) / WEIGHTS[Y].sum()).tolist(),
    ),
}


def outputs(scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, T, V) logits."""
    z = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (scale * z).to(dtype)


def recognised(loss: Loss, z: Tensor, terminal: str = "auto", axis: int = -1) -> Cost | None:
    z = z.clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(z), z)
    return Recogniser(terminal)(z.detach(), G, axis, len(z))


def along(loss: Loss, z: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss with respect to sequence i's logits."""

    def of(one: Tensor) -> Tensor:
        return loss(torch.cat([z[:i], one.reshape(1, *z.shape[1:]), z[i + 1 :]]))

    flat = z[i].flatten()
    G = torch.autograd.functional.jacobian(of, flat)
    H = torch.autograd.functional.hessian(of, flat)
    assert isinstance(G, Tensor) and isinstance(H, Tensor)
    return G, H


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
def test_line_of_a_sequence(name: str, scale: float) -> None:
    """w, kappa = g H g / |g|^4, and the limit of the slope along g on both sides."""
    loss, weights = LOSSES[name]
    z = outputs(scale)
    cost = recognised(loss, z)
    assert cost is not None and cost.name == "cross_entropy" and cost.excess is not None
    torch.testing.assert_close(
        cost.w, torch.tensor(weights, dtype=torch.float64), rtol=1e-9, atol=0
    )
    for i in range(B):
        G, H = along(loss, z, i)
        if not bool(G.any()):
            assert bool(cost.kappa[i].isfinite()) and bool(cost.excess[i].isfinite())
            continue
        w = cost.w[i]
        g, square = G / w, (G / w).square().sum()
        kappa = g @ (H / w) @ g / square.square()
        torch.testing.assert_close(cost.kappa[i], kappa, rtol=1e-8, atol=1e-12)

        def slope(delta: float, i: int = i, g: Tensor = g, square: Tensor = square) -> Tensor:
            moved = z.clone()
            moved[i] += (delta * g / square).reshape(T, V)
            return along(loss, moved, i)[0] @ g / cost.w[i] / square

        torch.testing.assert_close(1 + cost.excess[i], slope(1e9), rtol=1e-8, atol=0)
        if name != "smoothed":
            assert abs(float(slope(-1e9))) < 1e-8


@pytest.mark.parametrize("name", LOSSES)
def test_factor_and_value(name: str) -> None:
    loss, _ = LOSSES[name]
    z = outputs()
    cost = recognised(loss, z)
    assert cost is not None and cost.value is not None
    S = cost.hessian_factor()
    for i in range(B):
        torch.testing.assert_close(S[i] @ S[i].T, along(loss, z, i)[1], rtol=1e-9, atol=1e-11)
    new = outputs(1.0).flip(0)
    torch.testing.assert_close(cost.value(new) - cost.value(z), loss(new) - loss(z))


@pytest.mark.parametrize("size", [1, 2 * V, 10**6])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("name", ["padded", "smoothed", "sequences"])
def test_chunks(monkeypatch: pytest.MonkeyPatch, size: int, axis: int, name: str) -> None:
    """Whatever fits a chunk, and wherever the classes are, the numbers are the same."""
    loss, z = LOSSES[name][0], outputs()
    whole = recognised(loss, z)
    assert whole is not None and whole.value is not None
    value = whole.value(z.flip(0))
    monkeypatch.setitem(rows.CHUNK, "cpu", size)
    if axis == -1:
        part = recognised(loss, z)
    else:
        part = recognised(lambda z: loss(z.transpose(1, 2)), z.transpose(1, 2).contiguous(), axis=1)
    assert part is not None and part.value is not None
    for one in ("w", "kappa", "excess"):
        torch.testing.assert_close(getattr(part, one), getattr(whole, one), rtol=1e-10, atol=0)
    new = z.flip(0) if axis == -1 else z.flip(0).transpose(1, 2)
    torch.testing.assert_close(part.value(new), value)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", ["as is", "float"])
def test_precisions(name: str, scale: float, dtype: torch.dtype, inside: str) -> None:
    """Also where the model's own loss casts its logits."""
    loss = LOSSES[name][0]
    if name == "scaled" and dtype == torch.float16:
        pytest.skip("its loss overflows")
    cast: Loss = loss if inside == "as is" else lambda z: loss(z.float())
    cost = recognised(cast, outputs(scale, dtype))
    assert cost is not None and cost.name == "cross_entropy"
    exact = recognised(loss, outputs(scale, dtype).double())
    assert exact is not None and cost.excess is not None and exact.excess is not None
    near = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(cost.kappa.double(), exact.kappa, rtol=near, atol=near)
    torch.testing.assert_close(cost.excess.double(), exact.excess, rtol=near, atol=near)


def test_float64_logits_cast_to_float32() -> None:
    assert recognised(lambda z: ce(z.float(), PADDED), outputs()) is not None


def focal(z: Tensor) -> Tensor:
    p = (-each(z, Y[: len(z), : z.shape[1]])).exp()
    return ((1 - p) ** 2 * -p.log()).mean()


UNRECOGNISED: dict[str, Loss] = {
    "focal": focal,
    "focal, by sequence": lambda z: focal(z[:1]) + 2 * focal(z),
    "focal, one token each": lambda z: focal(z[:, :1]),
    "temperature": lambda z: ce(z / 2, Y),
    "token weights": lambda z: (each(z, Y) * torch.linspace(0.5, 1.5, T).to(z)).mean(),
    "z loss": lambda z: ce(z, Y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "mean logits": lambda z: F.cross_entropy(z.mean(1), Y[:, 0]),
    "two terms": lambda z: ce(z, Y) + F.cross_entropy(z[:, 0], Y[:, 0]),
    "soft targets": lambda z: F.cross_entropy(
        z.transpose(1, 2), torch.linspace(0, 3, V).to(z).softmax(0)[None, :, None].expand(B, V, T)
    ),
}


@pytest.mark.parametrize("name", UNRECOGNISED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_other_losses(name: str, dtype: torch.dtype, scale: float) -> None:
    assert recognised(UNRECOGNISED[name], outputs(scale, dtype)) is None


@pytest.mark.parametrize("name", ["token weights", "soft targets"])
def test_named(name: str) -> None:
    """Weights of tokens, and soft targets, also over a part of the positions."""
    loss = UNRECOGNISED[name]
    z = outputs()
    for some in (loss, lambda z: loss(torch.cat([z[:, :-1], z[:, -1:].detach()], 1))):
        cost = recognised(some, z, "cross_entropy")
        assert cost is not None
        if some is loss or name == "token weights":
            G, H = along(some, z, 1)
            kappa = cost.w[1] * (G @ H @ G) / G.square().sum().square()
            torch.testing.assert_close(cost.kappa[1], kappa, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["flattened", "transposed", "shifted", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_large_vocabulary(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, spread: float
) -> None:
    """Recognised in the first pass, when every label is unlikely; in memory below the logits'."""
    monkeypatch.setitem(rows.CHUNK, "cpu", 2**16)
    words, generator = 50_000, torch.Generator().manual_seed(2)
    y = torch.randint(words, (2, 12), generator=generator)
    y[1, 4:] = -100
    losses: dict[str, Loss] = {
        "flattened": lambda z: ce(z, y),
        "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), y),
        "shifted": lambda z: ce(z[:, :-1], y[:, 1:]),
        "smoothed": lambda z: ce(z, y, label_smoothing=0.1),
    }
    z = (spread * torch.randn(2, 12, words, generator=generator)).to(dtype).requires_grad_()
    (G,) = torch.autograd.grad(losses[kind](z.float()), z)
    with torch.no_grad(), PeakMemory() as memory:
        cost = Recogniser("auto")(z, G, -1, 2)
    assert cost is not None and cost.name == "cross_entropy"
    assert memory.peak < 0.75 * 4 * z.numel()
    with torch.no_grad(), PeakMemory() as memory:
        assert cost.value is not None
        cost.value(z)
    assert memory.peak < 0.75 * 4 * z.numel()


def test_another_loss_over_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is none is found in bounded memory, too."""
    monkeypatch.setitem(rows.CHUNK, "cpu", 2**16)
    z = torch.randn(2, 12, 50_000, requires_grad=True)
    y = torch.randint(50_000, (2, 12))
    (G,) = torch.autograd.grad(ce(z / 2, y), z)
    with torch.no_grad(), PeakMemory() as memory:
        assert Recogniser("auto")(z, G, -1, 2) is None
    assert memory.peak < 4 * z.numel()


def test_a_known_loss_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over more or fewer tokens than before is not fitted anew; another loss is."""
    known = Recogniser("auto")

    def look(loss: Loss, z: Tensor) -> Cost | None:
        z = z.clone().requires_grad_()
        (G,) = torch.autograd.grad(loss(z), z)
        return known(z.detach(), G, -1, B)

    assert look(LOSSES["flattened"][0], outputs()) is not None
    assert look(LOSSES["padded"][0], outputs(1.0)) is not None
    fitted: list[bool] = []
    fit = recognition.fit_softmax
    monkeypatch.setattr(recognition, "fit_softmax", lambda *a: (fitted.append(True), fit(*a))[1])
    for name in ("padded", "shifted", "flattened", "last token"):
        loss, weights = LOSSES[name]
        cost = look(loss, outputs(3.0).roll(1, 0))
        assert cost is not None and not fitted
        torch.testing.assert_close(cost.w, torch.tensor(weights, dtype=torch.float64))
    assert look(UNRECOGNISED["two terms"], outputs()) is None
    assert fitted


# Steps ------------------------------------------------------------------------------------------


def token_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, V)).double()


INPUTS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(8))


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_padding_changes_nothing(feedback: object) -> None:
    """Padded tokens and sequences without any token have no influence on a step."""
    models = [token_net(), token_net()]
    batches = [(INPUTS[:3], PADDED[:3]), (F.pad(INPUTS, (0, 2)), F.pad(PADDED, (0, 2), value=-100))]
    for model, (x, y) in zip(models, batches, strict=True):
        opt = DDPNOpt(model, lr=0.7, feedback=feedback)
        for _ in range(3):
            opt.zero_grad()
            ce(model(x), y).backward()
            opt.step()
        assert opt.last_step.terminal == "cross_entropy"
    assert_same(models[0], models[1], 1e-12)


def envelope(kappa: float, excess: float, S: float) -> float:
    """l'(delta) at delta = -S l'(delta), by bisection."""
    Lambda, omega = 1 + excess, kappa * (1 + excess) / excess
    low, high = 0.0, 1.0
    for _ in range(200):
        c = (low + high) / 2
        slope = Lambda / (1 + math.exp(omega * S * c + math.log(excess)))
        low, high = (c, high) if slope > c else (low, c)
    return low


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("sample", ["sequence", "token"])
def test_what_is_a_sample(sample: str) -> None:
    """One coefficient for each sequence of (B, T, ..) inputs, for each token of (B T, ..) rows."""
    lr = 3.0
    layer = nn.Linear(3, V, bias=False).double()
    x = torch.randn(B, T, 3, dtype=torch.float64)
    before = layer.weight.detach().clone()
    z = x @ before.T
    if sample == "token":
        x, z, y = x.reshape(B * T, 1, 3), z.reshape(B * T, 1, V), Y.reshape(B * T, 1)
    else:
        y = Y

    def loss(z: Tensor) -> Tensor:
        return ce(z.reshape(len(y), -1, V), y)

    d, w = torch.zeros_like(before), 1 / (B * T)
    for i in range(len(x)):
        G, H = along(loss, z, i)
        g, square = G / w, (G / w).square().sum()
        kappa = float(g @ H @ g / w / square.square())
        gaps = g.reshape(-1, V).amax(1) - g.reshape(-1, V).gather(1, y[i][:, None])[:, 0]
        step = G.reshape(-1, V).T @ x[i]
        S = float(lr * step.square().sum() / w)
        d += envelope(kappa, float(gaps.sum() / square) - 1, S) * step
    opt = DDPNOpt(layer, lr=lr, value=Moreau(coupling=False, strength=1.0))
    opt.zero_grad()
    loss(layer(x if sample == "sequence" else x[:, 0])).backward()
    opt.step()
    torch.testing.assert_close(layer.weight, before - lr * d, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
def test_a_new_language_model_is_recognised_at_its_first_step(gamma: float) -> None:
    """Its logits hardly differ (by 0.02): a focal loss is told from cross-entropy all the same."""
    torch.manual_seed(0)
    head = nn.Linear(16, 50)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    opt = DDPNOpt(head, lr=0.1)
    x, y = 0.2 * torch.randn(4, 12, 16), torch.randint(50, (4, 12))
    z = head(x)
    assert 0.001 < float(z.detach().std()) < 0.03
    log_p = z.log_softmax(-1).gather(-1, y[..., None])
    (-((1 - log_p.exp()) ** gamma) * log_p).mean().backward()
    if gamma:
        with pytest.warns(DDPNOptWarning, match="not recognised"):
            opt.step()
    else:
        opt.step()
    assert opt.last_step.terminal == ("unrecognised" if gamma else "cross_entropy")
