# SPDX-License-Identifier: MIT
"""torch.compile: trained passes run as written, and give the weights of the uncompiled model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt import DDPNOpt, DDPNOptWarning, open_loop

pytestmark = pytest.mark.filterwarnings("ignore")
Call = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Any:
    torch.compiler.reset()
    yield
    # No stance or switch of ours is left behind.
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not torch._dynamo.config.disable
    torch.compiler.reset()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h + torch.tanh(self.b(h)))


def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    return nn.Sequential(*layers)


def train(model: nn.Module, call: Call, opt: Any, steps: int = 3) -> torch.Tensor:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator)
        y = torch.randint(4, (8,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(call(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def closed(model: nn.Module) -> Any:
    return DDPNOpt(model, lr=0.5)


def opened(model: nn.Module) -> Any:
    inner = torch.optim.SGD(model.parameters(), 0.5)
    open_loop(model, inner)
    return inner


def called(call: Call) -> None:
    call(torch.ones(8, 6)).sum().backward()


def of_the_compiled(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    wrapped = torch.compile(model, backend=backend)
    return wrapped, make(wrapped)


def after_its_first_call(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    wrapped = torch.compile(model, backend=backend)
    called(wrapped)
    return wrapped, make(wrapped)


def compiled_later(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    opt = make(model)
    return torch.compile(model, backend=backend), opt


def in_place(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    opt = make(model)
    model.compile(backend=backend)
    return model, opt


def inside_a_function(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    opt = make(model)
    return torch.compile(lambda x: model(x.clone()), backend=backend), opt


def inside_a_model(model: Any, make: Any, backend: str) -> tuple[Call, Any]:
    whole = nn.Sequential(nn.Identity(), torch.compile(model, backend=backend))
    return whole, make(whole)


WAYS = [of_the_compiled, after_its_first_call, compiled_later, in_place, inside_a_function]


@pytest.mark.parametrize("make", [closed, opened])
@pytest.mark.parametrize("network", [chain, Residual])
@pytest.mark.parametrize("way", [*WAYS, inside_a_model])
def test_weights_of_the_uncompiled_model(way: Any, network: Any, make: Any) -> None:
    model, twin = network(), network()
    call, opt = way(model, make, "eager")
    assert torch.equal(train(model, call, opt), train(twin, twin, make(twin)))
    if make is closed:
        assert opt.last_step.depth == "closed_loop"


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("way", [of_the_compiled, compiled_later])
def test_inductor(way: Any) -> None:
    model, twin = Residual(), Residual()
    call, opt = way(model, closed, "inductor")
    torch.testing.assert_close(train(model, call, opt), train(twin, twin, closed(twin)))


def test_parameters_of_a_compiled_model() -> None:
    model, twin = Residual(), Residual()
    call = torch.compile(model, backend="eager")
    opt = DDPNOpt(call.parameters(), lr=0.5)
    assert torch.equal(train(model, call, opt), train(twin, twin, closed(twin)))


@pytest.mark.parametrize("way", [in_place, inside_a_function])
def test_parameters_of_a_model_whose_call_is_compiled(way: Any) -> None:
    """The compiler does not see a hook that waits for the model: refused, and nothing changes."""
    model = Residual()
    call, opt = way(model, lambda model: DDPNOpt(model.parameters(), lr=0.5), "eager")
    before = train(model, call, opt, 0)
    with pytest.raises(RuntimeError, match=r"DDPNOpt\(model, ...\), as where model.compile\(\)"):
        train(model, call, opt)
    assert torch.equal(train(model, call, opt, 0), before)


@pytest.mark.parametrize("make", [closed, opened])
def test_made_for_the_original_after_the_first_call_it_is_right_or_refused(make: Any) -> None:
    """The compiler does not see new hooks on what it has compiled already."""
    model, twin = chain(), chain()
    call = torch.compile(model, backend="eager")
    called(call)
    opt = make(model)
    before = train(model, call, opt, 0)
    try:
        found = train(model, call, opt)
    except RuntimeError as error:
        assert "torch.compiler.reset()" in str(error)
        assert torch.equal(train(model, call, opt, 0), before)
        opt.zero_grad()
        torch.compiler.reset()
        found = train(model, call, opt)
    assert torch.equal(found, train(twin, twin, make(twin)))


def test_evaluation_stays_compiled() -> None:
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len([n for n in graph.graph.nodes if n.op == "call_function"]))
        return graph.forward

    model = Residual()
    call = torch.compile(model, backend=backend, fullgraph=True)
    opt = closed(call)
    train(model, call, opt)
    assert not seen
    with torch.no_grad():
        z = call(torch.ones(8, 6))
    assert len(seen) == 1 and seen[0] >= 6
    torch.testing.assert_close(z, model(torch.ones(8, 6)))


def test_without_feedback_training_stays_compiled() -> None:
    seen = []
    model, twin = Residual(), Residual()
    call = torch.compile(model, backend=lambda graph, _: seen.append(1) or graph.forward)
    opt = DDPNOpt(call, lr=0.5, feedback=False)
    plain = torch.optim.SGD(twin.parameters(), 0.5)
    assert torch.equal(train(model, call, opt), train(twin, twin, plain))
    assert seen


@pytest.mark.filterwarnings("default::ddpnopt.DDPNOptWarning")
def test_it_is_said_once() -> None:
    model = Residual()
    call = torch.compile(model, backend="eager")
    opt = closed(call)
    with pytest.warns(DDPNOptWarning, match="run uncompiled") as told:
        train(model, call, opt)
    assert len([w for w in told if w.category is DDPNOptWarning]) == 1


def test_an_interrupted_pass_leaves_the_compiler_as_it_was() -> None:
    class Breaks(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e6:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Breaks()
    call = torch.compile(model, backend="eager")
    opt = closed(call)
    with pytest.raises(KeyboardInterrupt):
        call(torch.full((8, 6), 1e9))
    opt.zero_grad()
    twin = Residual()
    assert torch.equal(train(model, call, opt), train(twin, twin, closed(twin)))
