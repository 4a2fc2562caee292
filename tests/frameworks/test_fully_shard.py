# SPDX-License-Identifier: MIT
"""`open_loop` under `fully_shard` on two ranks is `open_loop` of one process on the whole batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ddpnopt import DDPNOpt, Feedback, open_loop
from ddpnopt.parameters import STANDS_FOR
from oracles.processes import RANKS, join, message, run_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
    pytest.mark.xdist_group("fully_shard"),  # one pair of ranks for the file
]
STEPS = 3
Given = tuple[torch.Tensor, torch.Tensor]
Optimizers = Callable[[Any], torch.optim.Optimizer]


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


class Images(nn.Module):
    """Convolutions, a norm, a skip connection; one filter count that two ranks can't halve."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), norm
        self.skip, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 2)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.conv(x.reshape(-1, 1, 2, 3))))
        h = self.last(h + torch.tanh(self.skip(h)))
        return self.head(h.flatten(1))


class Attention(nn.Module):
    """A transformer's layer, whose projections run as functions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.head = nn.Linear(2, 8), nn.Linear(8, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.first(x.view(-1, 3, 2))).mean(1))


class Words(nn.Module):
    """A table of words that is the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table, self.inner = nn.Embedding(4, 6), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.table((x[:, :2] * 100).long() % 4)
        return F.linear(torch.tanh(self.inner(words.flatten(1))), self.table.weight)


class Signs(torch.optim.Optimizer):
    """An optimizer of which nothing is known."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, 0.5, momentum=0.5, weight_decay=0.01)


def adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, 0.05)


@dataclass(frozen=True)
class Scene:
    """A training; ``per_layer``: every child is sharded by itself, not the model in one piece."""

    make: Callable[[], nn.Module] = network
    optimizer: Optimizers = adamw
    passes: int = 1
    value: str = "moreau"
    per_layer: bool = True
    reshard: bool = True
    scale: float = 1.0
    tolerance: float = 1e-12


SCENES = {
    "sgd": Scene(optimizer=sgd),
    "adamw": Scene(),
    "in one piece": Scene(per_layer=False),
    "not resharded": Scene(reshard=False),
    "accumulated": Scene(passes=2),
    "amsgrad": Scene(optimizer=lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True)),
    "rmsprop": Scene(optimizer=lambda p: torch.optim.RMSprop(p, 0.01)),
    "adagrad": Scene(optimizer=lambda p: torch.optim.Adagrad(p, 0.05)),
    # What shortens its updates is a number in float32.
    "unknown optimizer": Scene(optimizer=lambda p: Signs(p, 0.01), tolerance=1e-7),
    "gauss_newton": Scene(optimizer=sgd, value="gauss_newton"),
    "images": Scene(make=lambda: Images(nn.GroupNorm(2, 4))),
    "attention": Scene(make=Attention, tolerance=1e-9),
    "words": Scene(make=Words, per_layer=False),
    "grad scaler": Scene(scale=2.0**6),
}


def batch(step: int, rank: int | None, samples: int = 8) -> Given:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 6, generator=generator).double()
    y = torch.randint(4, (samples,), generator=generator)
    half = samples // RANKS
    rows = slice(None) if rank is None else slice(rank * half, (rank + 1) * half)
    return x[rows], y[rows]


def sharded(model: nn.Module, per_layer: bool = True, **options: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for child in model.children() if per_layer else ():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(scene: Scene, rank: int | None, robust: bool = True) -> torch.Tensor:
    """The weights after some steps; in one process where there is no rank."""
    model = scene.make().double()
    if rank is not None:
        model = sharded(model, scene.per_layer, reshard_after_forward=scene.reshard)
    optimizer = scene.optimizer(model.parameters())
    handle = open_loop(model, optimizer, scene.value) if robust else None
    scaler = torch.amp.GradScaler("cpu", init_scale=scene.scale, enabled=scene.scale != 1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(scene.passes):
            x, y = batch(scene.passes * step + part, rank)
            scaler.scale(F.cross_entropy(model(x), y) / scene.passes).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        scaler.step(optimizer)
        scaler.update()
        if handle is not None:
            assert handle.last_step is not None and handle.last_step.depth == "open_loop"
    return weights(model)


def weights(model: nn.Module) -> torch.Tensor:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def ones(z: torch.Tensor) -> torch.Tensor:
    """A cost without curvature: all coefficients are 1."""
    return z.new_zeros(*z.shape, 1)


def undamped(rank: int) -> dict[str, Any]:
    """Without damping, and off, it is the optimizer to the last bit."""
    found = []
    for kind in ("plain", "ones", "removed"):
        model = sharded(network())
        optimizer = adamw(model.parameters())
        if kind != "plain":
            handle = open_loop(model, optimizer, terminal=ones if kind == "ones" else "auto")
            if kind == "removed":
                handle.remove()
        for step in range(3):
            x, y = batch(step, rank)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(weights(model))
    return {"ones": torch.equal(found[0], found[1]), "removed": torch.equal(found[0], found[2])}


def step_of(
    rank: int,
    change: Callable[[Any], None] = lambda model: None,
    make: Callable[[], nn.Module] = network,
    passes: int = 1,
    spoil: Callable[[torch.Tensor], torch.Tensor] = lambda z: z,
    **options: Any,
) -> str:
    """What one step says, on this rank."""
    model = sharded(make().double())
    optimizer = sgd(model.parameters())

    def run() -> None:
        handle = open_loop(model, optimizer, **options)
        change(model)
        for part in range(passes):
            if passes > 1:
                model.set_requires_gradient_sync(part == passes - 1)
            x, y = batch(part, rank)
            F.cross_entropy(spoil(model(x)), y).backward()
        optimizer.step()
        assert handle.last_step is not None
        raise RuntimeError(f"taken: {handle.last_step.depth}")

    return message(run)


def factor(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)


def sharded_too_late(rank: int) -> str:
    model = network()
    optimizer = sgd(model.parameters())
    open_loop(model, optimizer)
    sharded(model)
    x, y = batch(0, rank)
    F.cross_entropy(model(x), y).backward()
    return message(optimizer.step)


def around(model: nn.Module, make: Optimizers = sgd, **options: Any) -> Feedback:
    return Feedback(model, make(model.parameters()), **options)


#: A unit's length is that of all its parts, so the bound on its step is for whole parameters.
BOUNDED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{
        f"{make.__name__}, feedback={feedback}, distributed={distributed}": partial(
            around, make=make, feedback=feedback, distributed=distributed, trust=True
        )
        for make in (sgd, adamw)
        for feedback in (True, "open_loop", False)
        for distributed in (True, False)
    },
    "DDPNOpt": partial(DDPNOpt, lr=0.1, curvature="trust"),
    "DDPNOpt, open loop": partial(DDPNOpt, lr=0.1, curvature="trust", feedback="open_loop"),
}


def alone(rank: int | None) -> torch.Tensor:
    """Without feedback and by itself it is exactly the optimizer, sharded or not."""
    model = sharded(network()) if rank is not None else network()
    optimizer = around(model, adamw, feedback=False, distributed=False)
    for step in range(STEPS):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return weights(model)


def work(rank: int, folder: str) -> dict[str, Any]:
    join(rank, folder)
    found: dict[str, Any] = {name: train(scene, rank) for name, scene in SCENES.items()}
    found.update(undamped(rank))

    def strange(z: torch.Tensor) -> torch.Tensor:
        return z.abs().pow(1.5) if rank else z

    found["unrecognised"] = step_of(rank, spoil=strange)
    found["not finite"] = step_of(rank, spoil=lambda z: z * (float("inf") if rank else 1.0))
    found["not synchronised"] = step_of(rank, passes=2)
    found["factor"] = step_of(rank, factor)
    found["mixes"] = step_of(rank, make=lambda: Images(nn.BatchNorm2d(4)))
    found["low_rank"] = step_of(rank, value="low_rank")
    found["late"] = sharded_too_late(rank)
    found["DDPNOpt"] = message(lambda: DDPNOpt(sharded(network()), lr=0.1))
    found["Feedback"] = message(lambda: around(sharded(network())))
    found["by itself"] = message(lambda: around(sharded(network()), distributed=False))
    found["bounded"] = {
        k: message(partial(make, sharded(network()))) for k, make in BOUNDED.items()
    }
    found["alone"] = alone(rank)
    found["left"] = len(STANDS_FOR)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(__file__, "work", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENES)
def test_two_ranks_are_one_process(results: list[dict[str, Any]], name: str) -> None:
    scene = SCENES[name]
    one = train(scene, None)
    assert torch.equal(results[0][name], results[1][name])
    torch.testing.assert_close(results[0][name], one, rtol=0, atol=scene.tolerance)
    assert (one - train(scene, None, robust=False)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ones", "removed"])
def test_without_damping_it_is_the_optimizer(results: list[dict[str, Any]], kind: str) -> None:
    assert all(found[kind] for found in results)


@pytest.mark.parametrize(
    "case, words",
    [
        ("unrecognised", "taken: off"),
        ("not finite", "NonFiniteError: the gradient at"),
        ("not synchronised", "set_requires_gradient_sync.*leave it True"),
        ("factor", "not the mean of.*set_gradient_divide_factor"),
        ("mixes", "mixes samples.*GroupNorm"),
        ("low_rank", "value='low_rank'.*use value='moreau'"),
        ("late", "'0.weight' is a DTensor.*after fully_shard"),
        ("DDPNOpt", "'0.weight' is a DTensor.*open_loop"),
        ("Feedback", "'0.weight' is a DTensor.*open_loop"),
        ("by itself", "'0.weight' is a DTensor.*open_loop"),
    ],
)
def test_all_ranks_say_what_can_not_be(
    results: list[dict[str, Any]], case: str, words: str
) -> None:
    for found in results:
        assert re.search(words, found[case], re.DOTALL), found[case]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_is_refused_and_what_has_none_is_named(
    results: list[dict[str, Any]], name: str
) -> None:
    words = (
        "'0.weight' is a DTensor.*use DistributedDataParallel, or leave trust out and.*open_loop"
    )
    for found in results:
        assert re.search(f"UnsupportedModelError: {words}", found["bounded"][name])


def test_without_feedback_the_optimizer_steps_by_itself(results: list[dict[str, Any]]) -> None:
    for found in results:
        torch.testing.assert_close(found["alone"], alone(None), rtol=0, atol=1e-12)
