# SPDX-License-Identifier: MIT
"""Tensors of an earlier time step that are overwritten: full feedback, as if on copies."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, explain
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.graph_cases import compare_low_rank, compare_moreau, problem, train
from oracles.graph_in_place import NETS, both
from oracles.graph_parts import linear

# Feedback that is quietly off would be a warning.
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("terminal", ["cross_entropy", "mse"])
def test_low_rank(name: str, terminal: str) -> None:
    case, written = both(name)
    compare_low_rank(case, written=written, terminal=terminal)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
def test_moreau(name: str, curvature: str) -> None:
    case, written = both(name)
    compare_moreau(case, written=written, curvature=curvature)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("value", [Moreau(), GaussNewton()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_copies_take_the_same_steps(name: str, value: object, feedback: object) -> None:
    (copied, inputs), written = both(name)
    loss, *_ = problem(inputs, "cross_entropy")
    for model in (copied, written):
        train(model, inputs, loss, 3, lr=0.4, value=value, feedback=feedback)
    for mine, its in zip(written.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_autograds(name: str) -> None:
    """Watching leaves the gradients as they are, also of the second watch of two."""
    (copied, inputs), written = both(name)
    loss, *_ = problem(inputs, "cross_entropy")
    loss(copied(*inputs)).backward()
    first, second = DDPNOpt(written, lr=0.1), DDPNOpt(written, lr=0.1, value=LowRank())
    loss(written(*inputs)).backward()
    for mine, its in zip(written.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-14)
    first.step()
    second.detach()


@pytest.mark.parametrize("name", NETS)
def test_two_optimizers_watch_at_once(name: str) -> None:
    (alone, inputs), written = both(name)
    loss, *_ = problem(inputs, "cross_entropy")
    train(alone, inputs, loss, 1, lr=0.4)
    others = [DDPNOpt(written, lr=0.0, value=LowRank()) for _ in range(2)]
    train(written, inputs, loss, 1, lr=0.4)
    assert len(others) == 2
    for mine, its in zip(written.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_accumulated_passes_are_one_batch(name: str) -> None:
    (whole, inputs), parts = both(name)
    y = torch.tensor([0, 2, 1, 1, 0])
    first, second = DDPNOpt(whole, lr=0.3), DDPNOpt(parts, lr=0.3)
    (F.cross_entropy(whole(*inputs), y, reduction="sum") / 5).backward()
    for rows in (slice(0, 2), slice(2, 5)):
        z = parts(*(x[rows] for x in inputs))
        (F.cross_entropy(z, y[rows], reduction="sum") / 5).backward()
    first.step()
    second.step()
    for mine, its in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_a_pass_leaves_nothing_behind(name: str) -> None:
    """No cycle through the nodes of what is overwritten, nor through what a first pass looks at."""
    (_, inputs), model = both(name)
    opt = DDPNOpt(model, lr=0.3)
    recorder = opt.engine.recorder
    assert recorder is not None
    loss, *_ = problem(inputs, "cross_entropy")
    gc.collect()
    gc.disable()
    try:
        z = model(*inputs)
        assert recorder.latest is not None
        del z
        assert recorder.latest is None
        total = loss(model(*inputs))
        total.backward()
        opt.step()
        del total
        assert recorder.latest is None
    finally:
        gc.enable()


def test_explain_shows_no_blind_cut() -> None:
    _, written = both("basic_block")
    rows = explain(written, torch.randn(5, 2, 4, 4, dtype=torch.float64)).rows
    assert all(row.treatment == "feedback" and "?" not in row.state for row in rows)
    joined = {row.name: row.joins for row in rows}
    assert joined["layers.norm3"] == ("layers.norm2",)


class Clamped(nn.Module):
    """Overwrites without gradients."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = late
        self.a, self.b, self.head = linear(3, 3), linear(3, 3), linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp a's output at once, or behind b."""
        h = self.a(x)
        k = torch.tanh(h)
        if not self.late:
            with torch.no_grad():
                h.clamp_(-0.2, 0.2)
        k = self.b(k)
        with torch.no_grad():
            self.largest = h.abs().max()
            if self.late:
                h.clamp_(-0.2, 0.2)
        made: Tensor = self.head(torch.tanh(h + k))
        return made


def test_statistics_without_gradients() -> None:
    """A value is compared as it is used: after a clamp, with the clamped one."""
    model, y = Clamped(late=False), torch.tensor([0, 1, 2, 1, 0])
    x = torch.randn(5, 3, dtype=torch.float64)
    opt = DDPNOpt(model, lr=0.3, value=LowRank())
    F.cross_entropy(model(x), y).backward()
    trajectory = opt.engine.recorder.arrivals.completed[0]  # type: ignore[union-attr]
    crossing = next(one for one in trajectory.crossings if one.used == 2 and one.beside)
    assert float(crossing.y.abs().max()) <= 0.2
    seen: list[Tensor] = []
    project = type(crossing).project

    def noted(self: object, y: Tensor, samples: int) -> Tensor | None:
        if self is crossing:
            seen.append(y.clone())
        return project(crossing if self is crossing else self, y, samples)  # type: ignore[arg-type]

    type(crossing).project = noted  # type: ignore[assignment, method-assign]
    try:
        opt.step()
    finally:
        type(crossing).project = project  # type: ignore[method-assign]
    assert len(seen) == 1 and float(seen[0].abs().max()) <= 0.2


def test_a_late_change_without_gradients_is_said() -> None:
    model, y = Clamped(late=True), torch.tensor([0, 1, 2, 1, 0])
    x = torch.randn(5, 3, dtype=torch.float64)
    opt = DDPNOpt(model, lr=0.3)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(DDPNOptWarning, match="'b' take their open-loop policy"):
        opt.step()
