# SPDX-License-Identifier: MIT
"""The plain PyTorch loop as a whole; its single promises are tested in ``contract/``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ddpnopt import PAPER, DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.value import Dense, LowRank
from oracles.common import assert_same, data, distance, mlp

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


def blobs(count: int = 96) -> TensorDataset:
    """Three separable classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    centres = 2.0 * torch.randn(3, 5, generator=generator)
    return TensorDataset(centres[y] + torch.randn(count, 5, generator=generator), y)


def evaluate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(float(F.cross_entropy(model(x), y)) for x, y in loader)
    model.train()
    return total / len(loader)


def train(model: nn.Module, opt: torch.optim.Optimizer, epochs: int = 3) -> list[float]:
    loader = DataLoader(
        blobs(), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    history = [evaluate(model, loader)]
    for _ in range(epochs):
        for x, y in loader:  # the last batch is smaller
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
        history.append(evaluate(model, loader))
    return history


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feedback": "open_loop"},
        {"feedback": False},
        {"value": "gauss_newton"},
        {"value": PAPER, "lr": 0.05},
        {"value": LowRank(clip=1.0)},
        {"value": Dense(regularization=1e-4)},
        {"curvature": RMSprop(second_moment="per_sample"), "lr": 0.02, "value": "low_rank"},
        {"curvature": "rmsprop", "lr": 0.01},
        {"momentum": 0.9, "lr": 0.05, "weight_decay": 1e-4},
    ],
    ids=str,
)
def test_it_trains(options: dict[str, object]) -> None:
    model = mlp().float()
    opt = DDPNOpt(model, **{"lr": 0.3, **options})  # type: ignore[arg-type]
    assert isinstance(opt, torch.optim.Optimizer)
    history = train(model, opt)
    assert history[-1] < 0.75 * history[0]
    off = options.get("feedback") is False
    assert opt.last_step.terminal == ("none" if off else "cross_entropy")


def test_it_trains_where_sgd_does_not() -> None:
    """The point of it all: a rate far above the tuned one."""
    model, twin = mlp().float(), mlp().float()
    history = train(model, DDPNOpt(model, lr=8.0))
    plain = train(twin, torch.optim.SGD(twin.parameters(), lr=8.0))
    assert history[-1] < 0.75 * history[0]
    assert not plain[-1] < 0.75 * plain[0]


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
def test_runs_repeat_bit_by_bit(feedback: object) -> None:
    models = [mlp().float(), mlp().float()]
    for model in models:
        train(model, DDPNOpt(model, lr=0.5, feedback=feedback), 1)
    assert_same(models[0], models[1])
    assert distance(models[0], mlp().float()) > 0


class Wrapped(nn.Module):
    """The same chain behind two more calls."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.extra = mlp(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.encoder(x))


def test_structure_of_the_module_does_not_matter() -> None:
    model, twin = Wrapped(), mlp()
    opt, other = DDPNOpt(model, lr=0.5), DDPNOpt(twin, lr=0.5)
    for seed in range(3):
        x, y = data(seed)
        for m, o in ((model, opt), (twin, other)):
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
    assert_same(model.encoder, twin)
    assert [layer.name for layer in opt.last_step.layers] == ["encoder.0", "encoder.2", "encoder.4"]


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_batch_of_one_sample(feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=0.5, feedback=feedback, terminal="cross_entropy")
    x, y = data(0, 1)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert distance(model, mlp()) > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
