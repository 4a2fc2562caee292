# SPDX-License-Identifier: MIT
"""Kronecker statistics gathered some samples at a time are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize("bias", ["joined", "none", "of another rate"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_what_was_measured_is_not_formed_again(
    bias: str, feedback: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EKFAC's per-sample gradients of a convolution give s, the lengths and the feedback."""
    calls: list[str] = []
    original = conv.tap_matrices

    def counting(*args: Any) -> Any:
        calls.append("formed")
        return original(*args)

    monkeypatch.setattr(conv, "tap_matrices", counting)

    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=bias != "none"),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, padding=1, bias=bias != "none"),
            nn.Flatten(),
            nn.Linear(256, 3),
        ).double()
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in model.named_parameters() if n != "2.bias"]},
            {"params": [p for n, p in model.named_parameters() if n == "2.bias"], "lr": 0.02},
        ]
        params = groups if bias == "of another rate" else None
        options = {"curvature": "ekfac", "feedback": feedback, "params": params}
        opt = DDPNOpt(model, lr=0.05, **options)  # type: ignore[arg-type]
        for _ in range(3):
            opt.zero_grad()
            for n in (4, 3):
                x = torch.randn(n, 2, 8, 8, dtype=torch.float64)
                (F.cross_entropy(model(x), torch.arange(n) % 3, reduction="sum") / 7).backward()
            opt.step()
        return [p.detach() for p in model.parameters()]

    fast, formed = weights(), len(calls)
    monkeypatch.setattr(conv.ConvRule, "rotated", MatrixRule.rotated)
    slow = weights()
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    saved = len(calls) - 2 * formed  # steps, layers, passes
    assert saved == 3 * 2 * 2
