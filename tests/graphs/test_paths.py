# SPDX-License-Identifier: MIT
"""Control flow: a rollout replays the recorded path, or is stopped before anything is written."""

from __future__ import annotations

import copy
import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, UnsupportedModelError
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_unchanged, data, snapshot

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


class Residual(nn.Module):
    """A net whose forward a subclass writes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.double()
        # The path is chosen by what changes in the step.
        self.threshold = float(self.stem.weight.detach().sum())

    @property
    def moved(self) -> bool:
        """Whether the first layer has moved."""
        return float(self.stem.weight.detach().sum()) != self.threshold


class SkipsALayer(Residual):
    """A layer of the recorded pass does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Without b once the weights have moved."""
        h = torch.tanh(self.stem(x))
        h = h + torch.tanh(self.a(h))
        if not self.moved:
            h = h + torch.tanh(self.b(h))
        return self.head(h)


class RunsOneMore(Residual):
    """A layer runs that did not."""

    def forward(self, x: Tensor) -> Tensor:
        """With b only once the weights have moved."""
        h = torch.tanh(self.stem(x))
        h = h + torch.tanh(self.a(h))
        if self.moved:
            h = h + torch.tanh(self.b(h))
        return self.head(h)


class AnotherOrder(Residual):
    """The same layers, the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        """a, b or b, a."""
        h = torch.tanh(self.stem(x))
        for layer in (self.b, self.a) if self.moved else (self.a, self.b):
            h = h + torch.tanh(layer(h))
        return self.head(h)


class OnceMore(Residual):
    """A layer that ran once runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Unrolled by one or two."""
        h = torch.tanh(self.stem(x))
        for _ in range(2 if self.moved else 1):
            h = h + torch.tanh(self.a(h))
        return self.head(torch.tanh(self.b(h)))


class AnotherEdge(Residual):
    """The same layers in the same order, and a skip that starts elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """The skip over b is from its input or from the stem."""
        h = torch.tanh(self.stem(x))
        low = torch.tanh(self.a(h))
        skip = h if self.moved else low
        return self.head(skip + torch.tanh(self.b(low)))


class NoSkip(Residual):
    """The same layers in the same order, and a skip that is gone."""

    def forward(self, x: Tensor) -> Tensor:
        """A skip only in the recorded pass."""
        h = torch.tanh(self.stem(x))
        low = torch.tanh(self.b(torch.tanh(self.a(h))))
        return self.head(low if self.moved else low + h)


class AnotherFunction(Residual):
    """The same layers and edges, and another function between them."""

    def forward(self, x: Tensor) -> Tensor:
        """tanh or relu."""
        h = torch.tanh(self.stem(x))
        low = torch.tanh(self.b(torch.tanh(self.a(h))))
        return self.head(torch.relu(low + h) if self.moved else torch.tanh(low + h))


PATHS = [SkipsALayer, RunsOneMore, AnotherOrder, OnceMore, AnotherEdge, NoSkip, AnotherFunction]


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_another_path_is_refused(form: type[Residual], value: object) -> None:
    model = form()
    opt = DDPNOpt(model, lr=0.3, value=value, momentum=0.5)
    x, y = data()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before, state = snapshot(model), copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(UnsupportedModelError) as error:
        opt.step()
    assert_unchanged(model, before)
    after = opt.state_dict()["state"]
    assert after.keys() == state.keys()
    text = str(error.value)
    assert "another path" in text and "feedback='open_loop'" in text, text


@pytest.mark.parametrize("form", PATHS)
def test_open_loop_does_not_replay(form: type[Residual]) -> None:
    """Nothing runs a second time in open loop, so any path will do."""
    model = form()
    before = snapshot(model)
    opt = DDPNOpt(model, lr=0.3, feedback="open_loop")
    x, y = data()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert not torch.equal(model.head.weight, before["head.weight"])


class RandomDepth(Residual):
    """Depth, order and a skip drawn at every call."""

    source = "torch"

    def draw(self) -> int:
        """From 0 to 2."""
        if self.source == "torch":
            return int(torch.randint(3, ()))
        if self.source == "numpy":
            return int(np.random.randint(3))
        return random.randrange(3)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, some of the layers, head."""
        h = torch.tanh(self.stem(x))
        for _ in range(self.draw()):
            layer = self.a if self.draw() else self.b
            h = h + torch.tanh(layer(h))
        return self.head(torch.tanh(self.b(torch.tanh(self.a(h)))))


class Replayed(RandomDepth):
    """The same path, written down: what the drawn one must equal."""

    def __init__(self, path: list[int]) -> None:
        super().__init__()
        self.path = path

    def draw(self) -> int:
        """The next of the list, over and over."""
        self.path.append(self.path.pop(0))
        return self.path[-1]


#: Run-time type checkers draw from Python's generator while the model does: not tried with them.
CHECKED = any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path)
PYTHON = pytest.param("python", marks=pytest.mark.skipif(CHECKED, reason="type checkers draw"))


@pytest.mark.parametrize("source", ["torch", "numpy", PYTHON])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("first", ["chain", "branched"])
def test_drawn_depth(source: str, value: object, first: str) -> None:
    """Each step equals that of a net that takes the same path without drawing."""
    model = RandomDepth()
    model.source = source
    drawn: list[int] = []
    original = model.draw

    def remembered() -> int:
        drawn.append(original())
        return drawn[-1]

    model.draw = remembered  # type: ignore[method-assign]
    opt = DDPNOpt(model, lr=0.3, value=value)
    depths = []
    for k, seed in enumerate([*seeds_of_depths(source, first), *range(6)]):
        twin = Replayed([])
        twin.load_state_dict(model.state_dict())
        x, y = data(k)
        seed_all(seed)
        drawn.clear()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        twin.path = list(drawn)
        depths.append(drawn[0])
        loss.backward()
        opt.step()
        other = DDPNOpt(twin, lr=0.3, value=value)
        F.cross_entropy(twin(x), y).backward()
        other.step()
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12, msg=f"step {k}: {depths}")
    assert set(depths) == {0, 1, 2}


def seed_all(seed: int) -> None:
    """Of the three generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def seeds_of_depths(source: str, first: str) -> list[int]:
    """One seed for each depth, in this or that order."""
    model, found = RandomDepth(), {}
    model.source = source
    for seed in range(20):
        seed_all(seed)
        found.setdefault(model.draw(), seed)
    return [found[depth] for depth in ((0, 1, 2) if first == "chain" else (2, 0, 1))]


class ByData(Residual):
    """The path depends on the batch alone."""

    def forward(self, x: Tensor) -> Tensor:
        """A skip for batches of positive sum."""
        h = torch.tanh(self.stem(x))
        low = torch.tanh(self.a(h))
        if x.sum() > 0:
            low = low + torch.tanh(self.b(h))
        return self.head(low)


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_path_by_the_data(value: object) -> None:
    """Any sequence of both paths; what did not run does not move."""
    model = ByData()
    opt = DDPNOpt(model, lr=0.3, value=value)
    taken = set()
    for seed in range(6):
        x, y = data(seed)
        taken.add(bool(x.sum() > 0))
        before = snapshot(model)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        ran = not torch.equal(model.b.weight, before["b.weight"])
        assert ran == bool(x.sum() > 0)
        assert not torch.equal(model.a.weight, before["a.weight"])
    assert taken == {True, False}


class Alternating(Residual):
    """Two chains in turn; with a skip if it is told so."""

    short, skip = False, False

    def forward(self, x: Tensor) -> Tensor:
        """Stem, a and perhaps b, head."""
        h = torch.tanh(self.stem(x))
        low = torch.tanh(self.a(h))
        if not self.short:
            low = torch.tanh(self.b(low))
        return self.head(low + h if self.skip else low)


def two_steps(model: Alternating, opt: DDPNOpt, seed: int) -> None:
    """One of each chain."""
    x, y = data(seed)
    for model.short in (False, True):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_several_chains_are_watched_no_more(value: object) -> None:
    """Nor does it matter whether they are; one that is none is said once, and then followed."""
    model, twin = Alternating(), Alternating()
    opt, other = (DDPNOpt(m, lr=0.1, value=value) for m in (model, twin))
    watching, seen = opt.engine.recorder.watching, other.engine.recorder.watching
    for seed in range(20):
        seen.branching = True
        two_steps(model, opt, seed)
        two_steps(twin, other, seed)
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)
        assert (watching.branching is False) == (seed >= 15)
    model.skip = True
    model.short = False
    x, y = data(0)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(DDPNOptWarning, match="don't run one after another"):
        opt.step()
    fresh = Alternating()
    fresh.load_state_dict(model.state_dict())
    fresh.skip = True
    third = DDPNOpt(fresh, lr=0.1, value=value)
    for mine, its in ((model, opt), (fresh, third)):
        its.zero_grad()
        F.cross_entropy(mine(x), y).backward()
        its.step()
    for mine_p, its_p in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine_p, its_p)


class JoinedRows(nn.Module):
    """Positions and samples in one dimension; the output sees the last position alone."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.batch_first = batch_first
        self.stem, self.middle = nn.Linear(3, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        rows = (x if self.batch_first else x.transpose(0, 1)).reshape(-1, width)
        h = torch.tanh(self.middle(torch.tanh(self.stem(rows))))
        if self.batch_first:
            return self.head(h.view(samples, length, -1)[:, -1])
        return self.head(h.view(length, samples, -1)[-1])


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("samples", [2, 8])
def test_the_order_of_joined_rows_does_not_matter(samples: int, feedback: bool | str) -> None:
    # One probe of an outer sample would allow both orders: all of them are to agree.
    torch.manual_seed(7)
    x, y = torch.randn(samples, 4, 3).double(), torch.randint(3, (samples,))
    weights = []
    for batch_first in (True, False):
        model = JoinedRows(batch_first)
        optimizer = DDPNOpt(model, lr=1.5, feedback=feedback)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-12)


class Masked(Residual):
    """A mask is put on the model, in a buffer, or handed on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("kept", torch.zeros(0).double())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.how == "attribute":
            self.mask = mask
        elif self.how == "buffer":
            self.kept = mask
        h = torch.tanh(self.stem(x))
        h = h + torch.relu(self.a(h))
        h = (
            h
            * {"attribute": lambda: self.mask, "buffer": lambda: self.kept}.get(
                self.how, lambda: mask
            )()
        )
        return self.head(h + torch.relu(self.b(h)))


@pytest.mark.parametrize("how", ["attribute", "buffer"])
def test_accumulated_passes_keep_what_they_put_on_the_model_apart(how: str) -> None:
    torch.manual_seed(11)
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    mask = (torch.rand(8, 4) > 0.4).double()
    weights = []
    for kind in (how, "argument"):
        model = Masked(kind)
        optimizer = DDPNOpt(model, lr=1.0, value=Moreau(coupling=False))
        for _ in range(3):
            optimizer.zero_grad()
            for part in (slice(0, 4), slice(4, 8)):
                (F.cross_entropy(model(x[part], mask[part]), y[part]) / 2).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)
