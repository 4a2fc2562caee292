# SPDX-License-Identifier: MIT
"""Features that a model keeps on itself and that have a loss of their own: refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import assert_unchanged, snapshot
from oracles.graph_cases import problem, train
from oracles.graph_in_place import NETS as IN_PLACE
from oracles.graph_in_place import both
from oracles.graph_nets import NETS, net
from oracles.graph_parts import linear

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


class Residual(nn.Module):
    """Two blocks, and something put aside on the way."""

    def __init__(self, aside: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.aside = aside
        for name in ("stem", "a", "b", "c", "d"):
            setattr(self, name, linear(4, 4))
        self.head = linear(4, 3)
        self.feature: Tensor | None = None

    def keep(self, name: str, h: Tensor) -> Tensor:
        """Put it aside if it is the one."""
        if self.aside == name:
            self.feature = h
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Stem, two blocks, head."""
        h = self.keep("raw", self.stem(x))
        h = self.keep("stream", torch.tanh(h))
        low = self.keep("inner", torch.tanh(self.a(h)))
        h = self.keep("sum", h + self.b(low))
        gate = self.keep("gate", torch.sigmoid(h))  # of an earlier tensor and the layer's
        h = self.keep("late", h + self.d(torch.tanh(self.c(h * gate))))
        self.keep("mean", h.mean())
        made: Tensor = self.head(torch.tanh(h))
        return made


#: What is put aside, and the layer behind which it is made.
ASIDE = {"raw": "stem", "stream": "stem", "inner": "a", "sum": "b", "gate": "b", "late": "d"}
ASIDE["mean"] = "d"


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    return torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("aside", ASIDE)
@pytest.mark.parametrize("value", [Moreau(), LowRank(), GaussNewton()])
def test_its_own_loss_is_refused(aside: str, value: object) -> None:
    model = Residual(aside)
    opt = DDPNOpt(model, lr=0.3, value=value)
    x, y = batch()
    z = model(x)
    assert model.feature is not None
    (F.cross_entropy(z, y) + model.feature.square().mean()).backward()
    before = snapshot(model)
    text = f"'{ASIDE[aside]}'.*return it from the model.*feedback='open_loop'"
    with pytest.raises(UnsupportedModelError, match=text):
        opt.step()
    assert_unchanged(model, before)


@pytest.mark.parametrize("aside", ASIDE)
def test_put_aside_and_not_used_is_nothing(aside: str) -> None:
    model, twin = Residual(aside), Residual("")
    opts = [DDPNOpt(one, lr=0.3) for one in (model, twin)]
    x, y = batch()
    for _ in range(2):
        for one, opt in zip((model, twin), opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(one(x), y).backward()
            opt.step()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_forward_passes_alone_do_not_use_up_the_look() -> None:
    model = Residual("inner")
    opt = DDPNOpt(model, lr=0.3)
    x, y = batch()
    for _ in range(3):
        model(x)
    z = model(x)
    assert model.feature is not None
    (F.cross_entropy(z, y) + model.feature.square().mean()).backward()
    with pytest.raises(UnsupportedModelError, match="'a'"):
        opt.step()


def test_returned_it_is_part_of_the_state() -> None:
    class Returning(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            """Both."""
            z = super().forward(x)
            assert self.feature is not None
            return z, self.feature

    model = Returning("sum")
    opt = DDPNOpt(model, lr=0.3)
    x, y = batch()
    z, h = model(x)
    (F.cross_entropy(z, y) + h.square().mean()).backward()
    opt.step()


#: Whatever a net looks like, what is known accounts for its gradients; and looking changes nothing.
EVERY: dict[str, Callable[[], object]] = {**NETS, **IN_PLACE}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_no_false_alarm(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = net(name) if name in NETS else (both(name)[1], both(name)[0][1])
    twin = copy.deepcopy(model)
    loss, *_ = problem(inputs, "cross_entropy")
    train(model, inputs, loss, 2, lr=0.4, value=value)
    monkeypatch.setattr("ddpnopt.classification.Classifier.due", lambda self: False)
    train(twin, inputs, loss, 2, lr=0.4, value=value)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)
