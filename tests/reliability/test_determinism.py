# SPDX-License-Identifier: MIT
"""Same seed, same bits; and nothing that torch's deterministic mode refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from reliability.faults import MODELS, OPTIMIZERS, Rig


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def trained(model: str, optimizer: str) -> list[Tensor]:
    rig = Rig.of(model, optimizer)
    torch.manual_seed(3)
    for seed in range(3):
        rig.iterate(seed)
    return [value.clone() for value in rig.model.state_dict().values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_same_seed_same_bits(model: str, optimizer: str) -> None:
    """All curvatures, depths and wrappers."""
    for a, b in zip(trained(model, optimizer), trained(model, optimizer), strict=True):
        assert torch.equal(a, b)


class Layers(nn.Module):
    """Layers with rules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.group, self.act = nn.GroupNorm(2, 6), nn.PReLU()
        self.gru, self.last = nn.GRUCell(6, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens)).transpose(1, 2)
        x = self.act(self.group(self.conv(x))).transpose(1, 2)
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
        out: Tensor = self.last(h)
        return out


@pytest.mark.parametrize("value", ["moreau", "gauss_newton", "low_rank"])
@pytest.mark.parametrize("curvature", ["identity", "adamw", "ekfac"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_every_rule(value: str, curvature: str, feedback: object) -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Layers()
        opt = DDPNOpt(model, lr=0.05, value=value, curvature=curvature, feedback=feedback)
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(model(torch.randint(0, 7, (5, 4))), torch.arange(5) % 3).backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def _run(own: bool, threads: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.ReLU())
    model.append(nn.Linear(200, 10))
    opt = DDPNOpt(model, lr=0.1) if own else torch.optim.SGD(model.parameters(), 0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(torch.randn(256, 64)), torch.arange(256) % 10).backward()
            opt.step()
    finally:
        torch.set_num_threads(before)
    return [p.detach().clone() for p in model.parameters()]


def test_as_many_threads_as_torch_itself_is_deterministic_in() -> None:
    """Repeated runs agree at 1 and at 2 threads; and across them wherever torch's own SGD does."""
    one, two = _run(True, 1), _run(True, 2)
    assert all(map(torch.equal, two, _run(True, 2)))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
