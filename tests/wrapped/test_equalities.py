# SPDX-License-Identifier: MIT
"""Without feedback, and where no sample needs damping, it IS the inner optimizer, to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

from ddpnopt import DDPNOptWarning, Feedback, UnsupportedModelError, open_loop
from wrapped.common import WAYS, assert_equal, conv, dense, train

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"dampening": 0.1, "momentum": 0.9},
    ],
    "ASGD": [{"weight_decay": 0.1}],
    "Adam": [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True}],
    "NAdam": [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "betas": (0.9, 0.8)}],
    "Adamax": [{"weight_decay": 0.1}],
    "RMSprop": [{"weight_decay": 0.1}, {"momentum": 0.9, "centered": True}],
    "Adagrad": [{"weight_decay": 0.1}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Rprop": [{}],
    "Adafactor": [{"weight_decay": 0.1}],
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"maximize": True},
]


def cases() -> Iterator[Any]:
    for name, choices in OPTIONS.items():
        known = inspect.signature(getattr(optim, name)).parameters
        for options in choices:
            for variant in VARIANTS:
                if known.keys() >= variant.keys():
                    both = {**options, **variant}
                    nets = (dense,) if variant else (dense, conv)
                    yield pytest.param(name, both, nets, id=f"{name}-{both}")


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize(("name", "options", "nets"), list(cases()))
def test_torch_optim(name: str, options: dict[str, Any], nets: tuple[Any, ...]) -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        return getattr(optim, name)(model.parameters(), lr=0.01, **options)

    for net in nets:
        expected = train(net, make)
        for way in WAYS.values():
            assert_equal(train(net, make, way), expected)


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_several_optimizers() -> None:
    def make(model: nn.Module) -> list[optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        return [optim.Muon(matrices, lr=0.02), optim.AdamW(rest, lr=0.01)]

    for net in (dense, conv):
        expected = train(net, make)
        for way in WAYS.values():
            assert_equal(train(net, make, way), expected)


def pip(module: str, name: str, **options: Any) -> Any:
    def make(model: nn.Module) -> optim.Optimizer:
        found = getattr(pytest.importorskip(module), name)(model.parameters(), **options)
        if hasattr(found, "train"):
            found.train()  # schedule-free ones
        return found

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        pip("lion_pytorch", "Lion", lr=1e-3, weight_decay=0.1),
        pip("schedulefree", "AdamWScheduleFree", lr=0.01),
        pip("schedulefree", "SGDScheduleFree", lr=0.1),
        *(
            pip("pytorch_optimizer", name, lr=0.01)
            # LARS and GrokFastAdamW change p.grad in place.
            for name in ("SOAP", "Shampoo", "Adan", "Lamb", "AdaBelief", "LARS", "GrokFastAdamW")
        ),
    ],
)
def test_others(make: Any) -> None:
    for net in (dense, conv):
        expected = train(net, make)
        for way in WAYS.values():
            assert_equal(train(net, make, way), expected)


TOGETHER = [
    ("prodigyopt", "Prodigy", {}),
    ("dadaptation", "DAdaptSGD", {}),
    ("dadaptation", "DAdaptAdam", {}),
    ("pytorch_optimizer", "DAdaptAdam", {}),
    ("pytorch_optimizer", "AdaGC", {"lr": 0.01}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "name", "options"), TOGETHER)
def test_what_takes_its_parameters_together(module: str, name: str, options: Any) -> None:
    make = pip(module, name, **options)
    model = dense()
    with pytest.raises(UnsupportedModelError, match=f"{name}.*open_loop"):
        Feedback(model, make(model))
    expected = train(dense, make)
    for way in ("off", "open", "handle"):
        assert_equal(train(dense, make, WAYS[way]), expected)


class Clipped(optim.SGD):
    """Global-norm clipping inside an optimizer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.1)
        super().step()


class Counting(optim.SGD):
    """A warm-up by the number of calls, kept outside the groups."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls = self.calls + 1
        super().step()


class Noisy(optim.SGD):
    """Draws random numbers in the order of its parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for g in self.param_groups for p in g["params"]):
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p), alpha=1e-3)
        super().step()


@pytest.mark.parametrize("kind", [Clipped, Counting, Noisy])
def test_own_optimizers_that_take_their_parameters_together(kind: Any) -> None:
    model = dense()
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} takes its param.*open_loop"):
        Feedback(model, kind(model.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)
    Feedback(model, kind(model.parameters(), lr=0.1), feedback="open_loop")


class Unsure(optim.SGD):
    """Reads a number from outside, as a kernel may that reads memory nobody has written."""

    calls = count(1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for g in self.param_groups for p in g["params"]):
            if p.grad is not None:
                p.grad.add_(1e-3 * next(self.calls))
        super().step()


def test_an_optimizer_that_is_no_function_of_its_numbers_is_told_apart() -> None:
    model = dense()
    with pytest.raises(UnsupportedModelError, match="Unsure makes different steps of the same"):
        Feedback(model, Unsure(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_in_half_precision(dtype: torch.dtype) -> None:
    model = dense().to(dtype)
    with pytest.raises(UnsupportedModelError, match="SGD.*half precision.*foreach=True"):
        Feedback(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True))
    others: list[dict[str, Any]] = [{"fused": True}, {"momentum": 0.9, "foreach": True}]
    for options in others:
        net = dense().to(dtype)
        Feedback(net, optim.SGD(net.parameters(), lr=0.1, **options))


class PerGroup(optim.SGD):
    """Counts in its group, as schedule-free optimizers do: the same for every layer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["k"])


def test_group_counters_count_steps_not_layers() -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        return PerGroup(model.parameters(), lr=0.1)

    expected = train(dense, make)
    assert "'k': 4" in expected[1]
    for way in WAYS.values():
        assert_equal(train(dense, make, way), expected)


@pytest.mark.parametrize("depth", [True, "open_loop", False])
def test_line_searches_and_sharpness_are_refused(depth: Any) -> None:
    model = dense()
    with pytest.raises(UnsupportedModelError, match="LBFGS evaluates"):
        Feedback(model, optim.LBFGS(model.parameters()), feedback=depth)
    with pytest.raises(UnsupportedModelError, match="LBFGS evaluates"):
        open_loop(model, optim.LBFGS(model.parameters()))


class Sharp(optim.SGD):
    """Ascends, evaluates the closure there, comes back and steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        moved = [(p, p.grad.clone()) for g in self.param_groups for p in g["params"]]
        for p, g in moved:
            p.add_(g, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, g in moved:
            p.sub_(g, alpha=0.05)
        super().step()


def test_closures_evaluated_again_are_refused() -> None:
    model = dense()
    for depth in (True, "open_loop", False):
        with pytest.raises(UnsupportedModelError, match="Sharp evaluates the loss again"):
            Feedback(model, Sharp(model.parameters(), lr=0.1), feedback=depth)
    with pytest.raises(UnsupportedModelError, match="Sharp evaluates the loss again"):
        open_loop(model, Sharp(model.parameters(), lr=0.1))


def test_climbing_is_plain_and_said() -> None:
    def make(model: nn.Module) -> optim.Optimizer:
        return optim.AdamW(model.parameters(), lr=0.01, maximize=True)

    expected = train(dense, make)
    for way in (Feedback, lambda m, o: Feedback(m, o, feedback="open_loop"), open_loop):
        with pytest.warns(DDPNOptWarning, match="maximize=True"):
            assert_equal(train(dense, make, way), expected)
    model = dense()
    opt = Feedback(model, optim.SGD(model.parameters(), lr=0.1))
    opt.param_groups[0]["maximize"] = True
    with pytest.raises(UnsupportedModelError, match="maximize=True"):
        opt.step()


def test_sparse_gradients() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4, sparse=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.embedding(x))

    def run(way: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Tokens()
        inner = [
            optim.SparseAdam(model.embedding.parameters(), lr=0.1),
            optim.SGD(model.out.parameters(), lr=0.1),
        ]
        around = way(model, inner) if way else None
        stepping = [around] if isinstance(around, optim.Optimizer) else inner
        for number in range(3):
            x, y = (torch.arange(6) + number) % 7, torch.arange(6) % 3
            for one in stepping:
                one.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for one in stepping:
                one.step()
        return [p.detach() for p in model.parameters()]

    expected = run(None)
    for way in WAYS.values():
        for a, b in zip(run(way), expected, strict=True):
            assert torch.equal(a, b)
