# SPDX-License-Identifier: MIT
"""Several outputs whose losses are summed, and outputs made behind the last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import data
from oracles.graph import Net, Program
from oracles.graph_cases import CURVATURES, compare_low_rank, compare_moreau, inner
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph
from oracles.graph_nets import Case
from oracles.graph_outputs import Joint, Output
from oracles.graph_parts import add, gate, linear, noise, tanh

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

CE, BCE = "cross_entropy", "bce"
LR = {"identity": 0.7, "rmsprop": 0.02}
#: Enough samples for two passes in which every loss can be told.
BATCH = 8


def batch() -> Tensor:
    """Inputs of four features."""
    return torch.randn(BATCH, 4, dtype=torch.float64)


def two_heads(
    first: str = CE,
    last: str = CE,
    factors: tuple[float, float] = (0.3, 1.0),
    known: Sequence[str] = (CE, BCE, "none"),
) -> Joint:
    """Heads at two depths."""
    p = Program()
    h = p(tanh, p("a", 0))
    early = p("early", h)
    late = p("late", p(tanh, p("b", h)))
    layers = {"a": linear(4, 5), "early": linear(5, 4), "b": linear(5, 4), "late": linear(4, 3)}
    outputs = [
        Output(early, 4, first, factors[0], first in known),
        Output(late, 3, last, factors[1], last in known),
    ]
    return Joint(layers, p, outputs, batch())


def three_heads() -> Joint:
    """Of three depths and factors; two lack some targets, one is a single logit."""
    p = Program()
    h = p(tanh, p("a", 0))
    one = p("one", h)
    h = p(add, h, p(tanh, p("b", h)))
    two = p("two", h)
    three = p("three", p(tanh, p("c", h)))
    layers: dict[str, nn.Module] = {name: linear(4, 4) for name in "abc"}
    layers |= {"one": linear(4, 3), "two": linear(4, 1), "three": linear(4, 3)}
    outputs = [
        Output(three, 3, CE, 1.0, ignored=(1,)),
        Output(one, 3, CE, 2.0, ignored=(0, 3)),
        Output(two, 1, BCE, 0.5),
    ]
    return Joint(layers, p, outputs, batch())


def variational() -> Joint:
    """A penalty on hidden features, which are returned and used."""
    p = Program()
    h = p(tanh, p("a", 0))
    code = p("code", h)
    head = p("head", p(tanh, p("b", p(tanh, code))))
    layers = {"a": linear(4, 4), "code": linear(4, 2), "b": linear(2, 4), "head": linear(4, 3)}
    outputs = [Output(head, 3, CE), Output(code, 2, "penalty", 0.2, known=False)]
    return Joint(layers, p, outputs, batch())


#: Several losses whose curvature is known.
HEADS: dict[str, Callable[[], Joint]] = {
    "two": two_heads,
    "three": three_heads,
    "last without gradient": lambda: two_heads(CE, "none"),
    "early without gradient": lambda: two_heads("none", CE),
}
#: One of them counts with its gradient alone.
PARTLY: dict[str, Callable[[], Joint]] = {
    "early unknown": lambda: two_heads("squared", CE),
    "last unknown": lambda: two_heads(CE, "squared"),
}


def train(joint: Joint, passes: int = 1, **options: object) -> nn.Module:
    """Two steps of the plain loop on one batch, in one pass or several."""
    net = joint.library()
    opt = DDPNOpt(net, gram="exact", **options)  # type: ignore[arg-type]
    cuts = torch.linspace(0, BATCH, passes + 1).int().tolist()
    for _ in range(2):
        opt.zero_grad()
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            rows = slice(start, stop)
            joint.passed(net(joint.x[rows]), rows).backward()
        opt.step()
    return net


def dense(joint: Joint, curvature: str, along: bool = False, **options: object) -> DenseGraph:
    """Two steps of the dense recursion; ``along``: with the curvature along the gradient alone."""
    reference = DenseGraph(joint.net, inner(LR[curvature], curvature), **options)  # type: ignore[arg-type]
    for _ in range(2):
        reference.step((joint.x,), joint.loss, joint.along_gradient if along else joint.hessian)
    return reference


def bounded(joint: Joint, curvature: str, feedback: object, **options: object) -> MoreauGraph:
    """Two steps of the rule, sample by sample."""
    reference = MoreauGraph(
        joint.net,
        inner(LR[curvature], curvature),
        feedback=feedback is True,
        **options,  # type: ignore[arg-type]
    )
    w = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)
    for _ in range(2):
        reference.step((joint.x,), joint.loss, w, joint.lines)
    return reference


#: A pass, or two that are accumulated; in open loop each pass would be weighted by itself.
RUNS = [(1, True), (2, True), (1, "open_loop")]


@pytest.mark.parametrize("name", [*HEADS, *PARTLY, "penalty"])
@pytest.mark.parametrize(("passes", "feedback"), RUNS)
def test_low_rank(name: str, passes: int, feedback: object) -> None:
    joint = (HEADS | PARTLY | {"penalty": variational})[name]()
    reference = dense(joint, "identity", feedback=feedback is True)
    net = train(joint, passes, lr=LR["identity"], value=LowRank(), feedback=feedback)
    reference.assert_equals(net)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    "options", [{"backup": "closed_loop"}, {"backup": "riccati", "own_layer": True}]
)
def test_low_rank_options(curvature: str, options: dict[str, object]) -> None:
    joint = three_heads()
    reference = dense(joint, curvature, **options)
    value = LowRank(**options)  # type: ignore[arg-type]
    net = train(joint, lr=LR[curvature], curvature=CURVATURES[curvature], value=value)
    reference.assert_equals(net)


@pytest.mark.parametrize("name", [*HEADS, *PARTLY])
@pytest.mark.parametrize(("passes", "feedback"), RUNS)
def test_gauss_newton(name: str, passes: int, feedback: object) -> None:
    joint = (HEADS | PARTLY)[name]()
    reference = dense(joint, "identity", along=True, feedback=feedback is True)
    net = train(joint, passes, lr=LR["identity"], value=GaussNewton(), feedback=feedback)
    reference.assert_equals(net)


@pytest.mark.parametrize("name", [*HEADS, *PARTLY])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_moreau(name: str, feedback: object) -> None:
    joint = (HEADS | PARTLY)[name]()
    reference = bounded(joint, "identity", feedback)
    net = train(joint, lr=LR["identity"], feedback=feedback)
    reference.assert_equals(net)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("options", [{}, {"strength": 1.0, "coupling": False}])
def test_moreau_options(curvature: str, options: dict[str, object]) -> None:
    """Over two passes that are accumulated."""
    joint = three_heads()
    reference = bounded(joint, curvature, True, **options)
    value = Moreau(**options)  # type: ignore[arg-type]
    net = train(joint, 2, lr=LR[curvature], curvature=CURVATURES[curvature], value=value)
    reference.assert_equals(net)


@pytest.mark.parametrize("value", [Moreau(), LowRank(), GaussNewton()])
def test_squared_errors(value: object) -> None:
    """Named: both heads are."""
    joint = two_heads("squared", "squared", (1.0, 1.0), known=("squared",))
    if isinstance(value, Moreau):
        reference: DenseGraph | MoreauGraph = bounded(joint, "identity", True)
    else:
        reference = dense(joint, "identity", along=isinstance(value, GaussNewton))
    net = train(joint, lr=LR["identity"], value=value, terminal="mse")
    reference.assert_equals(net)


def wide_and_deep(first: bool) -> Case:
    """A dense layer past all others, running first or last."""
    p = Program()
    wide = p("wide", 0) if first else 0
    deep = p("deep", p(tanh, p("b", p(tanh, p("a", 0)))))
    p(add, deep, wide if first else p("wide", 0))
    layers = {"wide": linear(4, 3), "a": linear(4, 4), "b": linear(4, 4), "deep": linear(4, 3)}
    return Net(layers, p), (noise(4),)


def skip_to_output() -> Case:
    """The last layer's output is added to hidden features."""
    p = Program()
    h = p(tanh, p("a", 0))
    p(add, h, p("c", p(tanh, p("b", h))))
    return Net({"a": linear(4, 3), "b": linear(3, 4), "c": linear(4, 3)}, p), (noise(4),)


def gated_output() -> Case:
    """One head gates the other."""
    p = Program()
    h = p(tanh, p("a", 0))
    p(gate, p("left", h), p("right", h))
    layers = {"a": linear(4, 3), "left": linear(3, 3), "right": linear(3, 3)}
    return Net(layers, p), (noise(4),)


#: Outputs made by a function of several layers' outputs.
MADE: dict[str, Callable[[], Case]] = {
    "wide first": lambda: wide_and_deep(True),
    "wide last": lambda: wide_and_deep(False),
    "skip": skip_to_output,
    "gate": gated_output,
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("terminal", [CE, "mse"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_output_behind_the_last_layer(name: str, terminal: str, feedback: object) -> None:
    compare_low_rank(MADE[name](), terminal=terminal, feedback=feedback)
    compare_moreau(MADE[name](), terminal=terminal, feedback=feedback)


class Heads(nn.Module):
    """Two heads, in several ways of writing them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        sizes = {"a": (5, 6), "early": (6, 4), "b": (6, 5), "late": (5, 3)}
        self.layers = nn.ModuleDict({name: linear(*size) for name, size in sizes.items()})

    def forward(self, x: Tensor, y: Tensor | None = None) -> object:
        """Logits; log-probabilities; names; or the loss itself."""
        h = torch.tanh(self.layers["a"](x))
        early = self.layers["early"](h)
        if self.form == "at once":
            early = F.log_softmax(early, -1)
        late = self.layers["late"](torch.tanh(self.layers["b"](h)))
        if self.form == "at once":
            late = F.log_softmax(late, -1)
        if self.form == "late":
            return F.log_softmax(early, -1), F.log_softmax(late, -1)
        if self.form == "named":
            return {"early": early, "late": late}
        return self.loss((early, late), y) if self.form == "inside" else (early, late)

    def loss(self, found: object, y: Tensor | None) -> Tensor:
        """0.3 of the early head's and the late one's."""
        if isinstance(found, Tensor):
            return found
        early, late = found.values() if isinstance(found, dict) else found  # type: ignore[misc]
        loss = F.nll_loss if self.form in ("late", "at once") else F.cross_entropy
        assert y is not None
        return 0.3 * loss(early, y) + loss(late, y)


@pytest.mark.parametrize("form", ["late", "at once", "named", "inside", "no weight gradients"])
@pytest.mark.parametrize("value", [Moreau(coupling=False), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_ways_of_writing_heads(form: str, value: object, feedback: object) -> None:
    """All are the plain pair of logits; ``at once``: the state holds log-probabilities."""
    nets = [Heads("plain"), Heads(form)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        kept = net.form != "no weight gradients"
        opt = DDPNOpt(net, lr=0.5, value=value, feedback=feedback, weight_gradients=kept)
        for seed in range(3):
            x, y = data(seed)
            opt.zero_grad()
            net.loss(net(x, y), y).backward()
            opt.step()
    other = form == "at once" and isinstance(value, Moreau) and feedback is True
    tolerance = 1e-3 if other else 1e-12
    for mine, its in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=tolerance)


def test_feedback_off_is_sgd() -> None:
    joint = three_heads()
    mine = train(joint, lr=0.3, momentum=0.5, feedback=False)
    net = joint.library()
    theirs = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5)
    for _ in range(2):
        theirs.zero_grad()
        joint.passed(net(joint.x), slice(None)).backward()
        theirs.step()
    for one, other in zip(mine.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("value", [Moreau(), GaussNewton(), LowRank()])
def test_one_backward_pass_for_each_head(order: tuple[int, int], value: object) -> None:
    """Equal to one for the sum; with columns for each output, refused by name."""
    nets = [Heads("plain"), Heads("plain")]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = data(0)
    for net, apart in zip(nets, (False, True), strict=True):
        opt = DDPNOpt(net, lr=0.5, value=value)
        found = net(x)
        losses = [0.3 * F.cross_entropy(found[0], y), F.cross_entropy(found[1], y)]
        if not apart:
            sum(losses).backward()
        else:
            losses[order[0]].backward(retain_graph=True)
            losses[order[1]].backward()
        if apart and isinstance(value, LowRank):
            with pytest.raises(UnsupportedModelError, match="add the losses"):
                opt.step()
            return
        opt.step()
    for mine, its in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
