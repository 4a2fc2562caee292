# SPDX-License-Identifier: MIT
"""Rows picked by indices: whose they are is found again whenever the indices are others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, classification
from ddpnopt.errors import DDPNOptWarning

SAMPLES, LENGTH = 8, 3
KEPT = torch.arange(SAMPLES)
#: All samples change rows; or two that no single-sample probe looks at.
MOVED = {"all": KEPT.roll(3), "two": torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])}


class Routed(nn.Module):
    """A layer on rows in another order, beside a skip; the order is an argument."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.how = how
        self.stem, self.expert, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Stem, the expert on its rows, head."""
        h = torch.tanh(self.stem(x))
        picked = torch.index_select(h, 0, order) if self.how == "select" else h[order]
        rows = torch.tanh(self.expert(picked))
        if self.how == "put":
            back = torch.zeros_like(h).index_put((order,), rows)
        elif self.how == "add":
            back = torch.zeros_like(h).index_add(0, order, rows)
        else:
            back = rows[order.argsort()]
        return self.head(h + back)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    torch.manual_seed(seed)
    return torch.randn(SAMPLES, 5).double(), torch.randint(3, (SAMPLES,))


def step(model: nn.Module, opt: DDPNOpt, seed: int, *given: Tensor) -> list[str]:
    """One step; the layers in feedback."""
    x, y = batch(seed)
    opt.zero_grad()
    F.cross_entropy(model(x, *given), y).backward()
    opt.step()
    return [layer.name for layer in opt.last_step.layers]


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("how", ["get", "select", "put", "add"])
@pytest.mark.parametrize("moved", ["all", "two"])
def test_samples_change_rows_after_the_first_passes(
    feedback: bool | str, how: str, moved: str
) -> None:
    """At once each is weighted once, as in a net that has never been seen otherwise."""
    model = Routed(how)
    opt = DDPNOpt(model, lr=1.0, feedback=feedback)
    for seed in range(5):
        assert step(model, opt, seed, KEPT) == ["stem", "expert", "head"]
    twin = copy.deepcopy(model)
    other = DDPNOpt(twin, lr=1.0, feedback=feedback)
    for one, its in ((model, opt), (twin, other)):
        with pytest.warns(DDPNOptWarning, match="change rows"):
            assert step(one, its, 9, MOVED[moved]) == ["head"]
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Positions(nn.Module):
    """One position of each sample is picked; which, is an argument."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.how = how
        self.stem, self.middle, self.head = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """(B, T) to (B, 3)."""
        h = torch.tanh(self.stem(x[..., None]))
        if self.how == "pairs":
            last = h[KEPT, at]
        elif self.how == "gather":
            last = h.gather(1, at[:, None, None].expand(-1, 1, 4))[:, 0]
        elif self.how == "joined":
            last = h.flatten(0, 1)[KEPT * h.shape[1] + at]
        else:
            last = torch.stack([rows[int(k)] for rows, k in zip(h, at, strict=True)])
        return self.head(last + torch.tanh(self.middle(last)))


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("how", ["pairs", "gather", "joined"])
def test_a_position_of_each_sample_is_its_own(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback stays in every layer, and what can move no sample is not looked at again."""
    turns: list[int | None] = []
    original = classification.probed

    def counted(*args: object) -> object:
        turns.append(args[3])  # type: ignore[arg-type]
        return original(*args)  # type: ignore[arg-type]

    model, twin = Positions(how), Positions("one by one")
    opt, other = DDPNOpt(model, lr=1.0), DDPNOpt(twin, lr=1.0)
    for seed in range(8):
        at = torch.randint(5, (SAMPLES,), generator=torch.Generator().manual_seed(seed))
        step(twin, other, seed, at)
        monkeypatch.setattr(classification, "probed", counted)
        assert step(model, opt, seed, at) == ["stem", "middle", "head"]
        monkeypatch.setattr(classification, "probed", original)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert len(turns) < 8 if how != "joined" else turns.count(None) == 8


def test_the_same_indices_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int | None] = []
    original = classification.probed

    def counted(*args: object) -> object:
        turns.append(args[3])  # type: ignore[arg-type]
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(classification, "probed", counted)
    model = Routed("get")
    opt = DDPNOpt(model, lr=0.1)
    for seed in range(10):
        step(model, opt, seed, KEPT)
    assert turns.count(None) == 1
