# SPDX-License-Identifier: MIT
"""Nothing grows: many steps, many optimizers, passes without a backward pass, threads, workers.

The full run is `python benchmarks/soak.py`.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ddpnopt import DDPNOpt, Feedback, classification, notices, open_loop
from ddpnopt.errors import DDPNOptWarning
from reliability.faults import Rig


@pytest.fixture(autouse=True)
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def program() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["closed_loop", "open_loop", "kfac", "feedback", "branches"])
def test_steps_leave_nothing(kind: str) -> None:
    first, last = program().soak(kind, 60)
    # Memory and Python's own caches settle later; the full run looks at them.
    grown = set(last.grown_from(first)) - {"memory"}
    assert not grown, (grown, first, last)


def test_the_soak_sees_growth() -> None:
    """The measure itself."""
    soak = program()
    model = soak.chain()
    before = soak.Counts.of(model)
    kept = [model(torch.randn(2, 8)) for _ in range(3)]
    model.register_forward_hook(lambda *_: None)
    assert {"graphs", "hooks"} <= set(soak.Counts.of(model).grown_from(before))
    del kept


class Odd(nn.Module):
    """A layer without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w)


class Skipping(nn.Module):
    """Layers that run or not by chance, as with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Odd() if i % 2 else nn.Linear(4, 4) for i in range(10))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if torch.rand(()) < 0.5:
                x = x + torch.tanh(block(x))
        out: torch.Tensor = self.head(x)
        return out


def vars_of(part: Any) -> dict[str, Any]:
    return getattr(part, "__dict__", {})


def sizes(part: Any, name: str = "engine", depth: int = 0) -> dict[str, int]:
    """Lengths of all containers among the library's own attributes."""
    found = {}
    for key, value in vars_of(part).items():
        if isinstance(value, dict | set | list):
            found[f"{name}.{key}"] = len(value)
        elif (
            depth < 4
            and type(value).__module__.startswith("ddpnopt")
            and hasattr(value, "__dict__")
        ):
            found.update(sizes(value, f"{name}.{key}", depth + 1))
    return found


def test_structures_that_keep_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered about each structure, and said of it, has an end."""
    most = 12
    monkeypatch.setattr(classification, "MOST", most)
    monkeypatch.setattr(notices, "MOST", most)
    torch.manual_seed(0)
    model = Skipping()
    opt = DDPNOpt(model, lr=0.01, terminal="cross_entropy")
    largest: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(30):
            opt.zero_grad()
            F.cross_entropy(model(torch.randn(4, 4)), torch.arange(4) % 3).backward()
            opt.step()
            for name, size in sizes(opt.engine).items():
                largest[name] = max(size, largest.get(name, 0))
    parameters = len(list(model.parameters()))
    memories = {"engine.notices._told", "engine.notices._said"}
    memories |= {f"engine.recorder.classifier.{name}" for name in ("_doubts", "_mixing")}
    assert memories <= largest.keys()
    # Layers of one pass, with their hooks and parameters, and what is bounded.
    assert max(largest.values()) <= 2 * parameters + most, largest
    assert len([w for w in said if issubclass(w.category, DDPNOptWarning)]) <= most + 1


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "own": DDPNOpt,
    "open": lambda m: DDPNOpt(m, feedback="open_loop"),
    "low_rank": lambda m: DDPNOpt(m, value="low_rank"),
    "feedback": lambda m: Feedback(m, torch.optim.AdamW(m.parameters())),
    "brake": lambda m: Feedback(m, torch.optim.AdamW(m.parameters()), mode="brake"),
}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hundred_optimizers_leave_no_reference(kind: str) -> None:
    rig = Rig.of("residual", "identity")
    rig.opt.detach()
    model = rig.model
    seen: list[weakref.ref[Any]] = []
    for _ in range(20):
        opt = MAKERS[kind](model)
        F.cross_entropy(model(torch.randn(4, 5)), torch.arange(4) % 3).backward()
        opt.step()
        engine = opt.engine
        seen += map(weakref.ref, (opt, engine, engine.recorder, engine.recorder.arrivals))
        del opt, engine
    gc.collect()
    assert not [one for one in seen if one() is not None]
    assert hooks(model) == 0


def test_handles_of_open_loops_go_with_their_optimizer() -> None:
    rig = Rig.of("mlp", "identity")
    rig.opt.detach()
    seen = []
    for _ in range(20):
        inner = torch.optim.AdamW(rig.model.parameters())
        seen += [weakref.ref(inner), weakref.ref(open_loop(rig.model, inner))]
        F.cross_entropy(rig.model(torch.randn(4, 5)), torch.arange(4) % 3).backward()
        inner.step()
        del inner
    gc.collect()
    assert not [one for one in seen if one() is not None]
    assert hooks(rig.model) == 0


class Mark:
    """Lives as long as the graph that it hangs on, as a hook of its last node."""

    def __call__(self, *_: object) -> None:
        """Change nothing."""


@pytest.mark.parametrize("optimizer", ["identity", "low_rank", "open_identity", "feedback_adamw"])
@pytest.mark.parametrize("model", ["mlp", "residual", "cnn"])
def test_passes_without_backward_leave_nothing(model: str, optimizer: str) -> None:
    """Without the garbage collector's help: a cycle through a graph would hold its memory."""
    rig = Rig.of(model, optimizer)
    rig.iterate(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            loss = rig.forward(1)
            mark = Mark()
            loss.grad_fn.register_hook(mark)
            seen = weakref.ref(mark)
            del mark, loss
            assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("residual", "identity"), ("mlp", "open_rmsprop"), ("residual", "feedback_adamw")],
)
def test_two_threads_train_two_models(model: str, optimizer: str) -> None:
    """Each ends where it would have ended alone; the modes are each thread's own."""
    rigs = [Rig.of(model, optimizer) for _ in range(4)]
    spans = range(12), range(12, 24)
    for rig, span in zip(rigs[2:], spans, strict=True):
        for seed in span:
            rig.iterate(seed)
    errors: list[BaseException] = []

    def work(rig: Rig, span: range) -> None:
        try:
            for seed in span:
                rig.iterate(seed)
        except BaseException as error:  # shown by the test
            errors.append(error)

    before, fused = sys.getswitchinterval(), torch.backends.mha.get_fastpath_enabled()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=work, args=one) for one in zip(rigs[:2], spans, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    assert torch.backends.mha.get_fastpath_enabled() == fused
    for one, alone in zip(rigs[:2], rigs[2:], strict=True):
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, alone.model.state_dict()[name]), name


def epoch(model: nn.Module, loader: DataLoader[Any]) -> None:
    opt = DDPNOpt(model, lr=0.1, terminal="cross_entropy")
    for x, y in loader:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    """They know nothing of the model's hooks, and the batches are the same."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5), torch.arange(24) % 3)
    model = Rig.of("mlp", "identity").model
    twin = copy.deepcopy(model)
    epoch(twin, DataLoader(data, batch_size=8))
    workers: Any = DataLoader(data, batch_size=8, num_workers=1, multiprocessing_context=method)
    epoch(model, workers)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
