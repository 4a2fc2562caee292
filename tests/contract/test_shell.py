# SPDX-License-Identifier: MIT
"""The optimizer around the step: construction, groups, copies, state, and inputs at the edge."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, vmap
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import Dense, GaussNewton, LowRank, Moreau
from oracles.common import (
    assert_params,
    assert_same,
    data,
    identity,
    iterate,
    mlp,
    steps,
)
from oracles.dense_ddp import DenseDDP
from oracles.flat import Chain, Inner

quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
LR = 0.7
VALUES = [Moreau(), GaussNewton(), LowRank(), Dense()]


@quiet
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
def test_skipped_batch_does_not_switch_feedback_off(
    feedback: object, first: bool, value: str
) -> None:
    model, twin = mlp(), mlp()
    options: dict[str, Any] = {"lr": LR, "feedback": feedback, "value": value}
    opt = DDPNOpt(model, nonfinite="skip", **options)
    before, after = ([], [0, 1, 2]) if first else ([0], [1, 2])
    iterate(model, opt, before)
    x, y = data(7)
    x[2, 1] = float("nan")
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert opt.last_step is not None and opt.skipped == opt.last_step.skipped == 1
    iterate(model, opt, after)
    assert opt.last_step.terminal == "cross_entropy" and opt.last_step.depth != "off"
    iterate(twin, DDPNOpt(twin, **options), [0, 1, 2])
    assert_same(model, twin)


def segmentation() -> tuple[Chain, Tensor, Any, Any]:
    """Convolutions up to the output; one class a pixel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 2)]
    model = Chain(layers, [torch.tanh, identity]).double()
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    y = torch.randint(0, 3, (3, 3, 2))

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    def one(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z[None], y[None], reduction="sum") / 18

    def hessians(z: Tensor) -> Tensor:
        return vmap(hessian(one))(z, y).reshape(3, 18, 18)

    return model, x, loss, hessians


@quiet
@pytest.mark.parametrize("value", [LowRank(), Dense()])
@pytest.mark.parametrize("terminal", ["auto", "cross_entropy"])
def test_one_class_a_pixel(value: object, terminal: str) -> None:
    """The classes' axis lies before the positions: each pixel has a factor of its own."""
    model, x, loss, hessians = segmentation()
    reference = DenseDDP(copy.deepcopy(model), Inner(LR))
    for _ in range(2):
        reference.step(x, loss, hessians)
    opt = steps(model, x, loss, 2, lr=LR, value=value, terminal=terminal)
    assert_params(model, reference.params)
    assert opt.last_step is not None and opt.last_step.terminal == "cross_entropy"


@pytest.mark.parametrize("feedback", [0, 1, 1.0, None, "closed_loop", "True"])
def test_depth_is_no_number(feedback: object) -> None:
    with pytest.raises(ValueError, match="feedback=.*True, 'open_loop', False"):
        DDPNOpt(mlp(), feedback=feedback)  # type: ignore[arg-type]


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize("value", ["moreau", "low_rank", "dense"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_empty_batch_is_plain(feedback: object, value: str) -> None:
    """Momentum and weight decay go on, as in the borrowed optimizer."""
    model, twin = mlp(), mlp()
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    opt = DDPNOpt(model, feedback=feedback, value=value, **options)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(twin.parameters(), **options)
    for net, o in ((model, opt), (twin, sgd)):
        for _ in range(2):
            o.zero_grad()
            y = torch.empty(0, dtype=torch.long)
            F.cross_entropy(net(torch.empty(0, 5).double()), y, reduction="sum").backward()
            o.step()
    assert_same(model, twin, 1e-15)


@quiet
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
def test_replaced_layer(feedback: object, value: str) -> None:
    """Its parameters added as a group, the new layer takes part as the old one did."""
    options: dict[str, Any] = {"lr": LR, "feedback": feedback, "value": value}
    model = mlp()
    opt = DDPNOpt(model, **options)
    iterate(model, opt, [0, 1])
    torch.manual_seed(9)
    model[2] = nn.Linear(6, 5).double()
    opt.add_param_group({"params": model[2].parameters()})
    twin = copy.deepcopy(model)
    iterate(model, opt, [2, 3])
    iterate(twin, DDPNOpt(twin, **options), [2, 3])
    assert_same(model, twin)
    assert opt.last_step is not None and opt.last_step.terminal == "cross_entropy"
    if feedback is True:
        assert [layer.name for layer in opt.last_step.layers] == ["0", "2", "4"]


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
def test_half_copies_are_refused(feedback: object) -> None:
    opt = DDPNOpt(mlp(), feedback=feedback)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(opt)


@quiet
@pytest.mark.parametrize("groups", [False, True])
def test_named_parameters(groups: bool) -> None:
    model, twin = mlp(), mlp()
    params: Any = model.named_parameters()
    if groups:
        params = [
            {"params": list(layer.named_parameters())} for layer in model if len(layer._parameters)
        ]
    iterate(model, DDPNOpt(model, lr=LR, params=params), range(2))
    iterate(twin, DDPNOpt(twin, lr=LR), range(2))
    assert_same(model, twin)


def test_squares_of_each_sample_in_a_group_added_later() -> None:
    """Without feedback nothing was recorded; the group's curvature needs it from now on."""
    model = mlp()
    opt = DDPNOpt(model, lr=0.01, params=model[:2].parameters(), feedback=False)
    iterate(model, opt, [0])
    rest = list(model[2:].parameters())
    curvature = RMSprop(alpha=0.9, second_moment="per_sample")
    opt.add_param_group({"params": rest, "curvature": curvature})
    x, y = data(1)
    squares = [torch.zeros_like(p) for p in rest]
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), rest)
        squares = [s + g**2 / len(x) for s, g in zip(squares, gradients, strict=True)]
    iterate(model, opt, [1])
    for p, expected in zip(rest, squares, strict=True):
        torch.testing.assert_close(opt.state[p]["square_avg"], 0.1 * expected, rtol=1e-10, atol=0)


def part_names() -> list[str]:
    return sorted(DDPNOpt(mlp()).state_dict()["ddpnopt"])


@pytest.mark.parametrize("missing", [n for n in part_names() if n != "options"])
def test_state_with_a_missing_part_is_refused(missing: str) -> None:
    model, other = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR, momentum=0.5)
    iterate(model, opt, [0, 1])
    state = DDPNOpt(other, lr=0.1).state_dict()
    del state["ddpnopt"][missing]
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="load_state_dict"):
        opt.load_state_dict(state)
    same_state(opt.state_dict(), before)


@pytest.mark.parametrize("missing", ["momentum", "curvature", "lr", "weight_decay"])
def test_group_with_a_missing_option_is_refused(missing: str) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, momentum=0.5)
    iterate(model, opt, [0])
    state = copy.deepcopy(opt.state_dict())
    del state["param_groups"][0][missing]
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=missing):
        opt.load_state_dict(state)
    same_state(opt.state_dict(), before)


def same_state(first: Any, second: Any) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            same_state(a, b)
    else:
        assert first == second


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@pytest.mark.parametrize("options", [{}, {"feedback": "open_loop"}, {"weight_gradients": False}])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_dropped_optimizer_leaves_no_hooks(options: dict[str, Any], used: bool) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, **options)
    assert hooks(model) > 0
    if used:
        iterate(model, opt, [0, 1])
    del opt
    gc.collect()
    assert hooks(model) == 0
    assert all(p.requires_grad for p in model.parameters())


def small(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    if kind == "dense":
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 5)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return net, torch.randn(6, 2, 4, 4)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


@quiet
@pytest.mark.parametrize(
    ("dtype", "curvature"),
    # float16 has no room for RMSprop's squares and eps: torch's own divides by zero there.
    [(torch.bfloat16, "identity"), (torch.bfloat16, "rmsprop"), (torch.float16, "identity")],
)
@pytest.mark.parametrize("value", VALUES, ids=lambda v: v.name)
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_half_precision_models(
    dtype: torch.dtype, curvature: str, value: Any, kind: str, feedback: object
) -> None:
    """Near the same step in full precision, for every value function."""
    net, x = small(kind)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    nets = {d: copy.deepcopy(net).to(dtype).to(d) for d in (dtype, torch.float32)}
    start = copy.deepcopy(nets[torch.float32])
    options: dict[str, Any] = {"value": value, "curvature": curvature, "feedback": feedback}
    for d, model in nets.items():
        lr = 0.5 if curvature == "identity" else 0.01
        opt = DDPNOpt(model, lr=lr, terminal="cross_entropy", **options)
        F.cross_entropy(model(x.to(dtype).to(d)), y).backward()
        opt.step()
        assert opt.last_step is not None and opt.last_step.depth == opt.options.depth
    full = vector(nets[torch.float32])
    moved = float((full - vector(start)).norm())
    bound = 0.1 if curvature == "identity" else 0.6  # signs of gradients near zero may differ
    assert 0 < float((vector(nets[dtype]) - full).norm()) < bound * moved


class Gated(nn.Module):
    """The container has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)) * self.scale)


class Biases(nn.Module):
    """Parameters of a container, used by its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.shift, self.factor = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.factor * torch.tanh(self.embed(x)) + self.shift)


OUTSIDE: list[tuple[type[nn.Module], list[str]]] = [
    (Gated, ["scale"]),
    (Biases, ["shift", "factor"]),
]


@pytest.mark.parametrize(("form", "names"), OUTSIDE)
def test_parameters_outside_the_layers_are_said_once(
    form: type[nn.Module], names: list[str]
) -> None:
    model = form().double()
    opt = DDPNOpt(model, lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        iterate(model, opt, range(4))
    said = [str(w.message) for w in seen if issubclass(w.category, DDPNOptWarning)]
    for name in names:
        assert sum(f"'{name}'" in message for message in said) == 1, name
    assert len(said) == len(set(said))
    assert not any("'embed.weight'" in message or "'head.weight'" in message for message in said)
