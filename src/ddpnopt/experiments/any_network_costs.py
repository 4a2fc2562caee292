# SPDX-License-Identifier: MIT
"""Memory and operations of a training step of the study of `any_network`, against SGD's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ddpnopt.experiments.any_network_problems import Problem
from ddpnopt.experiments.bench.cases import Net, Variant
from ddpnopt.experiments.bench.measure import footprint
from ddpnopt.experiments.data import load
from ddpnopt.experiments.fingerprint import code_hash
from ddpnopt.experiments.models import build_model, wants_images
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import Built, build_optimizer
from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import LOSSES

KIND = "any-network cost"


@dataclass(frozen=True)
class Cost:
    """What a step needs.

    Attributes:
        mib: Peak of all live tensors, see `bench.measure.Footprint`; NaN if it can't be measured.
        gflop: 10^9 operations of its products and convolutions; NaN likewise.
        error: Why it can't.
    """

    mib: float = math.nan
    gflop: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class _Given(Net):
    """A network of the study with the first batch of its data."""

    batches: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def data(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and targets of one batch."""
        x, y = self.batches
        return x.to(device), y.to(device)


def _net(problem: Problem, base: RunConfig) -> Net:
    data = load(
        base.dataset,
        scale=base.scale,
        images=wants_images(base.architecture),
        folder=base.data,
        train_samples=base.train_samples,
        test_samples=base.test_samples,
    )
    objective = lookup(LOSSES, base.loss, "loss")(data.classes, torch.device("cpu"))
    return _Given(
        problem.heading,
        lambda: build_model(base.architecture, data.input_shape, data.classes),
        data.input_shape,
        base.batch,
        objective.loss,
        batches=(data.x_train[: base.batch], data.y_train[: base.batch]),
    )


def _variant(contender: Contender) -> Variant:
    def built(model: nn.Module) -> Built:
        # At the lowest rate: what a step costs does not depend on it, but must not diverge.
        options = dict(contender.options)
        return build_optimizer(contender.optimizer, model, contender.lrs[0], options)

    return Variant(lambda model: built(model).optimizer, clip=built(nn.Linear(1, 1)).grad_clip)


def _measure(net: Net, contender: Contender) -> Cost:
    try:
        found = footprint(net, _variant(contender))
    except Exception as error:  # one that fails must not cost the study its tables
        return Cost(error=f"{type(error).__name__}: {error}")
    return Cost(found.tensor_mib, found.gflop)


def costs_of(problem: Problem, base: RunConfig, store: SqliteStore) -> list[Cost]:
    """Measure a step of every optimizer of a problem, or read what was measured before.

    Args:
        problem: The network.
        base: Its configuration, with the folder of the data.
        store: Keeps the figures.

    Returns:
        One cost for each of the problem's contenders.
    """
    key = f"{base.key} {code_hash(__name__)}"
    kept = store.get_record(KIND, key)
    if kept is None:
        net = _net(problem, base)
        kept = {"costs": [asdict(_measure(net, c)) for c in problem.contenders()]}
        store.put_record(KIND, key, kept)
    return [Cost(**one) for one in kept["costs"]]
