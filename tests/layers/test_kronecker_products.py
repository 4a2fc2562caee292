# SPDX-License-Identifier: MIT
"""Products of Kronecker-factored gains by either way of making them, against explicit matrices.

Oracle: autograd's gradient of every single sample, and P = T^T diag(scale) T written out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, positions
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule, conv, rule_for
from ddpnopt.positions import Diagonal, Kronecker, Product, weight_squares
from oracles.common import assert_same

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 5)),
    "strides and padding": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2)),
        (2, 7, 6),
    ),
    "dilation and groups": (
        lambda: nn.Conv2d(4, 6, (2, 3), dilation=(2, 1), padding=1, groups=2),
        (4, 6, 5),
    ),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "no bias": (lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False), (2, 6, 6)),
    "one dimension": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "three dimensions": (lambda: nn.Conv3d(1, 2, 2), (1, 4, 3, 5)),
    "sequence": (lambda: nn.Linear(3, 4), (7, 3)),
}
WAYS = (True, False, None)


def forced(way: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the choice between samples' gradients and positions; None leaves it to the count."""
    if way is not None:
        for module in (positions, conv):
            monkeypatch.setattr(module, "transforms_samples", lambda *args: way)


def case(name: str, columns: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    make, shape = LAYERS[name]
    module = make().double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    V = torch.randn(columns, *module(x).shape, dtype=torch.float64)
    return module, x, V


def matrices(module: nn.Module, x: Tensor, V: Tensor, bias: bool) -> Tensor:
    """(r, b, g, o, i [+ 1]) by autograd, sample by sample and column by column."""
    params = dict(module.named_parameters())
    groups = getattr(module, "groups", 1)
    found = []
    for v in V:
        for i in range(len(x)):
            h = module(x[i : i + 1])[0]
            grads = torch.autograd.grad((h * v[i]).sum(), params.values())
            by_name = dict(zip(params, grads, strict=True))
            D = by_name["weight"].reshape(groups, params["weight"].shape[0] // groups, -1)
            if bias:
                D = torch.cat([D, by_name["bias"].reshape(groups, -1, 1)], -1)
            found.append(D)
    return torch.stack(found).reshape(len(V), len(x), *found[0].shape)


def explicit(P: Kronecker, j: int) -> Tensor:
    """P of one group as one matrix."""
    T = torch.kron(P.G[j], P.A[j])
    return T.mT @ torch.diag(P.scale[j].flatten()) @ T if isinstance(P, Diagonal) else T * P.scale


def gain(D: Tensor, diagonal: bool, bias: bool) -> Kronecker:
    _, _, g, o, i = D.shape
    A, G = torch.randn(g, i, i).double(), torch.randn(g, o, o).double()
    if diagonal:
        return Diagonal(A, G, torch.rand(g, o, i).double(), bias)
    return Product(A @ A.mT, G @ G.mT, 0.7, bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_gram(
    name: str,
    columns: int,
    diagonal: bool,
    way: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forced(way, monkeypatch)
    if columns > 1:  # some samples at a time
        for part in (positions, conv):
            monkeypatch.setattr(part, "AT_ONCE", 100)
    module, x, V = case(name, columns)
    rule = rule_for(module)
    assert isinstance(rule, MatrixRule)
    for joined in {module.bias is not None, False}:
        D = matrices(module, x, V, joined)
        P = gain(D, diagonal, joined)
        gains: dict[str, Any] = {"weight": P}
        expected = torch.zeros(len(x), columns, columns, dtype=torch.float64)
        for j in range(D.shape[2]):
            flat = D[:, :, j].flatten(2)
            expected += torch.einsum("rbu,uv,sbv->brs", flat, explicit(P, j), flat)
        if module.bias is not None and not joined:  # a bias of another group
            gains["bias"] = 0.3
            each = matrices(module, x, V, True)[..., -1].flatten(2)
            expected += 0.3 * torch.einsum("rbo,sbo->brs", each, each)
        found = rule.gram(module, x, V, gains, len(x))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        if columns > 1 or (kept := rule.kept_gram(module, x, V, gains, len(x))) is None:
            continue
        torch.testing.assert_close(kept[0], expected, rtol=1e-11, atol=1e-11)
        a, zero = torch.randn(len(x)).double(), {n: p * 0 for n, p in module.named_parameters()}
        total = kept[1].onto(zero, a, 2.0)
        own = rule.gradient(module, x, V[0] * a.reshape(-1, *(1,) * (V.dim() - 2)))
        for n in own:
            torch.testing.assert_close(total[n], 2 * own[n], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_squares(name: str, way: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(way, monkeypatch)
    module, x, V = case(name, 1)
    rule = rule_for(module)
    assert isinstance(rule, MatrixRule)
    D = matrices(module, x, V, False)
    P = gain(D, True, False)
    U, columns = rule.inputs(module, x, len(x)), rule.outputs(module, V, len(x))
    found = weight_squares(U, columns[0], (P.A, P.G))
    expected = (P.G @ D[0] @ P.A.mT).square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_cheaper_way_is_taken() -> None:
    """By multiply-adds counted here one by one, over many shapes."""
    for r in (1, 4):
        for t in (1, 4, 30, 1000):
            for o, i in ((3, 5), (32, 289), (64, 16)):
                form, change = r * t * o * i, r * (o * i * i + o * o * i)
                vectors = t * i * i + r * t * o * o
                pairs = t * t * i + r * t * t * o
                for kind, afterwards in ((Product, min(2 * form, pairs)), (Diagonal, form)):
                    P = kind(torch.eye(i)[None], torch.eye(o)[None], torch.ones(1, o, i), False)
                    taken = P.transforms_samples(r, t, o, i)
                    assert taken == (form + change < vectors + afterwards)


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).double()


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_gradients": False}, {"feedback": "open_loop"}, {"value": "low_rank"}],
    ids=["plain", "held", "open", "low rank"],
)
def test_steps_over_several_passes(
    curvature: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        [
            (
                torch.randn(n, 2, 8, 8, generator=generator).double(),
                torch.randint(5, (n,), generator=generator),
            )
            for n in (4, 3)
        ]
        for _ in range(5)
    ]
    seen, original = list[int](), Layer.lengths

    def spy(self: Layer) -> Tensor:
        found = original(self)
        seen.append(len(self.kept))
        return found

    monkeypatch.setattr(Layer, "lengths", spy)
    models, kept = [], []
    for way in (True, False):
        forced(way, monkeypatch)
        model = net()
        opt = DDPNOpt(model, lr=0.3, curvature=curvature, **options)
        for passes in batches:
            opt.zero_grad()
            for x, y in passes:
                (F.cross_entropy(model(x), y, reduction="sum") / 7).backward()
            opt.step()
        models.append(model)
        kept.append(max(seen, default=0))
        seen.clear()
    assert_same(models[0], models[1], 1e-9)
    if "value" not in options:
        assert kept == [2 if "feedback" not in options else kept[0], 0]
