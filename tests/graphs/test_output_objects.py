# SPDX-License-Identifier: MIT
"""Outputs in objects: dataclasses, namespaces, distributions are what a tuple is."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.value import LowRank, Moreau
from oracles.common import data

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


@dataclass
class Output:
    """A feature that is used inside, too, and logits; one field is made anew by the class."""

    code: Tensor
    logits: Tensor
    notes: list[str] = field(default_factory=list, init=False)


@dataclass(frozen=True, slots=True)
class Frozen:
    code: Tensor
    logits: Tensor


@dataclass
class Outer:
    inner: tuple[Output, ...]


class Coded(nn.Module):
    """A penalty on the code, a cross-entropy on the logits."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.form = form
        self.a, self.code, self.b = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> object:
        code = self.code(torch.tanh(self.a(x)))
        logits = self.head(torch.tanh(self.b(torch.tanh(code))))
        if self.form == "distribution":
            return Independent(Normal(code, torch.ones_like(code)), 1), logits
        makers = {
            "tuple": lambda: (code, logits),
            "dataclass": lambda: Output(code, logits),
            "frozen": lambda: Frozen(code, logits),
            "nested": lambda: Outer((Output(code, logits),)),
            "namespace": lambda: SimpleNamespace(code=code, logits=logits),
        }
        return makers[self.form]()


def parts(found: object) -> tuple[Tensor, Tensor]:
    """Code and logits."""
    if isinstance(found, Outer):
        (found,) = found.inner
    if isinstance(found, tuple):
        code, logits = found
        return (code.mean if isinstance(code, Independent) else code), logits
    return found.code, found.logits  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["dataclass", "frozen", "nested", "namespace", "distribution"])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_an_object_is_a_tuple(form: str, value: object, feedback: object) -> None:
    weights = []
    for kind in ("tuple", form):
        model = Coded(kind)
        opt = DDPNOpt(model, lr=0.5, value=value, feedback=feedback)
        for seed in range(3):
            x, y = data(seed)
            opt.zero_grad()
            code, logits = parts(model(x))
            (F.cross_entropy(logits, y) + 0.1 * code.square().mean()).backward()
            opt.step()
            assert len(opt.last_step.layers) == 4
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_the_object_is_of_its_class_and_keeps_what_else_it_holds() -> None:
    model, (x, _) = Coded("dataclass"), data()
    opt = DDPNOpt(model, lr=0.5)
    found = model(x)
    assert type(found) is Output and found.notes == []
    del opt


class Given(nn.Module):
    """The inputs come in a dataclass, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, batch: object) -> Tensor:
        x = batch.x if isinstance(batch, SimpleNamespace) else batch
        h = torch.tanh(self.a(x))
        return self.head(h + torch.tanh(self.b(h)))


def test_inputs_in_an_object() -> None:
    weights = []
    for wrap in (lambda x: x, lambda x: SimpleNamespace(x=x)):
        model = Given()
        opt = DDPNOpt(model, lr=0.5)
        x, y = data()
        F.cross_entropy(model(wrap(x)), y).backward()
        opt.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
