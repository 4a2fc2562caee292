# SPDX-License-Identifier: MIT
"""Kronecker statistics gathered some samples at a time are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpnopt import DDPNOpt, curvature
from ddpnopt.layers import MatrixRule, conv, matrix, patches

# All inputs span their space: the eigenvectors of what they do not span would be anyone's choice.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=2, bias=False),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (7, 2, 4, 4),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        ),
        (7, 2, 2, 2),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        (7, 5, 3),
    ),
    "dense": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (7, 3)),
}
KINDS = pytest.mark.parametrize("kind", [curvature.KFAC, curvature.EKFAC])


def trained(net: str, kind: type[curvature.Joint]) -> list[Tensor]:
    """Weights after three steps, two passes each."""
    torch.manual_seed(0)
    make, shape = NETS[net]
    model = make().double()
    opt = DDPNOpt(model, lr=0.05, curvature=kind(update_every=2))
    for _ in range(3):
        opt.zero_grad()
        for _ in range(2):
            x = torch.randn(shape, dtype=torch.float64)
            (F.cross_entropy(model(x), torch.arange(len(x)) % 3) / 2).backward()
        opt.step()
    return [p.detach() for p in model.parameters()]


@KINDS
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("at_once", [1, 100, 400])
def test_some_samples_at_a_time(
    net: str, kind: type[curvature.Joint], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many."""
    expected = trained(net, kind)
    parts: list[int] = []
    whole = MatrixRule._some_samples

    def counting(self: MatrixRule, module: nn.Module, samples: int, *tensors: Tensor) -> object:
        found = list(whole(self, module, samples, *tensors))
        assert sum(n for n, *_ in found) == samples
        parts.append(len(found))
        return found

    for module in (matrix, conv, patches):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(MatrixRule, "_some_samples", counting)
    for found, one in zip(trained(net, kind), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)
    assert max(parts) == 7 if at_once == 1 else max(parts) <= 7


@KINDS
def test_sums_by_hand(kind: type[curvature.Joint]) -> None:
    """A and G of a convolution with its bias, by its patches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten()).double()
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    h = model[0](x)
    (V,) = torch.autograd.grad(F.cross_entropy(h.flatten(1), torch.arange(5)), h)
    patches = F.unfold(x, 2).mT  # (samples, places, inputs)
    u = torch.cat([patches, torch.ones(5, 4, 1, dtype=torch.float64)], -1).flatten(0, 1)
    v = (5 * V).flatten(2).mT.flatten(0, 1)
    opt = DDPNOpt(model, lr=0.1, curvature=kind())
    F.cross_entropy(model(x), torch.arange(5)).backward()
    opt.step()
    state = opt.state[model[0].weight]
    torch.testing.assert_close(state["A"][0], u.mT @ u / 5)
    torch.testing.assert_close(state["G"][0], v.mT @ v / len(v))
