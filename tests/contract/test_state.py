# SPDX-License-Identifier: MIT
"""state_dict, parameter groups, swapped parameters, closures."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_same, data, distance, iterate, mlp

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")

LR = 0.05
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "rmsprop": {"curvature": "rmsprop", "momentum": 0.5},
    "per_sample": {"curvature": RMSprop(second_moment="per_sample"), "value": LowRank()},
    "low_rank_rmsprop": {"curvature": RMSprop(alpha=0.9), "value": "low_rank"},
    "open_loop": {"feedback": "open_loop"},
    "open_loop_rmsprop": {"feedback": "open_loop", "curvature": "rmsprop"},
    "no_weight_gradients": {"weight_gradients": False},
    "no_weight_gradients_rmsprop": {"weight_gradients": False, "curvature": "rmsprop"},
    "open_no_weight_gradients": {"weight_gradients": False, "feedback": "open_loop"},
    "off": {"feedback": False, "momentum": 0.5},
}


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()


def round_trip(state: object) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def loop(
    model: nn.Module, opt: torch.optim.Optimizer, seeds: Iterable[int], clip: float | None
) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shape = (6, 1, 6, 6) if isinstance(model[0], nn.Conv2d) else (6, 5)
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        opt.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_resume_is_bit_exact(choice: str, clip: float | None) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, **CHOICES[choice])
    loop(model, opt, range(4), clip)
    saved = round_trip({"model": model.state_dict(), "optimizer": opt.state_dict()})
    loop(model, opt, range(4, 8), clip)
    other = mlp(seed=9)
    resumed = DDPNOpt(other, lr=LR, **CHOICES[choice])
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    loop(other, resumed, range(4, 8), clip)
    assert_same(model, other)


@pytest.mark.parametrize("gram", ["exact", "sketch", "auto"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_resume_of_convolutions(gram: str, feedback: object) -> None:
    """The sketch's generator belongs to the state."""
    model = conv()
    opt = DDPNOpt(model, lr=LR, gram=gram, feedback=feedback)
    loop(model, opt, range(3), None)
    saved = round_trip({"model": model.state_dict(), "optimizer": opt.state_dict()})
    loop(model, opt, range(3, 6), None)
    other = conv()
    resumed = DDPNOpt(other, lr=LR, gram=gram, feedback=feedback)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.manual_seed(77)  # nothing depends on the global generator
    loop(other, resumed, range(3, 6), None)
    assert_same(model, other)


def test_sketch_is_close_to_exact() -> None:
    models = [conv(), conv()]
    for model, gram in zip(models, ("exact", "sketch"), strict=True):
        loop(model, DDPNOpt(model, lr=0.3, gram=gram), [0], None)
    plain = conv()
    loop(plain, torch.optim.SGD(plain.parameters(), 0.3), [0], None)
    assert 0 < distance(models[0], models[1]) < 0.7 * distance(models[0], plain)


def walk(node: object, path: str = "") -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            assert isinstance(key, (str, int)), path
            walk(value, f"{path}.{key}")
    elif isinstance(node, (list, tuple)):
        for k, value in enumerate(node):
            walk(value, f"{path}[{k}]")
    else:
        assert node is None or isinstance(node, (Tensor, bool, int, float, str)), (path, node)


@pytest.mark.parametrize("choice", CHOICES)
def test_state_is_plain(choice: str) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, **CHOICES[choice])
    walk(opt.state_dict())
    loop(model, opt, range(2), None)
    walk(opt.state_dict())
    assert {"version", "format"} & set(_keys(opt.state_dict()))


def _keys(node: object) -> Iterable[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _keys(value)


def test_state_of_a_newer_format_is_refused() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    loop(model, opt, [0], None)

    def raise_version(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                k: v + 1000
                if k in ("version", "format") and isinstance(v, int)
                else raise_version(v)
                for k, v in node.items()
            }
        return [raise_version(v) for v in node] if isinstance(node, list) else node

    with pytest.raises(ValueError, match="version|format"):
        opt.load_state_dict(raise_version(opt.state_dict()))


def test_choices_are_plain_values_in_the_groups() -> None:
    group = DDPNOpt(mlp(), lr=LR, curvature=RMSprop(alpha=0.9), momentum=0.3).param_groups[0]
    walk({k: v for k, v in group.items() if k != "params"})
    assert group["lr"] == LR and group["momentum"] == 0.3


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_add_param_group(value: object) -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR, value=value, params=model[2:].parameters())
    opt.add_param_group({"params": model[:2].parameters(), "lr": 0.5, "weight_decay": 0.1})
    groups = [
        {"params": twin[2:].parameters()},
        {"params": twin[:2].parameters(), "lr": 0.5, "weight_decay": 0.1},
    ]
    other = DDPNOpt(twin, lr=LR, value=value, params=groups)
    iterate(model, opt, range(3))
    iterate(twin, other, range(3))
    assert_same(model, twin)
    start = mlp()
    assert distance(model[:1], start[:1]) > 0.01


def test_add_param_group_after_some_steps() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, params=model[2:].parameters())
    iterate(model, opt, range(2))
    assert distance(model[:1], mlp()[:1]) == 0
    opt.add_param_group({"params": model[:2].parameters(), "lr": 0.5})
    iterate(model, opt, range(2))
    assert distance(model[:1], mlp()[:1]) > 0.01


def test_groups_of_one_layer_have_their_own_rate() -> None:
    """Weight and bias of a layer in different groups: each rate enters its own part of the gain."""
    model, twin = mlp(), mlp()
    weights = [p for n, p in model.named_parameters() if "weight" in n]
    biases = [p for n, p in model.named_parameters() if "bias" in n]
    groups = [{"params": weights, "lr": 0.5}, {"params": biases, "lr": 0.5}]
    iterate(model, DDPNOpt(model, lr=9.0, params=groups), range(3))
    iterate(twin, DDPNOpt(twin, lr=0.5), range(3))
    assert_same(model, twin, 1e-14)


def test_learning_rate_set_by_hand() -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR)
    opt.param_groups[0]["lr"] = 0.5
    iterate(model, opt, range(2))
    iterate(twin, DDPNOpt(twin, lr=0.5), range(2))
    assert_same(model, twin)


def test_parameters_swapped_after_construction() -> None:
    """FSDP and others replace the parameters; they are looked up through their module."""
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=0.5)
    for k in (0, 2, 4):
        for name in ("weight", "bias"):
            old = getattr(model[k], name)
            new = nn.Parameter(old.detach().clone())
            setattr(model[k], name, new)
            params = opt.param_groups[0]["params"]
            index = next(i for i, p in enumerate(params) if p is old)
            params[index] = new
    iterate(model, opt, range(3))
    iterate(twin, DDPNOpt(twin, lr=0.5), range(3))
    assert_same(model, twin)


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_closure(feedback: object) -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=0.5, feedback=feedback)
    calls = []
    for seed in range(3):
        x, y = data(seed)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            calls.append(1)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        expected = float(F.cross_entropy(model(x), y).detach())
        with torch.no_grad():  # step itself enables gradients for the closure
            loss = opt.step(closure)
        assert float(loss) == pytest.approx(expected, rel=1e-14)
    assert len(calls) == 3
    iterate(twin, DDPNOpt(twin, lr=0.5, feedback=feedback), range(3))
    assert_same(model, twin)


def test_step_hooks_fire_once() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=0.5)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    iterate(model, opt, [0])
    assert calls == ["pre", "post"]
