# SPDX-License-Identifier: MIT
"""What a forward pass does about gradients itself: passes without, queries, numbers, derivatives.

The rollout runs without a graph. What has no influence on the result must have none on the step.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, UnsupportedModelError
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_unchanged, data, snapshot
from oracles.graph import Net, Program
from oracles.graph_cases import compare_low_rank, compare_moreau
from oracles.graph_nets import Case
from oracles.graph_parts import add, linear, mul, noise, tanh

pytestmark = [
    pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),
]


def case(scaled: bool = False, branched: bool = True) -> Case:
    """A residual net or a chain; the hidden state may be divided by what it is itself."""
    torch.manual_seed(2)
    p = Program()
    h = p(tanh, p("stem", 0))
    low = p(tanh, p("a", h))
    if scaled:
        low = p(lambda h: h / h.detach().abs().mean(1, keepdim=True), low)
    low = p(tanh, p("b", low))
    p("head", p(add, h, low) if branched else low)
    layers = {name: linear(4, 4) for name in ("stem", "a", "b")}
    return Net(layers | {"head": linear(4, 3)}, p), (noise(4),)


class Written(Net):
    """The same net, its layers copied, written by hand."""

    branched = True

    def __init__(self, net: Net) -> None:
        nn.Module.__init__(self)
        self.layers, self.bare = copy.deepcopy(net.layers), nn.ParameterDict()

    def between(self, h: Tensor) -> Tensor:
        """What happens between two layers."""
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Stem, a, b, and the skip from the stem."""
        h = torch.tanh(self.layers["stem"](x))
        low = torch.tanh(self.layers["a"](self.between(h)))
        low = torch.tanh(self.layers["b"](self.between(low)))
        return self.layers["head"](h + low if self.branched else low)


class Retains(Written):
    def between(self, h: Tensor) -> Tensor:
        assert h.requires_grad
        h.retain_grad()
        return h


class Hooks(Written):
    def between(self, h: Tensor) -> Tensor:
        self.handle = h.register_hook(lambda g: None)
        return h


class Branches(Written):
    """Another function where no gradient is asked for."""

    def between(self, h: Tensor) -> Tensor:
        return h if h.requires_grad and not h.is_leaf else h.square()


class Differentiates(Written):
    """A gradient is taken, and not used."""

    def between(self, h: Tensor) -> Tensor:
        (self.saliency,) = torch.autograd.grad(h.sum(), h, retain_graph=True)
        return h


class StatisticsAfter(Written):
    """Each layer runs once more without gradients, behind its own run."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            torch.tanh(self.layers["stem"](h))
        return h


class StatisticsBefore(Written):
    """A whole pass first, without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            super().forward(x)
        return super().forward(x)


ASKING = [Retains, Hooks, Branches, Differentiates, StatisticsAfter, StatisticsBefore]


@pytest.mark.parametrize("form", ASKING)
@pytest.mark.parametrize("branched", [True, False])
def test_what_is_asked_changes_nothing(form: type[Written], branched: bool) -> None:
    net, inputs = case(branched=branched)
    for compare in (compare_moreau, compare_low_rank):
        written = form(net)
        written.branched = branched
        compare((net, inputs), written=written)


@pytest.mark.parametrize("form", ASKING)
@pytest.mark.parametrize("value", [Moreau(coupling=False), LowRank()])
def test_accumulated_passes(form: type[Written], value: object) -> None:
    net, (x,) = case()
    y = torch.randint(3, (len(x),))
    weights = []
    for kind in (Written, form):
        model = kind(net)
        opt = DDPNOpt(model, lr=1.0, value=value)
        for _ in range(2):
            opt.zero_grad()
            for part in (slice(0, 2), slice(2, len(x))):
                F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
            opt.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", ASKING)
def test_long_after_the_first_passes(form: type[Written]) -> None:
    """A chain is watched no more after some passes, unless it asks something."""
    net, (x,) = case(branched=False)
    model, twin = form(net), Written(net)
    model.branched = twin.branched = False
    opt, other = DDPNOpt(model, lr=0.3), DDPNOpt(twin, lr=0.3)
    for seed in range(12):
        torch.manual_seed(seed)
        x, y = torch.randn_like(x), torch.randint(3, (len(x),))
        for mine, its in ((model, opt), (twin, other)):
            its.zero_grad()
            F.cross_entropy(mine(x), y).backward()
            its.step()
    for mine_p, its_p in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine_p, its_p, rtol=1e-12, atol=1e-13)


class Scaled(Written):
    """By numbers that Python has read from the data: constants for autograd."""

    number = staticmethod(lambda row: float(row.abs().mean()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layers["stem"](x))
        low = torch.tanh(self.layers["a"](h))
        low = torch.stack([row / self.number(row) for row in low])
        return self.layers["head"](h + torch.tanh(self.layers["b"](low)))


@pytest.mark.parametrize("number", ["float", "item"])
def test_numbers_read_from_the_data_are_constants(number: str) -> None:
    net, inputs = case(scaled=True)
    for compare in (compare_moreau, compare_low_rank):
        written = Scaled(net)
        if number == "item":
            written.number = lambda row: row.detach().abs().mean().item()  # type: ignore[assignment]
        compare((net, inputs), written=written)


def test_whole_numbers_are_a_path() -> None:
    """An index that was read from the data and changes takes other values: refused."""

    class Indexed(Written):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layers["stem"](x))
            k = 0 if float(self.layers["stem"].weight.sum()) == self.first else 1
            return self.layers["head"](h + torch.tanh(self.layers["a"](h)).roll(k, 1))

    net, (x,) = case()
    model = Indexed(net)
    model.first = float(model.layers["stem"].weight.sum())
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x), torch.randint(3, (len(x),))).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="another path"):
        opt.step()
    assert_unchanged(model, before)


class Target(Written):
    """A gate made by the stem before it moves, without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.layers["stem"](x))
        h = torch.tanh(self.layers["stem"](x))
        return self.layers["head"](gate * torch.tanh(self.layers["a"](h)) + h)


@pytest.mark.parametrize("compare", [compare_moreau, compare_low_rank])
def test_a_target_is_an_input(compare: object) -> None:
    """It equals a net that is given the gate from outside."""
    torch.manual_seed(2)
    p = Program(2)
    h = p(tanh, p("stem", 0))
    p("head", p(add, p(mul, 1, p(tanh, p("a", h))), h))
    layers = {name: linear(4, 4) for name in ("stem", "a")} | {"head": linear(4, 3)}
    net, x = Net(layers, p), noise(4)
    written = Target(net)
    with torch.no_grad():
        gate = torch.sigmoid(net.layers["stem"](x))

    class Given(Target):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return super().forward(x)

    written.__class__ = Given
    compare((net, (x, gate)), written=written, count=1)  # type: ignore[operator]


class Recording(Written):
    """A layer skipped without gradients: it runs twice in the second pass."""

    def between(self, h: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return h
        return torch.tanh(self.layers["a"](h))


def test_another_call_is_refused_by_the_layer() -> None:
    net, (x,) = case()
    model = Recording(net)
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x), torch.randint(3, (len(x),))).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="another path"):
        opt.step()
    assert_unchanged(model, before)


class Backwards(Written):
    def between(self, h: Tensor) -> Tensor:
        h.square().sum().backward(retain_graph=True)
        return h


class Penalised(Written):
    def between(self, h: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
        return h + g


@pytest.mark.parametrize(
    ("form", "match"), [(Backwards, r"calls backward\(\)"), (Penalised, "create_graph=True")]
)
def test_what_can_not_be_run_again_is_refused_by_name(form: type[Written], match: str) -> None:
    model, (x, y) = form(case()[0]), data()
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x[:, :4]), y).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"{match}.*feedback=False"):
        opt.step()
    assert_unchanged(model, before)
    model.zero_grad()
    plain = DDPNOpt(model, lr=0.3, feedback=False)
    F.cross_entropy(model(x[:, :4]), y).backward()
    plain.step()


def test_reentrant_checkpoints_are_refused_beside_a_skip() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Written):
        def between(self, h: Tensor) -> Tensor:
            return h + checkpoint(lambda h: h.tanh(), h, use_reentrant=True)

    model, (x, y) = Checkpointed(case()[0]), data()
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x[:, :4]), y).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        opt.step()
    assert_unchanged(model, before)


def test_no_warning_is_swallowed() -> None:
    """The first step of such a net has feedback: nothing is said, and the weights differ."""
    net, (x,) = case()
    y = torch.randint(3, (len(x),))
    weights = []
    for feedback in (True, False):
        model = StatisticsBefore(net)
        opt = DDPNOpt(model, lr=1.0, feedback=feedback)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        weights.append(model.layers["head"].weight.detach())
    assert issubclass(DDPNOptWarning, UserWarning)
    assert not torch.equal(*weights)


class Averaged(Written):
    """A moving average of a layer, kept as parameters that are not trained, or as buffers."""

    def __init__(self, net: Net, buffers: bool) -> None:
        super().__init__(net)
        self.average = copy.deepcopy(self.layers["a"]).requires_grad_(False)
        nn.init.ones_(self.average.weight)
        if buffers:
            weight = self.average.weight.data
            del self.average.weight
            self.average.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.weight.lerp_(self.layers["a"].weight, 0.5)
        return super().forward(x)

    def between(self, h: Tensor) -> Tensor:
        return h + F.linear(h, self.average.weight)


def test_a_moving_average_inside_is_moved_once_or_refused_by_name() -> None:
    net, (x,) = case()
    y = torch.randint(3, (len(x),))
    model = Averaged(net, buffers=False)
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="'average.weight'.*make it a buffer"):
        opt.step()
    assert_unchanged(model, before)
    model = Averaged(net, buffers=True)
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x), y).backward()
    moved = model.average.weight.clone()
    opt.step()
    assert torch.equal(model.average.weight, moved)
