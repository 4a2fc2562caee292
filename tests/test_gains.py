# SPDX-License-Identifier: MIT
"""Gain matrices as operators, against dense algebra, dense SVD and explicit Jacobians."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import PAPER, DDPNOpt, VanillaDDP, feedback_gains
from ddpnopt.experiments.policies import singular_triplets
from ddpnopt.value import Dense, GaussNewton, LowRank
from oracles.common import conv_chain, cross_entropy, dense_chain, input_for
from oracles.flat import Chain
from oracles.full_q import FullQ

LR = 0.7


def chain(kind: str) -> Chain:
    if kind == "dense":
        return dense_chain([3, 5, 4, 3])
    return conv_chain([{"kernel_size": 3}, {"kernel_size": 2}], 3, "softplus")


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (lambda m: DDPNOpt(m, lr=LR, value="low_rank"), {}),
        (lambda m: DDPNOpt(m, lr=LR, value=LowRank(own_layer=True)), {"own_layer": True}),
        (lambda m: DDPNOpt(m, lr=LR, value=Dense(backup="riccati")), {"kind": "riccati"}),
        (
            lambda m: DDPNOpt(m, lr=LR, value=Dense(dynamics="second_order", own_layer=True)),
            {"second": True, "own_layer": True},
        ),
    ],
)
def test_every_layers_gain_is_the_dense_one(kind: str, make: Any, oracle: dict[str, Any]) -> None:
    model = chain(kind)
    x = input_for(model, 3)
    _, function, hessian = cross_entropy(x, 3)
    reference = FullQ(copy.deepcopy(model), LR, **oracle)
    reference.sweep(x, function, hessian)
    opt = make(model)
    function(model(x)).backward()
    for sample in range(3):
        gains = feedback_gains(opt, sample)
        assert list(gains) == [f"layers.{t}" for t in range(1, len(model.layers))]
        for t, gain in enumerate(gains.values(), 1):
            K = reference.policies[t][sample].K
            assert gain.shape == tuple(K.shape)
            torch.testing.assert_close(gain.dense(), K, rtol=1e-8, atol=1e-12)
            du = torch.randn(gain.shape[0]).double()
            torch.testing.assert_close(gain.rmatvec(du), K.T @ du, rtol=1e-8, atol=1e-12)


def test_the_batch_coupled_gain() -> None:
    model = chain("dense")
    x = input_for(model, 3)
    _, function, hessian = cross_entropy(x, 3)
    reference = FullQ(copy.deepcopy(model), LR, joint=True, own_layer=True)
    reference.sweep(x, function, hessian)
    opt = VanillaDDP(model, lr=LR)
    function(model(x)).backward()
    for sample in range(3):
        for t, gain in enumerate(feedback_gains(opt, sample).values(), 1):
            K = reference.policies[t][0].K.reshape(gain.shape[0], 3, -1)[:, sample]
            torch.testing.assert_close(gain.dense(), K, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("value", [PAPER, GaussNewton()])
def test_an_outer_products_gain_has_rank_one(value: Any) -> None:
    model = chain("conv")
    opt = DDPNOpt(model, lr=LR, value=value)
    x = input_for(model, 3)
    cross_entropy(x, 3)[1](model(x)).backward()
    for gain in feedback_gains(opt).values():
        s = torch.linalg.svdvals(gain.dense())
        assert s[0] > 0 and s[1] < 1e-12 * s[0]


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_singular_triplets_against_a_dense_svd(kind: str) -> None:
    model = chain(kind)
    opt = DDPNOpt(model, lr=LR, value="low_rank")
    x = input_for(model, 3)
    cross_entropy(x, 3)[1](model(x)).backward()
    for gain in feedback_gains(opt, 1).values():
        found = singular_triplets(gain, 2)
        U, s, Vh = torch.linalg.svd(gain.dense(), full_matrices=False)
        torch.testing.assert_close(found.values, s[:2])
        for one, dense in ((found.controls, U.T), (found.states, Vh)):
            for k in range(2):
                assert abs(float(one[:, k] @ dense[k])) == pytest.approx(1, abs=1e-8)
        with pytest.raises(ValueError, match="k=0"):
            singular_triplets(gain, 0)


def test_a_direction_in_input_space() -> None:
    model = chain("conv")
    opt = DDPNOpt(model, lr=LR, value="low_rank")
    x = input_for(model, 3)
    cross_entropy(x, 3)[1](model(x)).backward()
    for t, gain in enumerate(feedback_gains(opt, 2).values(), 1):

        def state(one: torch.Tensor, t: int = t) -> torch.Tensor:
            for layer, after in list(zip(model.layers, model.after, strict=True))[:t]:
                one = after(layer(one))
            return one.flatten()

        v = torch.randn(gain.shape[1]).double()
        jacobian = torch.autograd.functional.jacobian(state, x[2:3])
        expected = torch.einsum("s,s...->...", v, jacobian)[0]
        torch.testing.assert_close(gain.to_input(v), expected)


def test_nothing_is_changed_and_the_step_may_follow() -> None:
    model, twin = chain("dense"), chain("dense")
    x = input_for(model, 4)
    _, function, _ = cross_entropy(x, 3)
    for m in (model, twin):
        opt = DDPNOpt(m, lr=LR, value="low_rank")
        function(m(x)).backward()
        if m is model:
            state, grads = torch.get_rng_state(), [p.grad.clone() for p in m.parameters()]
            gain = feedback_gains(opt)["layers.1"]
            gain.dense()
            gain.to_input(torch.ones(gain.shape[1]))
            assert torch.equal(state, torch.get_rng_state())
            assert all(torch.equal(g, p.grad) for g, p in zip(grads, m.parameters(), strict=True))
        opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trained_net_in_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    opt = DDPNOpt(model, lr=0.1, value=PAPER)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gain = feedback_gains(opt)["3"]
    assert gain.parameters == {"weight": (3, 144), "bias": (3,)} and gain.state == (144,)
    triplet = singular_triplets(gain)
    assert gain.to_input(triplet.states[:, 0]).shape == (1, 8, 8)


def test_a_gain_whose_pass_has_been_used() -> None:
    model = chain("dense")
    x = input_for(model, 4)
    opt = DDPNOpt(model, lr=LR, value="low_rank")
    cross_entropy(x, 3)[1](model(x)).backward()
    gain = feedback_gains(opt)["layers.1"]
    opt.step()
    for use in (gain.matvec, gain.to_input):
        with pytest.raises(RuntimeError, match="call feedback_gains anew"):
            use(torch.ones(gain.shape[1]).double())


def test_errors_name_the_way_out() -> None:
    model = chain("dense")
    x = input_for(model, 4)
    _, function, _ = cross_entropy(x, 3)
    with pytest.raises(ValueError, match="value='low_rank'"):
        feedback_gains(DDPNOpt(model))
    with pytest.raises(ValueError, match="feedback=True"):
        feedback_gains(DDPNOpt(model, value="low_rank", feedback="open_loop"))
    opt = DDPNOpt(model, value="low_rank")
    with pytest.raises(RuntimeError, match="0 passes"):
        feedback_gains(opt)
    function(model(x)).backward()
    with pytest.raises(ValueError, match="sample=9"):
        feedback_gains(opt, 9)
