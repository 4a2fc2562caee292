# SPDX-License-Identifier: MIT
"""`open_loop` on two ranks is `open_loop` in one process on the concatenated batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpnopt import open_loop
from oracles.processes import RANKS, join, message, run_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
    pytest.mark.xdist_group("data_parallel"),  # one pair of ranks for the file
]
STEPS = 8
Given = tuple[torch.Tensor, torch.Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.5),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05),
}


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


def batch(step: int, samples: int = 8) -> Given:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 6, generator=generator).double()
    return x, torch.randint(4, (samples,), generator=generator)


def share(given: Given, rank: int) -> Given:
    size = len(given[1]) // RANKS
    rows = slice(rank * size, (rank + 1) * size)
    return given[0][rows], given[1][rows]


def train(
    model: nn.Module,
    kind: str,
    rank: int | None,
    passes: int = 1,
    samples: int = 8,
    steps: int = STEPS,
    robust: bool = True,
    value: str = "moreau",
) -> torch.Tensor:
    """The weights after some steps, with every pass but the last under ``no_sync``."""
    optimizer = OPTIMIZERS[kind](model.parameters())
    if robust:
        open_loop(getattr(model, "module", model), optimizer, value)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(passes):
            x, y = batch(passes * step + part, samples)
            if rank is not None:
                x, y = share((x, y), rank)
            waits = rank is not None and part < passes - 1
            with model.no_sync() if waits else nullcontext():
                (F.cross_entropy(model(x), y) / passes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SCENES: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd"},
    "adamw": {"kind": "adamw"},
    "sgd accumulated": {"kind": "sgd", "passes": 3},
    "adamw accumulated": {"kind": "adamw", "passes": 2},
    "one sample a rank": {"kind": "sgd", "samples": RANKS},
    "gauss_newton": {"kind": "sgd", "value": "gauss_newton"},
    "low_rank adamw": {"kind": "adamw", "value": "low_rank"},
}


def unrecognised_on_one_rank(rank: int, model: nn.Module) -> torch.Tensor:
    """One rank's loss is its own: nobody re-weights, and nobody waits for ever."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = open_loop(model, optimizer)
    for step in range(4):
        x, y = share(batch(step), rank)
        z = model(x)
        strange = rank == 1 and step % 2
        loss = z.abs().pow(1.5).mean() if strange else F.cross_entropy(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert handle.last_step is not None
        assert handle.last_step.depth == ("off" if step % 2 else "open_loop")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def not_finite_on_one_rank(rank: int, model: nn.Module) -> str:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    open_loop(model, optimizer)
    x, y = share(batch(0), rank)
    F.cross_entropy(model(x) * (float("inf") if rank else 1.0), y).backward()
    return message(optimizer.step)


def not_replicated(rank: int) -> str:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    open_loop(model, optimizer)
    x, y = share(batch(0), rank)
    F.cross_entropy(model(x), y).backward()
    return message(optimizer.step)


def partly_replicated(rank: int) -> str:
    model = network()
    model[2] = DistributedDataParallel(model[2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    open_loop(model, optimizer)
    x, y = share(batch(0), rank)
    F.cross_entropy(model(x), y).backward()
    return message(optimizer.step)


def other_layers(rank: int) -> str:
    """Ranks that run different layers can't be brought together."""
    model = network()
    wrapped = DistributedDataParallel(Branches(model), find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    open_loop(wrapped, optimizer)
    x, y = share(batch(0), rank)
    F.cross_entropy(wrapped(x, short=rank == 1), y).backward()
    return message(optimizer.step)


def batchnorm(rank: int) -> torch.Tensor:
    """Samples weighted once in front of a mixing, by statistics of the rank's own."""
    inner = network()
    model = DistributedDataParallel(nn.Sequential(inner[0], nn.BatchNorm1d(9), *inner[1:]).double())
    return train(model, "adamw", rank, steps=3)


class Branches(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole
        self.other = nn.Linear(6, 9).double()

    def forward(self, x: torch.Tensor, short: bool) -> torch.Tensor:
        first = self.other if short else self.whole[0]
        return self.whole[1:](first(x))


def work(rank: int, folder: str) -> dict[str, Any]:
    """Everything that two ranks have to do, in one pair of processes."""
    join(rank, folder)
    found: dict[str, Any] = {}
    for name, scene in SCENES.items():
        found[name] = train(DistributedDataParallel(network()), rank=rank, **scene)
    views = DistributedDataParallel(network(), gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
    found["views"] = train(views, "adamw", rank)
    static = DistributedDataParallel(network(), static_graph=True)
    found["static"] = train(static, "sgd", rank)
    for case in (unrecognised_on_one_rank, not_finite_on_one_rank):
        found[case.__name__] = case(rank, DistributedDataParallel(network()))
    found["batchnorm"] = batchnorm(rank)
    for refused in (not_replicated, partly_replicated, other_layers):
        found[refused.__name__] = refused(rank)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(__file__, "work", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENES)
def test_two_ranks_are_one_process(results: list[dict[str, Any]], name: str) -> None:
    one = train(network(), rank=None, **SCENES[name])
    plain = train(network(), rank=None, robust=False, **SCENES[name])
    assert torch.equal(results[0][name], results[1][name])
    torch.testing.assert_close(results[0][name], one, rtol=0, atol=1e-10)
    assert (one - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name, kind", [("views", "adamw"), ("static", "sgd")])
def test_options_of_ddp_change_nothing(results: list[dict[str, Any]], name: str, kind: str) -> None:
    assert torch.equal(results[0][name], results[1][name])
    torch.testing.assert_close(results[0][name], results[0][kind], rtol=0, atol=1e-10)


def test_all_ranks_decide_alike(results: list[dict[str, Any]]) -> None:
    for case in ("unrecognised_on_one_rank", "batchnorm"):
        assert torch.equal(results[0][case], results[1][case])


@pytest.mark.parametrize(
    "case, words",
    [
        ("not_finite_on_one_rank", "NonFiniteError: the gradient at"),
        ("not_replicated", "not run by DistributedDataParallel.*call"),
        ("partly_replicated", "'0.weight' is outside.*wrap"),
        ("other_layers", "different layers.*run the same"),
    ],
)
def test_what_cannot_be_reduced_is_refused_by_name(
    results: list[dict[str, Any]], case: str, words: str
) -> None:
    for result in results:
        assert re.search(words, result[case], re.DOTALL), result[case]
