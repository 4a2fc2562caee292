# SPDX-License-Identifier: MIT
"""The closed loop on two ranks is the closed loop of one process on the concatenated batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpnopt
from ddpnopt import DDPNOpt, Feedback
from ddpnopt.curvature import KFAC, RMSprop, Trust
from ddpnopt.value import Dense
from oracles.effort import effort
from oracles.processes import RANKS, join, run_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
    pytest.mark.xdist_group("ranks"),  # one pair of ranks for the file
]
#: 50: the whole proof, in two minutes. None: as many as a test may take.
STEPS = effort("DDPNOPT_RANK_STEPS", 0, 50)
Given = tuple[torch.Tensor, torch.Tensor]


def dense() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


class Images(nn.Module):
    """A convolution, a group norm, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.skip, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.conv(x.reshape(-1, 1, 2, 3))))
        h = h + torch.tanh(self.skip(h))
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def images() -> nn.Module:
    torch.manual_seed(4)
    return Images().double()


class Words(nn.Module):
    """Numbers as words, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, sparse=True)
        self.inner, self.head = nn.Linear(36, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (4 * x.abs()).long().clamp(max=11)
        return self.head(torch.tanh(self.inner(self.words(words).flatten(1))))


def sparse() -> nn.Module:
    torch.manual_seed(5)
    return Words().double()


def batch(step: int, samples: int) -> Given:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 6, generator=generator).double()
    return x, torch.randint(4, (samples,), generator=generator)


def share(given: Given, rank: int | None, uneven: bool = False) -> Given:
    if rank is None:
        return given
    size = len(given[1])
    cut = (size * 3 + 2) // 4 if uneven else size // RANKS
    rows = slice(0, cut) if rank == 0 else slice(cut, size)
    return given[0][rows], given[1][rows]


@dataclass
class Scene:
    """One training, the same on ranks and in one process."""

    make: Callable[[nn.Module], torch.optim.Optimizer]
    network: Callable[[], nn.Module] = dense
    samples: int = 8
    passes: int = 1
    clip: float | None = None
    uneven: bool = False
    ddp: bool = True
    unequal_pass: bool = False
    same: bool = False
    ignored: bool = False
    summed: bool = False


def own(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: DDPNOpt(model, **options)


def found(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: DDPNOpt(model.parameters(), **options)


def around(kind: type[torch.optim.Optimizer], **options: Any) -> Any:
    own = ("feedback", "weight_gradients", "trust", "communication")
    extra = {k: options.pop(k) for k in own if k in options}
    return lambda model: Feedback(model, kind(model.parameters(), **options), **extra)


OWN: dict[str, dict[str, Any]] = {
    "identity": {"lr": 0.5},
    "rmsprop": {"lr": 0.02, "curvature": "rmsprop"},
    "adamw": {"lr": 0.02, "curvature": "adamw"},
    "kfac": {"lr": 0.1, "curvature": KFAC(update_every=3)},
}
REQUIRED = tuple(OWN)
SCENES: dict[str, Scene] = {
    **{name: Scene(own(**options)) for name, options in OWN.items()},
    "momentum": Scene(own(lr=0.2, momentum=0.5, weight_decay=1e-3), clip=0.7),
    "rmsprop per sample": Scene(
        own(lr=0.02, curvature=RMSprop(second_moment="per_sample")), ddp=False
    ),
    "ekfac": Scene(own(lr=0.1, curvature="ekfac")),
    "kfac without feedback": Scene(lambda model: ddpnopt.KFAC(model, lr=0.1), ddp=False),
    "plain": Scene(own(lr=0.5, feedback=False), clip=0.3),
    "low_rank": Scene(own(lr=0.5, value="low_rank")),
    "low_rank adamw": Scene(own(lr=0.02, value="low_rank", curvature="adamw"), ddp=False),
    # With eps=1e-8 the order of the samples alone changes the weights by 1e-7 in 50 steps.
    "gauss_newton rmsprop": Scene(own(lr=0.02, value="gauss_newton", curvature=RMSprop(eps=1e-3))),
    "dense": Scene(own(lr=0.3, value="dense"), ddp=False),
    "second order": Scene(own(lr=0.3, value=Dense(dynamics="second_order")), ddp=False),
    "without weight gradients": Scene(own(lr=0.5, weight_gradients=False)),
    "without weight gradients, kfac": Scene(own(lr=0.1, curvature="kfac", weight_gradients=False)),
    "without weight gradients, adamw": Scene(
        own(lr=0.02, curvature="adamw", weight_gradients=False)
    ),
    "accumulated": Scene(own(lr=0.5), passes=3),
    "accumulated adamw": Scene(own(lr=0.02, curvature="adamw"), passes=2, clip=0.7),
    "one sample a rank": Scene(own(lr=0.3), samples=RANKS),
    "around SGD": Scene(around(torch.optim.SGD, lr=0.3, momentum=0.5)),
    "around AdamW": Scene(around(torch.optim.AdamW, lr=0.02)),
    "around Adagrad": Scene(around(torch.optim.Adagrad, lr=0.1), clip=1.0),
    "open loop": Scene(own(lr=0.5, feedback="open_loop"), clip=0.7),
    "open loop, kfac": Scene(own(lr=0.1, curvature="kfac", feedback="open_loop"), ddp=False),
    "open loop around AdamW": Scene(around(torch.optim.AdamW, lr=0.02, feedback="open_loop")),
    # The model is found by its first call: that of DistributedDataParallel, where there is one.
    "parameters": Scene(found(lr=0.5, momentum=0.5), clip=0.7),
    "parameters, kfac": Scene(found(lr=0.1, curvature="kfac"), ddp=False),
    "parameters, open loop": Scene(found(lr=0.5, feedback="open_loop")),
    "parameters, plain": Scene(found(lr=0.5, feedback=False)),
    "parameters, without weight gradients": Scene(found(lr=0.5, weight_gradients=False)),
    "compiled": Scene(own(lr=0.5), lambda: torch.compile(dense(), backend="eager")),  # type: ignore[arg-type, return-value]
    "images": Scene(own(lr=0.1), images),
    "images adamw": Scene(own(lr=0.02, curvature="adamw"), images, ddp=False),
    "images, kfac": Scene(own(lr=0.05, curvature="kfac"), images, ddp=False),
    # Samples are counted where nobody else averages.
    "uneven": Scene(own(lr=0.5), uneven=True, ddp=False),
    "uneven, clipped": Scene(own(lr=0.2, momentum=0.5), uneven=True, ddp=False, clip=0.7),
    "uneven adamw": Scene(own(lr=0.02, curvature="adamw"), uneven=True, ddp=False),
    "uneven kfac": Scene(own(lr=0.1, curvature="kfac"), uneven=True, ddp=False),
    "uneven low_rank": Scene(own(lr=0.5, value="low_rank"), uneven=True, ddp=False),
    "uneven images": Scene(own(lr=0.1), images, uneven=True, ddp=False),
    "uneven, accumulated": Scene(
        own(lr=0.3), uneven=True, ddp=False, passes=2, samples=9, unequal_pass=True
    ),
    "uneven, one sample": Scene(own(lr=0.3), uneven=True, ddp=False, samples=4),
    "uneven labels": Scene(own(lr=0.3), uneven=True, ddp=False, samples=7, ignored=True),
    "uneven sums": Scene(own(lr=0.05), uneven=True, ddp=False, summed=True),
    "uneven open loop": Scene(own(lr=0.5, feedback="open_loop"), uneven=True, ddp=False),
    "uneven without weight gradients": Scene(
        own(lr=0.5, weight_gradients=False), uneven=True, ddp=False
    ),
}


def bounded(bound: bool, **instead: Any) -> dict[str, Scene]:
    """At rates at which units' steps reach the bound that ``trust`` is; the same without it."""

    def momentum(**more: Any) -> Any:
        options = {"lr": 1.0, "momentum": 0.9, "trust": bound, **more, **instead}
        return around(torch.optim.SGD, **options)

    def adamw(**more: Any) -> Any:
        options = {"lr": 0.3, "weight_decay": 0.1, "trust": bound, **more, **instead}
        return around(torch.optim.AdamW, **options)

    def rprop() -> Any:
        return around(torch.optim.Rprop, lr=1.0, trust=bound, **instead)

    def curvature(inner: Any, **more: Any) -> Any:
        return own(**{"curvature": Trust(inner) if bound else inner, **more, **instead})

    def identity(**more: Any) -> Any:
        return curvature("identity", lr=1.0, momentum=0.9, **more)

    opened: dict[str, Any] = {"feedback": "open_loop"}
    return {
        "trust around SGD": Scene(momentum()),
        "trust around SGD, open loop": Scene(momentum(**opened)),
        "trust around SGD, accumulated": Scene(momentum(), passes=2, clip=0.7),
        "trust around AdamW": Scene(adamw()),
        "trust around AdamW, open loop": Scene(adamw(**opened)),
        "trust around AdamW, held": Scene(adamw(weight_gradients=False)),
        "trust around AdamW, uneven": Scene(adamw(), uneven=True, ddp=False),
        "trust around Rprop": Scene(rprop()),
        "trust": Scene(identity()),
        "trust, open loop": Scene(identity(**opened)),
        "trust, adamw": Scene(curvature("adamw", lr=0.3)),
        "trust, rmsprop": Scene(curvature("rmsprop", lr=0.1)),
    }


BOUNDED = bounded(True)
SCENES |= BOUNDED


def train(scene: Scene, rank: int | None, ddp: bool, steps: int) -> torch.Tensor:
    """The weights after some steps, with every pass but the last under ``no_sync``."""
    inner = scene.network()
    model: Any = DistributedDataParallel(inner) if ddp else inner
    optimizer = scene.make(model)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(scene.passes):
            samples = scene.samples - 4 * (scene.unequal_pass and part == 1)
            x, y = batch(scene.passes * step + part, samples)
            if scene.same:  # every rank has all of them
                x, y = (torch.cat([one] * (RANKS if rank is None else 1)) for one in (x, y))
            else:
                if scene.ignored:
                    y = y.where(torch.arange(len(y)) % 4 != 1, torch.tensor(-100))
                x, y = share((x, y), rank, scene.uneven)
            reduction = "sum" if scene.summed else "mean"
            # The ranks' sums are averaged.
            parts = scene.passes * (RANKS if scene.summed and rank is None else 1)
            with model.no_sync() if ddp and part < scene.passes - 1 else nullcontext():
                (F.cross_entropy(model(x), y, reduction=reduction) / parts).backward()
        if scene.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), scene.clip)
        optimizer.step()
    assert optimizer.last_step.depth == optimizer.options.depth  # type: ignore[attr-defined]
    return torch.cat([p.detach().flatten() for p in inner.parameters()])


def names() -> list[tuple[str, bool]]:
    """Every scene with DistributedDataParallel and without."""
    return [
        (name, ddp)
        for name, scene in SCENES.items()
        for ddp in (True, False)
        if scene.ddp or not ddp
    ]


def steps(name: str) -> int:
    """All 50 steps for everything take two minutes."""
    return STEPS or (8 if name in REQUIRED else 3)


#: What DistributedDataParallel averages itself; without it they are refused.
SPARSE: dict[str, Scene] = {
    "closed loop": Scene(own(lr=0.5), sparse),
    "around Adagrad": Scene(around(torch.optim.Adagrad, lr=0.1), sparse),
    "open loop": Scene(around(torch.optim.Adagrad, lr=0.1, feedback="open_loop"), sparse),
}
BUCKETS: dict[str, Scene] = {
    "identity": Scene(own(lr=0.5, communication="two_bucket")),
    "adamw": Scene(own(lr=0.02, curvature="adamw", communication="two_bucket")),
    "kfac": Scene(own(lr=0.1, curvature="kfac", communication="two_bucket")),
    "low_rank": Scene(own(lr=0.3, value="low_rank", communication="two_bucket")),
    "around AdamW": Scene(
        lambda model: Feedback(
            model, torch.optim.AdamW(model.parameters(), lr=0.02), communication="two_bucket"
        )
    ),
    "trust around AdamW": Scene(
        around(torch.optim.AdamW, lr=0.02, trust=0.05, communication="two_bucket")
    ),
}


def work(rank: int, folder: str) -> dict[Any, Any]:
    """Everything that two ranks have to do, in one pair of processes."""
    join(rank, folder)
    found: dict[Any, Any] = {
        ("two_bucket", name, same): train(replace(scene, same=same), rank, False, 4)
        for name, scene in BUCKETS.items()
        for same in (True, False)
    }
    found |= {(name, ddp): train(SCENES[name], rank, ddp, steps(name)) for name, ddp in names()}
    found |= {("sparse", name): train(scene, rank, True, 3) for name, scene in SPARSE.items()}
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(__file__, "work", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name, ddp", names())
def test_two_ranks_are_one_process(results: list[dict[Any, Any]], name: str, ddp: bool) -> None:
    first, second = (result[name, ddp] for result in results)
    assert torch.equal(first, second)
    one = train(SCENES[name], None, False, steps(name))
    torch.testing.assert_close(first, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_holds_the_steps_back(name: str) -> None:
    """What is compared is neither the training without it, nor the one without feedback."""
    one = train(BOUNDED[name], None, False, 3)
    assert (one - train(bounded(False)[name], None, False, 3)).abs().max() > 0.1
    other = bounded(True, feedback=False, weight_gradients=True)[name]
    assert (one - train(other, None, False, 3)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(results: list[dict[Any, Any]], name: str) -> None:
    """DistributedDataParallel divides them in place, while the states' gradients still count."""
    first, second = (result["sparse", name] for result in results)
    assert torch.equal(first, second)
    one = train(SPARSE[name], None, False, 3)
    torch.testing.assert_close(first, one, rtol=0, atol=1e-10)


def test_the_scenes_are_in_feedback() -> None:
    """What is compared is not the plain optimizer's training."""
    for name in REQUIRED:
        scene = SCENES[name]
        plain = Scene(own(**OWN[name], feedback=False))
        difference = train(scene, None, False, 12) - train(plain, None, False, 12)
        assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("name", BUCKETS)
def test_two_buckets_are_exact_where_the_ranks_have_the_same_samples(
    results: list[dict[Any, Any]], name: str
) -> None:
    """Then each rank's own feedback is what it takes the others' to be."""
    one = train(replace(BUCKETS[name], same=True), None, False, 4)
    for result in results:
        torch.testing.assert_close(result["two_bucket", name, True], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BUCKETS)
def test_two_buckets_are_near_and_the_ranks_stay_equal(
    results: list[dict[Any, Any]], name: str
) -> None:
    first, second = (result["two_bucket", name, False] for result in results)
    assert torch.equal(first, second)
    error = (first - train(BUCKETS[name], None, False, 4)).abs().max()
    assert 1e-9 < error < 2e-3
