# SPDX-License-Identifier: MIT
"""The brake against a joint minimisation over all gammas, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt import Feedback
from ddpnopt.brake import DRAW, Brake, Value


def recursion(w: Tensor, kappa: Tensor, steps: list[Tensor]) -> list[Brake]:
    """Brakes of the layers in order of execution."""
    value = Value(w, w * kappa, w.new_zeros(len(w), 0))
    found: list[Brake] = []
    for D in reversed(steps):
        found.insert(0, Brake(value, D, DRAW * (w * D.abs()).sum()))
        value = found[0].back()
    return found


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 6), layers=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_equals_the_joint_minimiser_where_no_clamp_holds(
    samples: int, layers: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    w, kappa = (uniform(samples) + 0.5) / samples, 3 * uniform(samples)
    # Every step overshoots a little, so that all gammas lie inside (0, 1).
    steps = [0.3 * (uniform(samples) + 0.5) + 0.4 / layers for _ in range(layers)]
    D = torch.stack(steps, 1)
    r = torch.stack([DRAW * (w * d.abs()).sum() for d in steps])
    # min over gamma of  sum_i w_i (delta_i + kappa_i delta_i^2 / 2) + r (gamma - 1)^2 / 2,
    # delta = -D gamma.
    gamma = torch.linalg.solve(D.T @ ((w * kappa)[:, None] * D) + r.diag(), D.T @ w + r)
    brakes, q, found = recursion(w, kappa, steps), torch.zeros(samples, dtype=torch.float64), []
    free = [float(brake(None)) for brake in brakes]
    for brake, d in zip(brakes, steps, strict=True):
        found.append(brake(q))
        q = q - found[-1] * d
    if all(0 < g < 1 for g in free):
        torch.testing.assert_close(torch.stack(found), gamma, rtol=1e-9, atol=1e-12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.PReLU(), nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8),
        nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip
    return model.double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 1, 6, 6).double(), torch.tensor([0, 1, 2, 3, 1])


def no_curvature(z: Tensor) -> Tensor:
    """A terminal cost's factor."""
    return z.new_zeros(*z.shape, 1)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_without_curvature_the_step_is_the_optimizers_own(feedback: bool | str) -> None:
    x, y = data()
    ends = []
    for braked in (False, True):
        model = net()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        opt: torch.optim.Optimizer = inner
        if braked:
            opt = Feedback(model, inner, mode="brake", terminal=no_curvature, feedback=feedback)
        for _ in range(4):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_is_a_share_of_the_optimizers_own_in_every_layer() -> None:
    x, y = data()
    plain, braked = net(), net()
    inner = torch.optim.SGD(plain.parameters(), lr=3.0, momentum=0.9)
    own = torch.optim.SGD(braked.parameters(), lr=3.0, momentum=0.9)
    opt = Feedback(braked, own, mode="brake", feedback="open_loop")
    before = [p.detach().clone() for p in braked.parameters()]
    for model, optimizer in ((plain, inner), (braked, opt)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert opt.last_step is not None
    gammas = {layer.name: layer.coefficient_mean for layer in opt.last_step.layers}
    assert min(g for g in gammas.values() if g is not None) < 0.9
    names = [name.rpartition(".")[0] for name, _ in braked.named_parameters()]
    for name, old, p, q in zip(names, before, plain.parameters(), braked.parameters(), strict=True):
        torch.testing.assert_close(q - old, gammas[name] * (p - old))
        torch.testing.assert_close(
            own.state[q]["momentum_buffer"], gammas[name] * inner.state[p]["momentum_buffer"]
        )


def test_progress_is_what_the_step_alone_takes_from_the_losses() -> None:
    """D of a layer is the directional derivative of each sample's loss along its own step."""
    x, y = data()
    model = net()
    lr = 0.05
    opt = Feedback(model, torch.optim.SGD(model.parameters(), lr=lr), mode="brake")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}

    def losses(changed: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(net(), changed, (x,))
        return nn.functional.cross_entropy(out, y, reduction="none") / len(y)

    nn.functional.cross_entropy(model(x), y).backward()
    step = {n: -lr * p.grad for n, p in model.named_parameters() if p.grad is not None}
    brakes: dict[str, Brake] = {}
    policy = Brake.__call__

    def watched(self: Brake, q: Tensor | None) -> Tensor:
        brakes.setdefault(str(id(self)), self)
        return policy(self, q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Brake, "__call__", watched)
        opt.step()
    found = list(brakes.values())  # from the output backwards
    layers = ["6", "4", "3", "1", "0"]
    assert len(found) == len(layers)
    eps = 1e-6
    for name, brake in zip(layers, found, strict=True):
        own = {k for k in weights if k.startswith(f"{name}.")}
        ends = [
            losses({k: v + s * eps * step[k] if k in own else v for k, v in weights.items()})
            for s in (1, -1)
        ]
        derivative = (ends[0] - ends[1]) / (2 * eps)
        torch.testing.assert_close(-brake.D / len(y), derivative)


def test_hooks_of_the_user_do_not_enter_a_layers_progress() -> None:
    """A hook that shifts a layer's output leaves D the derivative along the layer's own step."""
    x, y = data()
    model = net()
    model[3].register_forward_hook(lambda module, args, out: out + 5.0)
    opt = Feedback(model, torch.optim.SGD(model.parameters(), lr=0.1), mode="brake")
    nn.functional.cross_entropy(model(x), y).backward()
    expected = sum(
        0.1 * float(p.grad.square().sum()) for p in model[3].parameters() if p.grad is not None
    )
    seen: list[float] = []
    back = Brake.back

    def watched(self: Brake) -> Value:
        seen.append(float(self.D.sum() / len(y)))
        return back(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Brake, "back", watched)
        opt.step()
    assert any(value == pytest.approx(expected, rel=1e-9) for value in seen)


def test_sparse_momentum_steps_as_torchs() -> None:
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
        opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            opt = Feedback(model, opt, feedback=False)
        for _ in range(3):
            opt.zero_grad()
            out = model(torch.arange(12).reshape(4, 3))
            nn.functional.cross_entropy(out, torch.tensor([0, 1, 2, 0])).backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_bad_modes_are_refused() -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="mode='breaks'.*samples, brake"):
        Feedback(model, inner, mode="breaks")
    with pytest.raises(ValueError, match="weight_gradients"):
        Feedback(model, inner, mode="brake", weight_gradients=False)
    with pytest.raises(ValueError, match="value"):
        Feedback(model, inner, mode="brake", value="low_rank")
