# SPDX-License-Identifier: MIT
"""Without weight gradients a convolution's bias gets its gradient, and nothing else is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ddpnopt

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 4, 3), (6, 2, 8)),
    "2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2), (6, 2, 5, 6)),
    "2d groups": (lambda: nn.Conv2d(2, 4, 2, groups=2), (6, 2, 4, 4)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (6, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 2), (6, 2, 3, 3)),
    "no bias": (lambda: nn.Conv2d(2, 4, 2, bias=False), (6, 2, 4, 4)),
}


class Asked(TorchDispatchMode):
    """What was asked of convolutions' backward: (inputs, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def network(kind: str, inplace: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Two convolutions of a kind, the second behind an activation."""
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[kind]
    first = make()
    x = torch.randn(shape)
    h = first(x)
    layers = [first, nn.ReLU(inplace), nn.Conv1d(4, 3, 1) if h.dim() == 3 else nn.Flatten(1)]
    if h.dim() > 3:
        layers = [*layers[:2], nn.Conv2d(4, 3, 1) if h.dim() == 4 else nn.Conv3d(4, 3, 1)]
    head = nn.Linear(3 * h[0, 0].numel(), 5)
    return nn.Sequential(*layers, nn.Flatten(), head), x, torch.arange(6) % 5


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By name, those that there are."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_gradient_of_the_bias(kind: str, inplace: bool) -> None:
    """As plain autograd finds it; no weight's, and nothing else of the layer is asked for."""
    model, x, y = network(kind, inplace)
    expected = gradients(model, x, y)
    opt = ddpnopt.DDPNOpt(model, lr=0.1, weight_gradients=False)
    gradients(model, x, y)  # the first passes are also looked at
    opt.step()
    opt.detach()
    model, x, y = network(kind, inplace)
    opt = ddpnopt.DDPNOpt(model, lr=0.1, weight_gradients=False)
    with Asked() as asked:
        found = gradients(model, x, y)
    assert found.keys() == {name for name in expected if "bias" in name}
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name])
    assert asked.masks and not any(mask[1] or mask[2] for mask in asked.masks)


@pytest.mark.parametrize("kind", ["2d", "transposed"])
def test_same_weights_as_with_weight_gradients(kind: str) -> None:
    """Of three steps."""
    made = []
    for asked in (True, False):
        model, x, y = network(kind)
        model.double()
        value = {"name": "moreau", "coupling": False}  # else remembered, not computed
        opt = ddpnopt.DDPNOpt(model, lr=0.1, weight_gradients=asked, value=value)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            opt.step()
        made.append([p.detach() for p in model.parameters()])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "2d"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_frozen_bias_of_the_first_layer(kind: str, feedback: bool | str) -> None:
    """It stays without gradient, and the weight is trained."""
    model, x, y = network("2d")
    if kind == "dense":
        model, x = nn.Sequential(nn.Linear(60, 4), nn.Tanh(), nn.Linear(4, 5)), x.flatten(1)
    first = model[0]
    assert isinstance(first, nn.Conv2d | nn.Linear) and first.bias is not None
    first.bias.requires_grad_(False)
    before = first.weight.detach().clone()
    opt = ddpnopt.DDPNOpt(model, lr=0.1, weight_gradients=False, feedback=feedback)
    found = gradients(model, x, y)
    opt.step()
    assert "0.bias" not in found and not first.bias.requires_grad
    assert bool((first.weight != before).any())


def test_half_precision_and_recomputation() -> None:
    """The gradient has the bias's dtype; a layer run again in backward saves what it saved."""
    model, x, y = network("2d")

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(self.inner[:3], x, use_reentrant=False)
            return self.inner[3:](h)

    outer = Recomputed()
    expected = gradients(outer, x, y)
    ddpnopt.DDPNOpt(outer, lr=0.1, weight_gradients=False)
    found = gradients(outer, x, y)
    torch.testing.assert_close(found["inner.0.bias"], expected["inner.0.bias"])
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(outer, x, y)
    assert half["inner.0.bias"].dtype == torch.float32
    torch.testing.assert_close(half["inner.0.bias"], expected["inner.0.bias"], rtol=0.1, atol=5e-3)


def test_one_sample_without_a_batch_axis() -> None:
    """Channels come first then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 3, 3))
    x = torch.randn(2, 4, 4)

    def backward() -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(model(x).reshape(1, 3), torch.tensor([1])).backward()
        return [m.bias.grad.clone() for m in (model[0], model[2])]

    expected = backward()
    ddpnopt.DDPNOpt(model, lr=0.1, weight_gradients=False, feedback="open_loop")
    torch.testing.assert_close(backward(), expected)
