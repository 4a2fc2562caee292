# SPDX-License-Identifier: MIT
"""Statistics that are updated in some of the steps only; the equalities: test_dense_products.py."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddpnopt import DDPNOpt, curvature
from ddpnopt.factors import Factors
from oracles.common import assert_same
from oracles.kronecker import data, net, train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
KINDS = (curvature.KFAC, curvature.EKFAC)


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_measured_between(
    kind: type[curvature.Joint], feedback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    step, original = 0, Factors.products

    def spy(self: Factors, bias: bool) -> Any:
        measured.append(step)
        return original(self, bias)

    monkeypatch.setattr(Factors, "products", spy)
    model = net()
    opt = DDPNOpt(
        model, lr=0.02, feedback=feedback, curvature=kind(update_every=2, statistics_every=4)
    )
    names, before = ("A", "G", "scale"), dict[str, Any]()
    for step, batch in enumerate(data(13), 1):  # noqa: B007 - read by the spy
        train(model, opt, [batch])
        state = opt.state[next(model.parameters())]
        now = {name: state[name].clone() for name in names if name in state}
        changed = {name for name in before if not torch.equal(before[name], now[name])}
        due = step <= 4 or step % 4 == 0
        # Not even a new basis in step 6, which is due by update_every: A is as it was in step 4.
        assert changed == (set(before) if due else set()), step
        before = now
    assert sorted(set(measured)) == [1, 2, 3, 4, 8, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_between_two_updates(kind: type[curvature.Joint]) -> None:
    model, batches = net(), data(15)
    opt = DDPNOpt(model, lr=0.02, curvature=kind(update_every=3, statistics_every=5))
    train(model, opt, batches[:7])
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = net()
    resumed = DDPNOpt(twin, lr=0.7, curvature=kind())
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["curvature"]["statistics_every"] == 5
    train(model, opt, batches[7:])
    train(twin, resumed, batches[7:])
    assert_same(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_joins_is_measured_at_once(kind: type[curvature.Joint]) -> None:
    model = net()
    bias = model[0].bias
    bias.requires_grad_(False)
    opt = DDPNOpt(model, lr=0.02, curvature=kind(update_every=2, statistics_every=4))
    batches = data(7)
    train(model, opt, batches[:5])
    assert opt.state[model[0].weight]["A"].shape[-1] == 6
    bias.requires_grad_(True)
    train(model, opt, batches[5:])
    state = opt.state[model[0].weight]
    assert state["A"].shape[-1] == 7 and state["step"] == 2


def test_states_from_before_the_option() -> None:
    model, twin, batches = net(), net(), data(8)
    opt = DDPNOpt(model, lr=0.02, curvature="kfac")
    train(model, opt, batches[:4])
    state = opt.state_dict()
    for group in state["param_groups"]:
        group["curvature"].pop("statistics_every")
    twin.load_state_dict(model.state_dict())
    resumed = DDPNOpt(twin, lr=0.02, curvature="kfac")
    resumed.load_state_dict(state)
    for m, o in ((model, opt), (twin, resumed)):
        for x, y in batches[4:]:
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
    assert_same(model, twin)


@pytest.mark.parametrize("first", KINDS)
def test_another_curvatures_state_is_decomposed_anew(first: type[curvature.Joint]) -> None:
    """KFAC's inverses are no eigenbasis: what a state does not hold is made at once."""
    (second,) = set(KINDS) - {first}
    model, batches = net(), data(9)
    opt = DDPNOpt(model, lr=0.02, curvature=first(update_every=7))
    train(model, opt, batches[:8])
    for group in opt.param_groups:
        group["curvature"] = second(update_every=7, statistics_every=7)
    train(model, opt, batches[8:])  # no step in which it would measure or decompose
    state = opt.state[next(model.parameters())]
    A = state["A"][0]
    if second is curvature.EKFAC:
        D = state["T_A"][0] @ A @ state["T_A"][0].T
        torch.testing.assert_close(D, torch.diag(D.diagonal()))
        assert state["scale"].shape[1:] == (state["G"].shape[1], len(A))
    else:
        added = torch.linalg.inv(state["A_inverse"][0]) - A
        torch.testing.assert_close(added, torch.eye(len(A)).to(A) * added[0, 0])
