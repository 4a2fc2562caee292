# SPDX-License-Identifier: MIT
"""Second derivatives of layer rules against autograd of the module's own forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpnopt.layers import rule_for

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), ((5, 4),)),
    "sequence": (lambda: nn.Linear(4, 3, bias=False), ((5, 2, 4),)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), ((3, 4, 5, 5),)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 2, 3, 2), ((4, 3, 4),)),
    "layer_norm": (lambda: nn.LayerNorm(5), ((4, 5),)),
    "prelu": (nn.PReLU, ((4, 5),)),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), ((5, 3), (5, 2))),
}


@pytest.mark.parametrize("kind", CASES)
def test_mixed_and_state_curvature(kind: str) -> None:
    make, shapes = CASES[kind]
    module = make().double()
    rule = rule_for(module)
    assert rule is not None
    inputs = [torch.randn(shape).double() for shape in shapes]
    x = rule.pack(module, inputs)
    dx = torch.randn_like(x)
    V = torch.randn_like(module(*inputs))
    params = dict(module.named_parameters())

    def along(state: Tensor, u: dict[str, Tensor]) -> Tensor:
        return (functional_call(module, u, rule.unpack(module, state)) * V).sum()

    state = x.clone().requires_grad_()
    g_x = torch.autograd.grad(along(state, params), state, create_graph=True)[0]
    expected = torch.autograd.grad(
        (g_x * dx).sum(), list(params.values()), allow_unused=True, retain_graph=True
    )
    found = rule.mixed(module, x, dx, V)
    for (name, p), one in zip(params.items(), expected, strict=True):
        one = torch.zeros_like(p) if one is None else one
        torch.testing.assert_close(found.get(name, torch.zeros_like(p)), one)
    hessian = torch.autograd.functional.hessian(lambda s: along(s, params), x)
    rows = len(x)
    hessian = hessian.reshape(rows, x[0].numel(), rows, x[0].numel())
    own = torch.stack([hessian[i, :, i] for i in range(rows)])
    curvature = rule.state_curvature(module, x, V, rows)
    assert float(hessian.norm()) == pytest.approx(float(own.norm()))
    torch.testing.assert_close(torch.zeros_like(own) if curvature is None else curvature, own)


@pytest.mark.parametrize("kind", CASES)
def test_output_at_other_parameters(kind: str) -> None:
    make, shapes = CASES[kind]
    module, other = make().double(), make().double()
    rule = rule_for(module)
    assert rule is not None
    inputs = [torch.randn(shape).double() for shape in shapes]
    x = rule.pack(module, inputs)
    torch.testing.assert_close(rule.output(module, x, {}), module(*inputs))
    params = {name: p.detach() for name, p in other.named_parameters()}
    torch.testing.assert_close(rule.output(module, x, params), other(*inputs))
