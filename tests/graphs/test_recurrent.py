# SPDX-License-Identifier: MIT
"""Unrolled recurrent cells: one control each, the same as the cell's equations written out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.cells import INPUT, STATE, Gates, Unrolled, UnrolledGates, program
from oracles.graph_cases import CURVATURES, inner, problem
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

CELLS = {
    "rnn": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "gru": (nn.GRUCell, {}),
    "lstm": (nn.LSTMCell, {}),
}
#: The gates of each kind.
KINDS = ("rnn", "gru", "lstm")
LENGTH, LR = 3, {"identity": 0.5, "rmsprop": 0.02}


def nets(name: str, call: str = "state", bias: bool = True) -> tuple[Unrolled, UnrolledGates]:
    """By torch's cell, and by its equations."""
    kind, options = CELLS[name]
    cell = kind(INPUT, STATE, bias=bias, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(2)
        if bias:
            cell.bias_ih.add_(0.5)  # no dead units
    mine = Unrolled(cell, call)
    written = UnrolledGates(Gates(cell))
    written.layers["stem"] = copy.deepcopy(mine.layers["stem"])
    written.layers["head"] = copy.deepcopy(mine.layers["head"])
    return mine, written


def train(
    net: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    count: int = 2,
    **options: object,
) -> None:
    """The plain loop; the batches of a step are accumulated."""
    opt = DDPNOpt(net, gram="exact", **options)  # type: ignore[arg-type]
    for _ in range(count):
        opt.zero_grad()
        for x, y in zip(batches, targets, strict=True):
            loss = F.cross_entropy(net(x), y, reduction="sum")
            (loss / sum(map(len, targets))).backward()
        opt.step()


def inputs_of(x: Tensor, net: UnrolledGates) -> tuple[Tensor, ...]:
    """The oracle's."""
    zeros = net.zeros(x)
    assert isinstance(zeros, Tensor)
    return (*x.unbind(1), zeros)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_low_rank(name: str, curvature: str, feedback: object) -> None:
    """The moved cell's four parameters are part of the dense recursion's state."""
    net, written = nets(name)
    x = torch.randn(5, LENGTH, 2, dtype=torch.float64)
    inputs = inputs_of(x, written)
    loss, hessian, _, _ = problem(inputs, "cross_entropy")
    reference = DenseGraph(
        program(written, LENGTH),
        inner(LR[curvature], curvature, 0.5),
        feedback=feedback is True,
        own_layer=True,
    )
    for _ in range(2):
        reference.step(inputs, loss, hessian)
    opt = DDPNOpt(
        net,
        lr=LR[curvature],
        momentum=0.5,
        curvature=CURVATURES[curvature],
        value=LowRank(own_layer=True),
        feedback=feedback,
    )
    for _ in range(2):
        opt.zero_grad()
        loss(net(x)).backward()
        opt.step()
    reference.assert_equals(net)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_moreau(name: str, curvature: str) -> None:
    net, written = nets(name)
    x = torch.randn(5, LENGTH, 2, dtype=torch.float64)
    inputs = inputs_of(x, written)
    loss, _, w, lines = problem(inputs, "cross_entropy")
    options = {"strength": 1.0}
    reference = MoreauGraph(program(written, LENGTH), inner(LR[curvature], curvature), **options)
    opt = DDPNOpt(net, lr=LR[curvature], curvature=CURVATURES[curvature], value=Moreau(**options))
    for _ in range(2):
        reference.step(inputs, loss, w, lines)
        opt.zero_grad()
        loss(net(x)).backward()
        opt.step()
    reference.assert_equals(net)  # type: ignore[arg-type]


def compare(
    mine: Unrolled, written: UnrolledGates, batches: Sequence[Tensor], **options: object
) -> None:
    """Both nets train alike in the library, the second by its rule for any module."""
    targets = [torch.randint(3, (len(x),)) for x in batches]
    before = copy.deepcopy(mine)
    for net in (mine, written):
        train(net, batches, targets, **{"lr": 0.5, **options})
    pairs = zip(mine.parameters(), written.parameters(), before.parameters(), strict=True)
    for one, other, old in pairs:
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        assert float((one - old).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("call", ["none", "keywords", "state first"])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_calls(name: str, call: str, value: object) -> None:
    """Without a state, and by keywords in either order."""
    compare(*nets(name, call), [torch.randn(5, 4, 2, dtype=torch.float64)], value=value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lengths", [(4, 2), (1, 5, 3)])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_accumulated_lengths(name: str, lengths: tuple[int, ...], value: object) -> None:
    """Passes of several sequence lengths and sizes are accumulated."""
    sizes = range(2, 2 + len(lengths))
    batches = [
        torch.randn(n, length, 2, dtype=torch.float64)
        for n, length in zip(sizes, lengths, strict=True)
    ]
    compare(*nets(name), batches, value=value)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("value", "feedback", "bias"),
    [
        (Moreau(coupling=False), "open_loop", True),
        (Moreau(), True, False),
        (GaussNewton(), True, True),
        (LowRank(backup="closed_loop"), True, False),
    ],
)
def test_options(name: str, value: object, feedback: object, bias: bool) -> None:
    batches = [torch.randn(5, 4, 2, dtype=torch.float64)]
    compare(*nets(name, bias=bias), batches, value=value, feedback=feedback)


@pytest.mark.parametrize("name", CELLS)
def test_lengths_in_turn(name: str) -> None:
    """Each step has sequences of another length."""
    mine, written = nets(name)
    generator = torch.Generator().manual_seed(0)
    optimizers = [DDPNOpt(net, lr=0.5) for net in (mine, written)]
    for length in (4, 2, 5, 1, 4):
        x = torch.randn(6, length, 2, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (6,), generator=generator)
        for net, opt in zip((mine, written), optimizers, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for one, other in zip(mine.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
