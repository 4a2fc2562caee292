# SPDX-License-Identifier: MIT
"""KFAC and EKFAC of convolutions and sequences against one explicit matrix for each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EKFAC, KFAC
from oracles.common import assert_same
from oracles.kronecker import train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


class Image(nn.Module):
    """One convolution of any kind, and a dense head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(4, 6, (3, 2), **options)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


class Sequence(nn.Module):
    """A dense layer at every position."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.token = nn.Linear(5, 4, bias=bias)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(x)).mean(1))


def images(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randn(7, 4, 6, 5, generator=g).double(), torch.randint(3, (7,), generator=g))
        for _ in range(steps)
    ]


def sequences(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randn(7, 6, 5, generator=g).double(), torch.randint(3, (7,), generator=g))
        for _ in range(steps)
    ]


def seen(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (b, g, t, i), with a 1 for the bias, and gradients (b, g, t, o) by position."""
    if isinstance(module, nn.Conv2d):
        k, groups = module.kernel_size, module.groups
        u = F.unfold(x, k, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        U = u.unflatten(1, (groups, -1)).transpose(2, 3)
        V = gradient.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    else:
        U = x.reshape(len(x), 1, -1, x.shape[-1])
        V = gradient.reshape(len(x), 1, -1, gradient.shape[-1])
    if module.bias is not None:
        U = torch.cat([U, U.new_ones(*U.shape[:-1], 1)], -1)
    return U, V


class Blocks:
    """One explicit matrix M for each group of each layer, inverted by `solve`."""

    def __init__(
        self, model: nn.Module, eigen: bool, lr: float, every: int = 10, statistics: int = 1
    ) -> None:
        self.model, self.eigen, self.lr = model, eigen, lr
        self.every, self.statistics, self.measured = every, statistics, 0
        self.layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.state: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.k = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.k += 1
        self.fresh = self.k <= self.statistics or self.k % self.statistics == 0
        self.measured += self.fresh
        calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            calls[module] = (args[0].detach(), output)

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        self.model.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        for hook in hooks:
            hook.remove()
        for index, layer in enumerate(self.layers):
            inputs, output = calls[layer]
            assert output.grad is not None
            U, V = seen(layer, inputs, output.grad * len(x))
            self._update(index, layer, U, V)

    def _update(self, index: int, layer: nn.Module, U: Tensor, V: Tensor) -> None:
        weight, bias = layer.weight, layer.bias
        groups, outputs = U.shape[1], V.shape[-1]
        D = weight.grad.reshape(groups, outputs, -1)
        if bias is not None:
            D = torch.cat([D, bias.grad.reshape(groups, outputs, 1)], -1)
        steps = torch.stack(
            [
                torch.linalg.solve(self._matrix((index, j), U[:, j], V[:, j]), D[j].reshape(-1))
                for j in range(groups)
            ]
        ).reshape(D.shape)
        with torch.no_grad():
            if bias is not None:
                bias -= self.lr * steps[..., -1].reshape(bias.shape)
                steps = steps[..., :-1]
            weight -= self.lr * steps.reshape(weight.shape)

    def _matrix(self, key: tuple[int, int], U: Tensor, V: Tensor) -> Tensor:
        s = self.state.setdefault(key, {})
        B, T, k, root = *U.shape[:2], self.k, 0.1**0.5
        keep = min(0.95, 1 - 1 / self.measured) if self.fresh else 1.0
        for name, now in (
            ("A", torch.einsum("bti,btj->ij", U, U) / B),
            ("G", torch.einsum("bto,btp->op", V, V) / (B * T)),
        ):
            s[name] = keep * s.get(name, torch.zeros_like(now)) + (1 - keep) * now
        A, G = s["A"], s["G"]
        if k <= self.every or k % self.every == 0:
            pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
            eye_A, eye_G = torch.eye(len(A)).double(), torch.eye(len(G)).double()
            s["M"] = torch.kron(G + root / pi * eye_G, A + root * pi * eye_A)
            basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
            if "U" in s:
                old = s["U"] @ torch.diag(s["s"]) @ s["U"].T
                s["s"] = (basis.T @ old @ basis).diagonal()
            s["U"] = basis
        each = torch.einsum("bto,bti->boi", V, U).reshape(B, -1)
        now = (each @ s["U"]).square().mean(0)
        s["s"] = keep * s.get("s", torch.zeros_like(now)) + (1 - keep) * now
        return s["U"] @ torch.diag(s["s"] + 0.1) @ s["U"].T if self.eigen else s["M"]


@pytest.mark.parametrize(("every", "statistics"), [(1, 1), (4, 1), (2, 3), (4, 2), (3, 3)])
@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": (2, 1), "padding": 1, "groups": 2},
        {"bias": False, "groups": 2},
    ],
)
def test_convolutions_by_dense_products(
    eigen: bool, every: int, statistics: int, options: dict[str, Any]
) -> None:
    model, twin = Image(**options), Image(**options)
    own = EKFAC if eigen else KFAC
    opt = own(model, lr=0.05, update_every=every, statistics_every=statistics)
    reference = Blocks(twin, eigen, 0.05, every, statistics)
    for x, y in images(9):
        train(model, opt, [(x, y)])
        reference.step(x, y)
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eigen", [False, True])
def test_sequences_by_dense_products(eigen: bool, bias: bool) -> None:
    model, twin = Sequence(bias), Sequence(bias)
    opt = (EKFAC if eigen else KFAC)(model, lr=0.05, update_every=4)
    reference = Blocks(twin, eigen, 0.05, 4)
    for x, y in sequences(9):
        train(model, opt, [(x, y)])
        reference.step(x, y)
    assert_same(model, twin, 1e-9)
