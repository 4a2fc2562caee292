# SPDX-License-Identifier: MIT
"""What goes wrong on one rank is an error on every rank: no rank waits, none steps alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpnopt
from ddpnopt import DDPNOpt, Feedback
from ddpnopt.value import Augmented
from oracles.processes import RANKS, join, message, run_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
    pytest.mark.xdist_group("ranks_fail"),  # one pair of ranks for the file
]


class Fragile(nn.Module):
    """Fails when it is told to, in a rollout or anywhere."""

    broken: str = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken == "rollout" and not torch.is_grad_enabled():
            raise ValueError("the user's own error")
        return x


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    front = nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh()
    return nn.Sequential(*front, Fragile(), nn.Linear(7, 4)).double()


def data(rank: int, seed: int = 0, samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    x = torch.randn(samples, 6, generator=generator).double()
    return x, torch.randint(4, (samples,), generator=generator)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def iterate(model: Any, optimizer: Any, rank: int, seed: int = 0, scale: float = 1.0) -> None:
    x, y = data(rank, seed)
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) * scale).backward()
    optimizer.step()


def setting(ddp: bool, **options: Any) -> tuple[Any, nn.Module, Any]:
    inner = network()
    model: Any = DistributedDataParallel(inner) if ddp else inner
    optimizer = DDPNOpt(model, lr=0.1, **options)
    return model, inner, optimizer


def in_the_rollout(rank: int, ddp: bool) -> dict[str, Any]:
    """The user's module fails on rank 1, behind two layers that have moved already."""
    model, inner, optimizer = setting(ddp, curvature="adamw")
    iterate(model, optimizer, rank)
    before, state = weights(inner), optimizer.state[inner[0].weight]["exp_avg"].clone()
    inner[4].broken = "rollout" if rank == 1 else ""
    error = message(lambda: iterate(model, optimizer, rank, 1))
    kept = torch.equal(weights(inner), before)
    kept &= torch.equal(optimizer.state[inner[0].weight]["exp_avg"], state)
    inner[4].broken = ""
    iterate(model, optimizer, rank, 1)
    return {"error": error, "kept": kept, "weights": weights(inner)}


def not_finite(rank: int, ddp: bool, nonfinite: str, **options: Any) -> dict[str, Any]:
    model, inner, optimizer = setting(ddp, nonfinite=nonfinite, **options)
    iterate(model, optimizer, rank)
    before = weights(inner)
    scale = float("inf") if rank == 1 else 1.0
    error = message(lambda: iterate(model, optimizer, rank, 1, scale))
    kept = torch.equal(weights(inner), before)
    iterate(model, optimizer, rank, 2)
    found = {"error": error, "kept": kept, "weights": weights(inner)}
    return {**found, "skipped": optimizer.skipped}


def other_weights(rank: int) -> dict[str, Any]:
    model = network(seed=rank)
    optimizer = DDPNOpt(model, lr=0.1)
    before = weights(model)
    error = message(lambda: iterate(model, optimizer, rank))
    return {"error": error, "kept": torch.equal(weights(model), before)}


def drifted_later(rank: int) -> dict[str, Any]:
    """One weight in one bit, on one rank: found at the next comparison."""
    from ddpnopt import company

    model, inner, optimizer = setting(ddp=False)
    every, company.COMPARE_EVERY = company.COMPARE_EVERY, 3
    errors = []
    for step in range(4):
        if step == 1 and rank == 1:
            with torch.no_grad():
                inner[0].weight[0, 0] *= 1 + 1e-15
        errors.append(message(partial(iterate, model, optimizer, rank, step)))
    company.COMPARE_EVERY = every
    return {"errors": errors}


def other_gradients(rank: int) -> dict[str, Any]:
    model, inner, optimizer = setting(ddp=True)
    x, y = data(rank)
    F.cross_entropy(model(x), y).backward()
    before = weights(inner)
    if rank == 1:
        inner[0].weight.grad[0, 0] += 1.0
    error = message(optimizer.step)
    return {"error": error, "kept": torch.equal(weights(inner), before)}


def without_sync(rank: int) -> dict[str, Any]:
    model, inner, optimizer = setting(ddp=True)
    x, y = data(rank)
    with model.no_sync():
        F.cross_entropy(model(x), y).backward()
    return {"error": message(optimizer.step)}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(6, 7).double(), nn.Linear(6, 7).double()
        self.last = nn.Linear(7, 4).double()

    def forward(self, x: torch.Tensor, other: bool) -> torch.Tensor:
        return self.last((self.other if other else self.first)(x))


def other_layers(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Branches()
    optimizer = DDPNOpt(model, lr=0.1)
    x, y = data(rank)
    F.cross_entropy(model(x, other=rank == 1), y).backward()
    return {"error": message(optimizer.step)}


def unrecognised_on_one_rank(rank: int, ddp: bool) -> dict[str, Any]:
    model, inner, optimizer = setting(ddp)
    depths = []
    for step in range(4):
        x, y = data(rank, step)
        z = model(x)
        strange = rank == 1 and step % 2 == 1
        optimizer.zero_grad()
        (z.abs().pow(1.5).mean() if strange else F.cross_entropy(z, y)).backward()
        optimizer.step()
        depths.append(optimizer.last_step.depth)
    return {"depths": depths, "weights": weights(inner)}


def joined(rank: int) -> dict[str, Any]:
    model, _, optimizer = setting(ddp=True)
    with model.join():
        error = message(lambda: iterate(model, optimizer, rank))
    return {"error": error}


def mixed(rank: int) -> dict[str, Any]:
    """BatchNorm in training mode, dropout: the ranks stay equal, statistics are counted once."""
    torch.manual_seed(0)
    parts = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 4)
    model = DistributedDataParallel(nn.Sequential(*parts).double())
    optimizer = DDPNOpt(model, lr=0.1, curvature="adamw")
    torch.manual_seed(rank)
    for step in range(5):
        iterate(model, optimizer, rank, step)
    norm = model.module[1]
    x, _ = data(rank, 7)
    model(x)  # hands out rank 0's buffers before it counts its own batch
    return {
        "weights": weights(model),
        "counted": int(norm.num_batches_tracked),
        "depth": optimizer.last_step.depth,
    }


def by_itself(rank: int) -> dict[str, Any]:
    model = network(seed=rank)
    optimizer = DDPNOpt(model, lr=0.1, distributed=False)
    for step in range(3 + rank):  # nobody waits
        iterate(model, optimizer, rank, step)
    return {"weights": weights(model)}


def groups_of_one(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([one]) for one in range(RANKS)]
    model = network(seed=rank)
    optimizer = DDPNOpt(model, lr=0.1, process_group=groups[rank])
    for step in range(3 + rank):
        iterate(model, optimizer, rank, step)
    other = message(lambda: DDPNOpt(model, process_group=groups[1 - rank]))
    both = message(lambda: DDPNOpt(model, process_group=groups[rank], distributed=False))
    return {"weights": weights(model), "other": other, "both": both}


def said(rank: int) -> dict[str, Any]:
    """What is said, and how often."""
    inner = network()
    model = DistributedDataParallel(inner)
    optimizer = DDPNOpt(model, lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(3):
            x, y = data(rank, step, samples=4 + rank)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {"said": [str(one.message) for one in seen if one.category is ddpnopt.DDPNOptWarning]}


def waiting(rank: int) -> dict[str, Any]:
    """Rank 1 runs out of batches and waits for rank 0, as long as their group lets it."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    model = network()
    optimizer = DDPNOpt(model, lr=0.1, process_group=group)
    error = ""
    for step in range(3 - rank):
        error = message(partial(iterate, model, optimizer, rank, step))
    if rank == 1:
        error = message(lambda: dist.barrier(group))
    return {"error": error}


def refused(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def once(make: Callable[[Any], Any], model: Any = None) -> str:
        model = network() if model is None else model
        return message(lambda: iterate(model, make(model), rank))

    sync = nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4)).double()
    partly = network()
    partly[2] = DistributedDataParallel(partly[2])
    return {
        "brake": once(lambda m: Feedback(m, torch.optim.SGD(m.parameters(), 0.1), mode="brake")),
        "augmented": once(lambda m: DDPNOpt(m, lr=0.1, value=Augmented())),
        "emsa": once(ddpnopt.EMSA),
        "vanilla": once(ddpnopt.VanillaDDP),
        "vgr": once(ddpnopt.SGDVGR),
        "sync": once(DDPNOpt, sync),
        "partly": once(DDPNOpt, partly),
        "static": once(
            lambda m: DDPNOpt(m, weight_gradients=False),
            DistributedDataParallel(network(), static_graph=True),
        ),
        "alone": once(lambda m: DDPNOpt(m, distributed=False), DistributedDataParallel(network())),
        "sharded": once(DDPNOpt, fully_shard(network(), mesh=init_device_mesh("cpu", (RANKS,)))),
    }


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "rollout, ddp": lambda rank: in_the_rollout(rank, True),
    "rollout": lambda rank: in_the_rollout(rank, False),
    "not finite, ddp": lambda rank: not_finite(rank, True, "raise"),
    "not finite": lambda rank: not_finite(rank, False, "raise"),
    "not finite, held": lambda rank: not_finite(rank, True, "raise", weight_gradients=False),
    "skipped, ddp": lambda rank: not_finite(rank, True, "skip"),
    "skipped": lambda rank: not_finite(rank, False, "skip", curvature="kfac"),
    "skipped, held": lambda rank: not_finite(rank, False, "skip", weight_gradients=False),
    "other weights": other_weights,
    "drifted later": drifted_later,
    "other gradients": other_gradients,
    "without sync": without_sync,
    "other layers": other_layers,
    "unrecognised, ddp": lambda rank: unrecognised_on_one_rank(rank, True),
    "unrecognised": lambda rank: unrecognised_on_one_rank(rank, False),
    "joined": joined,
    "mixed": mixed,
    "by itself": by_itself,
    "groups of one": groups_of_one,
    "said": said,
    "refused": refused,
    "waiting": waiting,
}


def work(rank: int, folder: str) -> dict[str, Any]:
    join(rank, folder, 20)
    found = {name: case(rank) for name, case in CASES.items()}
    dist.destroy_process_group()
    return found


def unequal(rank: int, folder: str) -> dict[str, Any]:
    """Rank 1 runs out of batches and leaves."""
    join(rank, folder, 20)
    model, inner, optimizer = setting(ddp=folder.endswith("ddp"))
    error = ""
    for step in range(4 - rank):
        before = weights(inner)
        error = error or message(partial(iterate, model, optimizer, rank, step))
    return {"error": error, "kept": torch.equal(weights(inner), before)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(__file__, "work", tmp_path_factory.mktemp("ranks"), limit=200)


def of(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [result[case] for result in results]


@pytest.mark.parametrize("case", ["rollout, ddp", "rollout"])
def test_an_error_in_one_rank_s_rollout_is_everybody_s(
    results: list[dict[str, Any]], case: str
) -> None:
    first, second = of(results, case)
    assert re.match("RankError: another rank has failed", first["error"])
    assert second["error"] == "ValueError: the user's own error"
    assert first["kept"] and second["kept"]
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("case", ["not finite, ddp", "not finite", "not finite, held"])
def test_not_finite_on_one_rank(results: list[dict[str, Any]], case: str) -> None:
    first, second = of(results, case)
    for found in (first, second):
        assert found["error"].startswith("NonFiniteError") and found["kept"]
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("case", ["skipped, ddp", "skipped", "skipped, held"])
def test_all_ranks_skip(results: list[dict[str, Any]], case: str) -> None:
    first, second = of(results, case)
    for found in (first, second):
        assert not found["error"] and found["kept"] and found["skipped"] == 1
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize(
    "case, words",
    [
        ("other weights", "RankError: the ranks' weights differ: start all"),
        ("other gradients", "RankError: p.grad differs between.*changed on some ranks only"),
        ("without sync", "RankError: p.grad differs between.*ran under no_sync"),
        (
            "other layers",
            "UnsupportedModelError: the ranks have run different layers.*run the same",
        ),
        ("joined", "UnsupportedModelError: .*join.. lets ranks run out.*same number of batches"),
    ],
)
def test_ranks_that_do_not_do_the_same(
    results: list[dict[str, Any]], case: str, words: str
) -> None:
    for found in of(results, case):
        assert re.match(words, found["error"], re.DOTALL), found["error"]
        assert found.get("kept", True)


def test_a_bit_that_drifts_is_found_at_the_next_comparison(results: list[dict[str, Any]]) -> None:
    for found in of(results, "drifted later"):
        assert found["errors"][:3] == ["", "", ""]
        assert "weights differ" in found["errors"][3]


@pytest.mark.parametrize("case", ["unrecognised, ddp", "unrecognised"])
def test_no_rank_is_in_feedback_alone(results: list[dict[str, Any]], case: str) -> None:
    first, second = of(results, case)
    assert first["depths"] == second["depths"] == ["closed_loop", "off"] * 2
    assert torch.equal(first["weights"], second["weights"])


def test_batchnorm_and_dropout_stay_equal_and_count_once(results: list[dict[str, Any]]) -> None:
    first, second = of(results, "mixed")
    assert torch.equal(first["weights"], second["weights"])
    assert first["counted"] == second["counted"] == 6
    assert first["depth"] == second["depth"] == "closed_loop"


@pytest.mark.parametrize("case", ["by itself", "groups of one"])
def test_each_process_by_itself(results: list[dict[str, Any]], case: str) -> None:
    first, second = of(results, case)
    for rank, found in enumerate((first, second)):
        model = network(seed=rank)
        optimizer = DDPNOpt(model, lr=0.1)
        for step in range(3 + rank):
            iterate(model, optimizer, rank, step)
        assert torch.equal(found["weights"], weights(model))


def test_a_group_is_checked(results: list[dict[str, Any]]) -> None:
    for found in of(results, "groups of one"):
        assert "process_group=" in found["other"] and "belongs to" in found["other"]
        assert "leave one of them out" in found["both"]


def test_what_is_said_is_said_once(results: list[dict[str, Any]]) -> None:
    for found in of(results, "said"):
        group, uneven = found["said"]
        assert "default process group" in group and "process_group=" in group
        assert "batches of different sizes" in uneven and "drop_last" in uneven


@pytest.mark.parametrize(
    "case, words",
    [
        ("brake", "mode='brake' needs all samples.*default mode"),
        ("augmented", "value='augmented' needs all samples"),
        ("emsa", "optimal control needs all samples"),
        ("vanilla", "optimal control needs all samples"),
        ("vgr", "SGDVGR needs all samples"),
        ("sync", "'1' is SyncBatchNorm.*use BatchNorm or GroupNorm"),
        ("alone", "distributed=False, but DistributedDataParallel runs.*leave one of them"),
        ("static", "weight_gradients=False with.*static_graph=True.*leave one of them"),
        ("partly", "'0.weight' is outside the model's DistributedDataParallel.*wrap"),
        ("sharded", "'0.weight' is a DTensor.*use DistributedDataParallel"),
    ],
)
def test_what_can_t_be_spread_is_refused_by_name(
    results: list[dict[str, Any]], case: str, words: str
) -> None:
    for found in of(results, "refused"):
        assert re.search("UnsupportedModelError: .*" + words, found[case], re.DOTALL), found[case]


def test_a_rank_that_leaves_lets_nobody_wait(tmp_path: Any) -> None:
    first, second = run_ranks(__file__, "unequal", tmp_path, limit=180)
    assert re.search("can't be reached.*same number of batches", first["error"], re.DOTALL)
    assert first["kept"] and not second["error"]


def test_ranks_wait_no_longer_than_the_group_does(results: list[dict[str, Any]]) -> None:
    first, second = of(results, "waiting")
    assert re.search("can't be reached.*same number of batches", first["error"], re.DOTALL)
    assert second["error"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"communication": "fast"}, "communication='fast': choose from layerwise, two_bucket"),
        ({"communication": "two_bucket", "weight_gradients": False}, "use weight_gradients=True"),
        ({"process_group": "workers"}, "process_group='workers': expected a group"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=words):
        DDPNOpt(model, **options)
    with pytest.raises(ValueError, match=words):
        Feedback(model, torch.optim.SGD(model.parameters(), 0.1), **options)
