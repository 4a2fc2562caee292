# SPDX-License-Identifier: MIT
"""The graph oracles themselves: liveness, derivatives by differences, and one joint problem."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from oracles.common import cross_entropy
from oracles.dense_ddp import DenseDDP
from oracles.flat import Chain, Inner, flat_parameters
from oracles.graph import Net, System
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph
from oracles.graph_nets import GRAPHS, NETS, SHARED, Case, net
from oracles.graph_parts import tanh
from oracles.graph_random import random_nets
from oracles.moreau_scalar import softmax_line
from oracles.moreau_step import MoreauStep

LR = 0.3


def system_of(case: Case) -> System:
    model, inputs = case
    return System(model, DenseGraph(model, Inner(LR)).weights, inputs)


def check_pieces(case: Case) -> None:
    """Every cut is sufficient: the pieces compose, and their Jacobians are the net's."""
    model, inputs = case
    system = system_of(case)
    torch.testing.assert_close(system.states[-1], model(*inputs).detach(), rtol=0, atol=1e-14)
    end = len(system.stages)
    product, step = None, 1e-6
    for t in reversed(range(end)):
        f_x, f_u = system.jacobians(t, t + 1)
        z_x, z_u = system.jacobians(t, end)
        product = f_x if product is None else product @ f_x
        torch.testing.assert_close(product, z_x, rtol=1e-10, atol=1e-12)
        torch.manual_seed(t)
        v = torch.randn_like(system.states[t])
        moved = [
            torch.cat(
                [
                    system.advance(t, end, x + sign * step * d, None, sample)[None]
                    for x, d, sample in zip(system.states[t], v, samples(system), strict=True)
                ]
            )
            for sign in (1, -1)
        ]
        slope = (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close(slope, torch.einsum("bcx,bx->bc", z_x, v), rtol=0, atol=1e-7)
        assert (f_u is None) == (z_u is None) == (system.stages[t].control is None)


def samples(system: System) -> list[dict[int, torch.Tensor]]:
    """The integer inputs of each sample."""
    return [{i: x[b] for i, x in system.data.items()} for b in range(system.batch)]


@pytest.mark.parametrize("name", NETS)
def test_pieces_are_the_net(name: str) -> None:
    check_pieces(net(name))


@settings(max_examples=10)
@given(random_nets())
def test_pieces_of_random_nets(case: Case) -> None:
    check_pieces(case)


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_controls_are_autograds(name: str) -> None:
    """Summed over executions and samples; through tied parameters too."""
    model, inputs = net(name)
    y, loss, hessian = cross_entropy(inputs[0], 3)
    oracle = MoreauGraph(copy.deepcopy(model), Inner(LR))
    oracle.step(inputs, loss, torch.full((5,), 0.2).double(), lambda z: lines(z, y))
    loss(model(*inputs)).backward()
    for t, rows in oracle.G_u.items():
        layer = model.layers[oracle.system.stages[t].owner]
        want = torch.cat([p.grad.reshape(-1) for p in layer.parameters()])
        torch.testing.assert_close(rows.sum(0), want, rtol=1e-10, atol=1e-14)


def lines(z: torch.Tensor, y: torch.Tensor) -> list[object]:
    """Line models of hard labels."""
    target = F.one_hot(y, 3).double().numpy()
    return [softmax_line(a, b) for a, b in zip(z.numpy(), target, strict=True)]


@pytest.mark.parametrize("name", NETS)
def test_recursion_is_one_joint_problem(name: str) -> None:
    """Proximal: all controls from a cut on chosen at once, for the linearised net.

    min over du_k of sum |du_k|^2 / (2 eta) + V_z dz + dz^T H dz / 2, dz = z_x dx + sum z_u,k du_k,
    has the closed form below; no recursion, no state between the cuts.
    """
    model, inputs = net(name)
    _, loss, hessian = cross_entropy(inputs[0], 3)
    oracle = DenseGraph(model, Inner(LR), own_layer=True)
    system = oracle.step(inputs, loss, hessian)
    g, H = oracle.values[-1]
    end = len(system.stages)
    reach = torch.zeros_like(H)
    for t in reversed(range(end)):
        z_x, z_u = system.jacobians(t, end)
        if z_u is not None:
            reach = reach + LR * z_u @ z_u.mT
        shrink = torch.linalg.inv(torch.eye(3).double() + H @ reach)
        V_x, V_xx = oracle.values[t]
        torch.testing.assert_close(
            V_x, (z_x.mT @ shrink @ g[..., None])[..., 0], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(V_xx, z_x.mT @ shrink @ H @ z_x, rtol=1e-9, atol=1e-12)
        if z_u is not None:
            policy = oracle.policies[t]
            dx = torch.ones_like(V_x)
            want = LR * z_u.mT @ shrink @ (g[..., None] + H @ z_x @ dx[..., None])
            got = torch.linalg.solve(policy.solver, policy.q_u + policy.q_ux @ dx[..., None])
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [build.__name__ for build in (*GRAPHS, *SHARED)])
def test_every_part_of_the_state_counts(name: str) -> None:
    """Leaving any live tensor or carried weight out of dx changes the step visibly.

    So a library that forgets one cannot equal the oracle. (Inputs of the net never change.)
    """
    model, inputs = net(name)
    y, loss, _ = cross_entropy(inputs[0], 3)
    w = torch.full((5,), 0.2).double()
    system = system_of((model, inputs))
    cuts = [t for t, stage in enumerate(system.stages) if stage.control is not None]
    parts: set[int | str] = {i for t in cuts for i in system.live(t) if i >= model.inputs}
    parts |= {c for t in cuts for c in system.carried(t)}
    steps = {}
    for missing in (None, *parts):
        oracle = Forgetful(model, Inner(1.0, 0.0), coupling=False)
        oracle.missing = missing
        oracle.step(inputs, loss, w, lambda z: lines(z, y))
        steps[missing] = torch.cat([u.flatten() for u in oracle.weights.values()])
    for missing in parts:
        assert float((steps[None] - steps[missing]).abs().max()) > 1e-7, missing


class Forgetful(MoreauGraph):
    """The oracle, blind to the change of one value or one carried control."""

    missing: int | str | None = None

    def policy(self, t: int, dx: torch.Tensor) -> torch.Tensor:
        """With zeros for the missing part."""
        dx, at = dx.clone(), 0
        for part in (*self.system.live(t), *self.system.carried(t)):
            value = self.system.weights.get(part) if isinstance(part, str) else None
            size = self.system.values[part][0].numel() if value is None else len(value)
            dx[:, at : at + size] *= part != self.missing
            at += size
        return super().policy(t, dx)


def twin(name: str) -> Chain:
    """A chain case as the chain oracles take it."""
    model, _ = net(name)
    after = {
        "chain": [tanh, tanh, lambda h: h],
        "conv_chain": [tanh, lambda h: tanh(h).mean((2, 3)), lambda h: h],
    }
    return Chain(list(model.layers.values()), after[name])


@pytest.mark.parametrize("name", ["chain", "conv_chain"])
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.parametrize("backup", ["proximal", "closed_loop", "riccati"])
@pytest.mark.parametrize("own_layer", [False, True])
def test_chain_is_the_chain_oracle(name: str, curvature: str, backup: str, own_layer: bool) -> None:
    model, inputs = net(name)
    _, loss, hessian = cross_entropy(inputs[0], 3)
    lr = {"identity": LR, "rmsprop": 0.02}[curvature]
    options = {"backup": backup, "own_layer": own_layer}
    graph = DenseGraph(model, Inner(lr, 0.5, curvature, eps=1e-3), **options)
    flat = DenseDDP(twin(name), Inner(lr, 0.5, curvature, eps=1e-3), **options)
    for _ in range(2):
        graph.step(inputs, loss, hessian)
        flat.step(inputs[0], loss, hessian)
    same(model, graph.weights, flat.params)


@pytest.mark.parametrize("name", ["chain", "conv_chain"])
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.parametrize("strength", [None, 1.0])
def test_chain_is_the_moreau_oracle(name: str, curvature: str, strength: float | None) -> None:
    model, inputs = net(name)
    y, loss, _ = cross_entropy(inputs[0], 3)
    w = torch.full((5,), 0.2).double()
    lr = {"identity": 1.0, "rmsprop": 0.05}[curvature]
    graph = MoreauGraph(model, Inner(lr, 0.5, curvature), strength=strength)
    flat = MoreauStep(twin(name), Inner(lr, 0.5, curvature), strength=strength)
    for _ in range(2):
        graph.step(inputs, loss, w, lambda z: lines(z, y))
        flat.step(inputs[0], loss, w, lambda z: lines(z, y))
    same(model, graph.weights, flat.params)


def same(model: Net, weights: dict[str, torch.Tensor], params: list[torch.Tensor]) -> None:
    """Equal, and not where they started."""
    start = flat_parameters(Chain(list(model.layers.values()), []))
    for (name, got), want, before in zip(
        [(name, weights[name]) for name in model.layers], params, start, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=name)
        assert float((got - before).abs().max()) > 1e-3
