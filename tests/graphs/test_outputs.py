# SPDX-License-Identifier: MIT
"""Several outputs whose losses are summed, and outputs made behind the last layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.graph import Net, Program
from oracles.graph_cases import CURVATURES, compare_low_rank, compare_moreau, inner
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph
from oracles.graph_nets import Case
from oracles.graph_outputs import Joint, Output
from oracles.graph_parts import add, linear, noise, tanh

CE, BCE = "cross_entropy", "bce"
LR = {"identity": 0.7, "rmsprop": 0.02}


def batch() -> Tensor:
    """Enough samples for two passes in which every loss can be told."""
    return torch.randn(9, 4, dtype=torch.float64)


def two_heads(first: str = CE, last: str = CE, factors: tuple[float, ...] = (0.3, 1.0)) -> Joint:
    """Heads at two depths."""
    p = Program()
    h = p(tanh, p("a", 0))
    early = p("early", h)
    late = p("late", p(tanh, p("b", h)))
    layers = {"a": linear(4, 5), "early": linear(5, 4), "b": linear(5, 4), "late": linear(4, 3)}
    known = (CE, BCE, "none")
    outputs = [
        Output(early, 4, first, factors[0], first in known),
        Output(late, 3, last, factors[1], last in known),
    ]
    return Joint(layers, p, outputs, batch())


def three_heads() -> Joint:
    """Of three depths and factors; one has no target for some samples, one is a single logit."""
    p = Program()
    h = p(tanh, p("a", 0))
    one = p("one", h)
    h = p(add, h, p(tanh, p("b", h)))
    two = p("two", h)
    three = p("three", p(tanh, p("c", h)))
    layers = {name: linear(4, 4) for name in "abc"}
    layers |= {"one": linear(4, 3), "two": linear(4, 1), "three": linear(4, 3)}
    outputs = [
        Output(three, 3, CE, 1.0, ignored=(1,)),
        Output(one, 3, CE, 2.0, ignored=(0, 3)),
        Output(two, 1, BCE, 0.5),
    ]
    return Joint(layers, p, outputs, batch())


def parallel_heads() -> Joint:
    """One behind the other on the same features, the first of them also read by the second."""
    p = Program()
    h = p(tanh, p("a", 0))
    left = p("left", h)
    right = p("right", p(add, h, p("up", left)))
    layers = {"a": linear(4, 4), "left": linear(4, 3), "up": linear(3, 4), "right": linear(4, 3)}
    return Joint(layers, p, [Output(right, 3, CE)], batch())


def variational() -> Joint:
    """A penalty on hidden features, which are returned and used."""
    p = Program()
    h = p(tanh, p("a", 0))
    code = p("code", h)
    head = p("head", p(tanh, p("b", p(tanh, code))))
    layers = {"a": linear(4, 4), "code": linear(4, 2), "b": linear(2, 4), "head": linear(4, 3)}
    outputs = [Output(head, 3, CE), Output(code, 2, "penalty", 0.2, known=False)]
    return Joint(layers, p, outputs, batch())


#: Every loss's curvature is known.
KNOWN: dict[str, Callable[[], Joint]] = {
    "two": two_heads,
    "three": three_heads,
    "last without gradient": lambda: two_heads(CE, "none"),
    "early without gradient": lambda: two_heads("none", CE),
}
#: One loss counts with its gradient alone.
PARTLY: dict[str, Callable[[], Joint]] = {
    "penalty": variational,
    "early unknown": lambda: two_heads("squared", CE),
    "last unknown": lambda: two_heads(CE, "squared"),
}


def train(joint: Joint, passes: int = 1, count: int = 2, **options: object) -> nn.Module:
    """The plain loop on one batch, in one pass or several."""
    net = joint.library()
    opt = DDPNOpt(net, gram="exact", **options)  # type: ignore[arg-type]
    cuts = torch.linspace(0, len(joint.x), passes + 1).int().tolist()
    for _ in range(count):
        opt.zero_grad()
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            rows = slice(start, stop)
            joint.passed(net(joint.x[rows]), rows).backward()
        opt.step()
    return net


def dense(joint: Joint, curvature: str, quiet: bool = False, **options: object) -> DenseGraph:
    """Two steps of the dense recursion; ``quiet``: with the curvature along the gradient alone."""
    reference = DenseGraph(joint.net, inner(LR[curvature], curvature), **options)  # type: ignore[arg-type]
    for _ in range(2):
        reference.step((joint.x,), joint.loss, joint.along_gradient if quiet else joint.hessian)
    return reference


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    "options", [{}, {"backup": "closed_loop"}, {"backup": "riccati", "own_layer": True}]
)
@pytest.mark.parametrize("passes", [1, 2])
def test_low_rank(name: str, curvature: str, options: dict[str, object], passes: int) -> None:
    joint = KNOWN[name]()
    reference = dense(joint, curvature, **options)
    value = LowRank(**options)  # type: ignore[arg-type]
    net = train(
        joint, passes, lr=LR[curvature], curvature=CURVATURES[curvature], value=value
    )
    reference.assert_equals(net)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("passes", [1, 2])
def test_gauss_newton(name: str, feedback: object, passes: int) -> None:
    joint = KNOWN[name]()
    if feedback is not True and passes > 1:
        pytest.skip("in open loop each pass is weighted by itself")
    reference = dense(joint, "identity", quiet=True, feedback=feedback is True)
    net = train(joint, passes, lr=LR["identity"], value=GaussNewton(), feedback=feedback)
    reference.assert_equals(net)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("options", [{}, {"strength": 1.0, "coupling": False}])
@pytest.mark.parametrize("passes", [1, 2])
def test_moreau(
    name: str, curvature: str, feedback: object, options: dict[str, object], passes: int
) -> None:
    if feedback is not True and passes > 1:
        pytest.skip("in open loop each pass is weighted by itself")
    joint = KNOWN[name]()
    reference = MoreauGraph(
        joint.net, inner(LR[curvature], curvature), feedback=feedback is True, **options
    )  # type: ignore[arg-type]
    w = torch.full((len(joint.x),), 1 / len(joint.x), dtype=torch.float64)
    for _ in range(2):
        reference.step((joint.x,), joint.loss, w, joint.lines)
    net = train(
        joint,
        passes,
        lr=LR[curvature],
        curvature=CURVATURES[curvature],
        value=Moreau(**options),  # type: ignore[arg-type]
        feedback=feedback,
    )
    reference.assert_equals(net)
