# SPDX-License-Identifier: MIT
"""What happens to p.grad between backward and step reaches a wrapped optimizer, too.

The twin is DDPNOpt with the curvature of its own, whose handling of gradients has oracles of its
own; beside it, two passes accumulated against the concatenated batch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt, Feedback, open_loop
from ddpnopt.value import Moreau

DEPTHS = [True, "open_loop"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    passes: int = 1,
    change: Callable[[nn.Module], None] = lambda model: None,
) -> Tensor:
    for step in range(6):
        opt.zero_grad()
        x, y = batch(step)
        for part, target in zip(x.chunk(passes), y.chunk(passes), strict=True):
            (nn.functional.cross_entropy(model(part), target) / passes).backward()
        change(model)
        opt.step()
    return weights(model)


@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("change", [clip_norm, clip_value])
@pytest.mark.parametrize("passes", [1, 2])
def test_as_the_own_curvature(
    feedback: bool | str, change: Callable[[nn.Module], None], passes: int
) -> None:
    own, wrapped, plain = net(), net(), net()
    twin = DDPNOpt(own, 0.4, momentum=0.5, feedback=feedback)
    inner = torch.optim.SGD(wrapped.parameters(), 0.4, momentum=0.5)
    expected = train(own, twin, passes, change)
    found = train(wrapped, Feedback(wrapped, inner, feedback=feedback), passes, change)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    bare = torch.optim.SGD(plain.parameters(), 0.4, momentum=0.5)
    assert float((train(plain, bare, passes, change) - expected).abs().max()) > 1e-4


# In open loop each pass is re-weighted on its own: with a coupling of its own, and under AdamW with
# a gain that knows its own gradient alone.
@pytest.mark.parametrize(
    ("kind", "feedback"), [("AdamW", True), ("SGD", True), ("SGD", "open_loop")]
)
def test_two_passes_equal_the_concatenated_batch(kind: str, feedback: bool | str) -> None:
    ends = []
    for passes in (1, 2):
        model = net()
        inner = getattr(torch.optim, kind)(model.parameters(), 0.02, weight_decay=0.1)
        opt = Feedback(model, inner, Moreau(coupling=False), feedback=feedback)
        ends.append(train(model, opt, passes))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("feedback", DEPTHS)
def test_without_weight_gradients(feedback: bool | str) -> None:
    own, wrapped = net(), net()
    twin = DDPNOpt(own, 0.4, feedback=feedback, weight_gradients=False)
    inner = torch.optim.SGD(wrapped.parameters(), 0.4)
    opt = Feedback(wrapped, inner, feedback=feedback, weight_gradients=False)
    torch.testing.assert_close(train(wrapped, opt), train(own, twin), rtol=1e-12, atol=1e-13)
    assert all(m.weight.grad is None for m in wrapped if isinstance(m, nn.Linear))


@pytest.mark.parametrize("passes", [1, 2])
def test_the_handle_equals_the_wrapper_in_open_loop(passes: int) -> None:
    ends = []
    for wrapped in (True, False):
        model = net()
        opt: torch.optim.Optimizer = torch.optim.RMSprop(model.parameters(), 0.01, momentum=0.3)
        if wrapped:
            opt = Feedback(model, opt, feedback="open_loop")
        else:
            open_loop(model, opt)
        ends.append(train(model, opt, passes, clip_norm))
    assert torch.equal(*ends)


def test_a_failing_layer_in_the_rollout_changes_nothing() -> None:
    model = net()
    inner = torch.optim.AdamW(model.parameters(), 0.02)
    opt = Feedback(model, inner)
    train(model, opt)
    before = weights(model)
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in inner.state.items()}
    nn.functional.cross_entropy(model(batch(9)[0]), batch(9)[1]).backward()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    handle.remove()
    assert torch.equal(weights(model), before)
    for p, state in states.items():
        assert all(torch.equal(inner.state[p][k], v) for k, v in state.items())
