# SPDX-License-Identifier: MIT
"""KFAC and EKFAC with explicit Kronecker products, and the net they are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(5, 4, bias=bias)).double()


def data(steps: int, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(rows, 6, generator=g, dtype=torch.float64),
            torch.randint(4, (rows,), generator=g),
        )
        for _ in range(steps)
    ]


def train(
    model: nn.Module, opt: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> None:
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


class Dense:
    """KFAC and EKFAC of linear layers with explicit matrices."""

    def __init__(self, model: nn.Sequential, eigen: bool, lr: float, **options: Any) -> None:
        self.model, self.eigen, self.lr = model, eigen, lr
        self.damping = options.get("damping", 0.1)
        self.every = options.get("update_every", 10)
        self.momentum, self.decay = options.get("momentum", 0.0), options.get("weight_decay", 0.0)
        self.k, self.state = 0, [{} for m in model if isinstance(m, nn.Linear)]  # type: ignore[var-annotated]

    def step(self, x: Tensor, y: Tensor) -> None:
        self.k += 1
        inputs, outputs, h = [], [], x
        for module in self.model:
            if isinstance(module, nn.Linear):
                inputs.append(h.detach())
                h = module(h)
                h.retain_grad()
                outputs.append(h)
            else:
                h = module(h)
        self.model.zero_grad()
        F.cross_entropy(h, y).backward()
        layers = [m for m in self.model if isinstance(m, nn.Linear)]
        for layer, u, h, state in zip(layers, inputs, outputs, self.state, strict=True):
            self._update(layer, u, h.grad, state)

    def _update(self, layer: nn.Linear, u: Tensor, g: Tensor | None, s: dict[str, Tensor]) -> None:
        assert g is not None and layer.weight.grad is not None
        B, k = u.shape[0], self.k
        g = g * B
        D = layer.weight.grad + self.decay * layer.weight
        if layer.bias is not None:
            u = torch.cat([u, torch.ones(B, 1, dtype=u.dtype)], 1)
            assert layer.bias.grad is not None
            D = torch.cat([D, (layer.bias.grad + self.decay * layer.bias)[:, None]], 1)
        keep = min(0.95, 1 - 1 / k)
        A, G = u.T @ u / B, g.T @ g / B
        s["A"] = A if k == 1 else keep * s["A"] + (1 - keep) * A
        s["G"] = G if k == 1 else keep * s["G"] + (1 - keep) * G
        if k <= self.every or k % self.every == 0:
            pi = ((s["A"].trace() / len(A)) / (s["G"].trace() / len(G))).sqrt()
            root = self.damping**0.5
            eye_A, eye_G = (torch.eye(len(F), dtype=F.dtype) for F in (A, G))
            s["M"] = torch.kron(s["G"] + root / pi * eye_G, s["A"] + root * pi * eye_A)
            U = torch.kron(torch.linalg.eigh(s["G"])[1], torch.linalg.eigh(s["A"])[1])
            if "U" in s:  # the diagonal of the old matrix in the new basis
                s["s"] = (U.T @ s["U"] @ torch.diag(s["s"]) @ s["U"].T @ U).diagonal()
            s["U"] = U
        each = torch.einsum("bo,bi->boi", g, u).reshape(B, -1)
        now = (each @ s["U"]).square().mean(0)
        s["s"] = now if k == 1 else keep * s["s"] + (1 - keep) * now
        M = s["U"] @ torch.diag(s["s"] + self.damping) @ s["U"].T if self.eigen else s["M"]
        step = torch.linalg.solve(M, D.reshape(-1)).reshape(D.shape)
        s["b"] = step if k == 1 else self.momentum * s["b"] + step
        with torch.no_grad():
            layer.weight -= self.lr * s["b"][:, : layer.in_features]
            if layer.bias is not None:
                layer.bias -= self.lr * s["b"][:, -1]
