# SPDX-License-Identifier: MIT
"""Small nets, losses with known Hessians, and comparisons shared by the tests."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from oracles.flat import Chain, flat_parameters

torch.set_num_threads(1)

Loss = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
}

# Each a set of Conv2d options for two input channels of 6 x 6.
CONVOLUTIONS: tuple[dict[str, object], ...] = (
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 2, "dilation": 2, "padding": (1, 0)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": (2, 1)},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 1},
)


def identity(x: Tensor) -> Tensor:
    """No activation."""
    return x


def dense_chain(
    widths: list[int], activation: str = "tanh", seed: int = 0, bias: bool = True
) -> Chain:
    """A dense net in float64; the last layer is linear."""
    torch.manual_seed(seed)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    layers = [nn.Linear(i, o, bias=bias, dtype=torch.float64) for i, o in pairs]
    after = [ACTIVATIONS[activation]] * (len(layers) - 1) + [identity]
    return Chain(layers, after)


def conv_chain(
    options: list[dict[str, object]], classes: int = 3, activation: str = "tanh", seed: int = 0
) -> Chain:
    """Convolutions of two channels each, pooled, then a dense layer; inputs (B, 2, 6, 6)."""
    torch.manual_seed(seed)
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = [nn.Conv2d(2, 2, **o, dtype=torch.float64) for o in options]

    def pool(h: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(act(h), 2).flatten(1)

    layers.append(nn.Linear(8, classes, dtype=torch.float64))
    return Chain(layers, [act] * (len(options) - 1) + [pool, identity])


def input_for(chain: Chain, batch: int, seed: int = 1) -> Tensor:
    """Random inputs of the right shape."""
    first = chain.layers[0]
    shape = (2, 6, 6) if isinstance(first, nn.Conv2d) else (first.in_features,)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


@st.composite
def chains(draw: st.DrawFn, min_depth: int = 1) -> tuple[Chain, Tensor, int]:
    """A random chain, inputs and the number of outputs."""
    seed, batch = draw(st.integers(0, 999)), draw(st.integers(1, 4))
    classes = draw(st.integers(2, 4))
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    if draw(st.booleans()):
        options = draw(st.lists(st.sampled_from(CONVOLUTIONS), min_size=1, max_size=2))
        options = options[:1] + [{"kernel_size": 1}] * (len(options) - 1)
        chain = conv_chain(options, classes, activation, seed)
    else:
        hidden = draw(st.lists(st.integers(1, 5), min_size=min_depth, max_size=3))
        widths = [draw(st.integers(1, 4)), *hidden, classes]
        chain = dense_chain(widths, activation, seed, bias=draw(st.booleans()))
    return chain, input_for(chain, batch, seed + 1), classes


def cross_entropy(x: Tensor, classes: int, seed: int = 2) -> tuple[Tensor, Loss, Loss]:
    """Labels, the mean cross-entropy and its per-sample Hessians (with 1/B)."""
    y = torch.randint(0, classes, (len(x),), generator=torch.Generator().manual_seed(seed))

    def hessian(z: Tensor) -> Tensor:
        p = z.softmax(1)
        return (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(z)

    return y, lambda z: F.cross_entropy(z, y), hessian


def squared(x: Tensor, outputs: int, seed: int = 2) -> tuple[Tensor, Loss, Loss]:
    """Targets, the mean squared error over all elements and its Hessians 2 / (B C) I."""
    y = torch.randn(
        len(x), outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )

    def hessian(z: Tensor) -> Tensor:
        return 2 / z.numel() * torch.eye(outputs, dtype=z.dtype).expand(len(z), -1, -1)

    return y, lambda z: F.mse_loss(z, y), hessian


def rank_one(x: Tensor, outputs: int, seed: int = 2) -> tuple[Loss, Loss, Loss]:
    """0.5 mean (a . z - y)^2: its Hessian a a^T / B has rank one along the gradient.

    Returns:
        The factor S (B, C, 1), the loss and the Hessian.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(outputs, generator=generator, dtype=torch.float64)
    y = torch.randn(len(x), generator=generator, dtype=torch.float64)

    def factor(z: Tensor) -> Tensor:
        return (a / len(z) ** 0.5)[None, :, None].expand(len(z), -1, -1)

    def hessian(z: Tensor) -> Tensor:
        return factor(z) @ factor(z).mT

    return factor, lambda z: 0.5 * ((z @ a - y) ** 2).mean(), hessian


def train(
    model: nn.Module, opt: torch.optim.Optimizer, batches: Iterable[Tensor], loss: Loss
) -> None:
    """The plain loop."""
    for x in batches:
        opt.zero_grad()
        loss(model(x)).backward()
        opt.step()


def steps(model: Chain, x: Tensor, loss: Loss, count: int, **options: object) -> DDPNOpt:
    """Some steps of the library on one batch."""
    opt = DDPNOpt(model, **options)  # type: ignore[arg-type]
    train(model, opt, [x] * count, loss)
    return opt


def assert_params(model: Chain, expected: list[Tensor], tolerance: float = 1e-10) -> None:
    """Compare each layer's flat parameters, relative to their size."""
    for t, (u, want) in enumerate(zip(flat_parameters(model), expected, strict=True)):
        error = float((u - want).abs().max() / want.abs().max().clamp(min=1.0))
        assert error <= tolerance, f"layer {t}: relative error {error:.2e}"


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    """Two modules have the same parameters and buffers."""
    for name, value in first.state_dict().items():
        other = second.state_dict()[name]
        if tolerance:
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(value, other), name


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's tensors."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """A module is bit for bit what ``snapshot`` saw."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def mlp(seed: int = 0, activation: type[nn.Module] = nn.Tanh, **options: object) -> nn.Sequential:
    """5-6-5-3, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 6),
        activation(**options),
        nn.Linear(6, 5),
        activation(**options),
        nn.Linear(5, 3),
    ).double()


def data(seed: int = 0, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs of ``mlp`` and labels."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (batch,), generator=generator)


def iterate(model: nn.Module, opt: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    """The plain loop with cross-entropy over ``data``."""
    for seed in seeds:
        x, y = data(seed)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def distance(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between two modules' parameters."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def generators() -> tuple[object, ...]:
    """States of the torch, NumPy and Python generators.

    Run-time type checkers pick the list items that they look at by Python's generator, so its
    state is left out while they are at work (a test runs again without them).
    """
    numpy = np.random.get_state()
    checked = any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path)
    python = None if checked else random.getstate()
    return torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), *numpy[2:], python
