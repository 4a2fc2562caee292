# SPDX-License-Identifier: MIT
"""Gram matrices of many columns, a few samples at a time, are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpnopt import DDPNOpt, grams
from ddpnopt.layers.coordinates import Coordinates
from ddpnopt.positions import Product, weight_gram


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Flatten(),
            nn.Linear(98, 3),
        ),
        images,
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3)),
        lambda n: torch.randn(n, 5, 3, dtype=torch.float64),
    ),
    "rows in the batch": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 4), nn.Unflatten(0, (-1, 5))).append(
            nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
        ),
        lambda n: torch.randn(n, 5, 3, dtype=torch.float64),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)),
        lambda n: torch.randint(7, (n, 5)),
    ),
}


def trained(net: str, curvature: str) -> list[Tensor]:
    torch.manual_seed(0)
    make, inputs = NETS[net]
    model = make().double()
    opt = DDPNOpt(model, lr=0.1, value="low_rank", curvature=curvature)
    for _ in range(3):
        opt.zero_grad()
        for n in (5, 3):
            loss = F.cross_entropy(model(inputs(n)), torch.arange(n) % 3, reduction="sum")
            (loss / 8).backward()
        opt.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("curvature", ["identity", "adamw", "kfac"])
@pytest.mark.parametrize("net", NETS)
def test_some_samples_at_a_time(net: str, curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, parts = trained(net, curvature), list[int]()

    def counting(*args: int) -> range:
        parts.append(len(range(*args)))
        return range(*args)

    monkeypatch.setattr(grams, "AT_ONCE", 1)
    monkeypatch.setattr(grams, "range", counting, raising=False)
    for one, other in zip(trained(net, curvature), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert set(parts) == {5, 3}


def test_squares_that_rounding_makes_negative_are_zero() -> None:
    """Of an ill-conditioned inverse, along what it makes small."""
    torch.manual_seed(0)
    v, x = F.normalize(torch.randn(50), dim=0), torch.randn(64, 50)
    x = x - (x @ v)[:, None] * v
    S, one = 1e8 * torch.outer(v, v), torch.eye(1)[None]
    assert bool((((x @ S) * x).sum(1) < 0).any())
    P = Product(S[None], one, 1.0, False)
    U, V = x[:, None, None], torch.ones(64, 1, 1, 1)
    found = Coordinates.of(U, V, (P.A, P.G), False)
    for lengths in (weight_gram(U, V[None], P), found.lengths(P)):
        assert bool((lengths >= 0).all())
    for w in torch.eye(64):
        assert found.length(P, w) >= 0
    for row in x:
        assert P.square(row[None, None]) >= 0
