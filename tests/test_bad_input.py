# SPDX-License-Identifier: MIT
"""Bad input: a clear error that names what is wrong and the way out; nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.value import Dense, GaussNewton, LowRank, Moreau
from oracles.common import assert_same, assert_unchanged, data, iterate, mlp, snapshot

FEEDBACKS = [True, "open_loop", False]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def refused(match: str, error: Any = ValueError, **options: Any) -> None:
    """Construction fails and leaves the model as it was."""
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        DDPNOpt(model, **options)
    assert hooks(model) == 0
    assert_unchanged(model, before)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_parameters_of_another_model(feedback: object) -> None:
    other = mlp(1)
    refused("(?i)model", params=other.parameters(), feedback=feedback)
    refused("(?i)model", params=[{"params": other[2].parameters()}], feedback=feedback)


def test_parameters_of_another_model_added_later() -> None:
    model, other = mlp(), mlp(1)
    opt = DDPNOpt(model, params=model[2:].parameters())
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match="(?i)model"):
        opt.add_param_group({"params": other.parameters()})
    assert len(opt.param_groups) == groups
    iterate(model, opt, [0])


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_step_without_backward(feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, feedback=feedback)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    model(data()[0])
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    assert_unchanged(model, before)
    iterate(model, opt, [0])  # and it can go on


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_step_after_the_gradients_were_cleared(feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, feedback=feedback)
    iterate(model, opt, [0])
    opt.zero_grad()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_step_without_backward_and_weight_gradients() -> None:
    model = mlp()
    opt = DDPNOpt(model, weight_gradients=False)
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_backward_of_another_model(feedback: object) -> None:
    model, other = mlp(), mlp(1)
    opt = DDPNOpt(model, feedback=feedback)
    x, y = data()
    F.cross_entropy(other(x), y).backward()
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_all_frozen_is_plain_not_an_error(feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, feedback=feedback)
    model.requires_grad_(False)
    before = snapshot(model)
    x, y = data()
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert_unchanged(model, before)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_unrecognised_is_plain_not_an_error(feedback: object) -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=0.3, feedback=feedback)
    x, _ = data()
    with pytest.warns(match="terminal"):
        model(x).abs().sum().backward()
        opt.step()
    twin(x).abs().sum().backward()
    torch.optim.SGD(twin.parameters(), 0.3).step()
    assert_same(model, twin, 1e-15)


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("curvature", ("identity", "rmsprop")),
        ("value", ("moreau", "gauss_newton", "low_rank", "dense")),
        ("terminal", ("auto", "cross_entropy", "nll", "mse", "mmc", "bce_with_logits")),
        ("gram", ("auto", "exact", "sketch")),
        ("nonfinite", ("raise", "skip")),
        ("feedback", ("open_loop",)),
    ],
)
def test_unknown_names_list_the_known_ones(option: str, names: tuple[str, ...]) -> None:
    for name in names:
        refused(name, (ValueError, TypeError), **{option: "nonsense"})
    refused(f"(?i){option}|nonsense", (ValueError, TypeError), **{option: "nonsense"})
    refused(option, (ValueError, TypeError), **{option: 3.5})


@pytest.mark.parametrize("form", [GaussNewton, LowRank, Dense])
def test_unknown_backup(form: type) -> None:
    for name in ("proximal", "closed_loop", "riccati"):
        with pytest.raises(ValueError, match=name):
            form(backup="nonsense")


@pytest.mark.parametrize(
    ("form", "options", "match"),
    [
        (GaussNewton, {"clip": -1.0}, "clip"),
        (LowRank, {"clip": -0.5}, "clip"),
        (LowRank, {"rank": 0}, "rank"),
        (LowRank, {"statistics": "nonsense"}, "statistics.*(value|plain)"),
        (Dense, {"regularization": -1.0}, "regularization"),
        (Moreau, {"line": "nonsense"}, "line.*(auto|quadratic)"),
        (Moreau, {"strength": -1.0}, "strength"),
        (Moreau, {"statistics": "nonsense"}, "statistics"),
        (RMSprop, {"alpha": 1.5}, "alpha"),
        (RMSprop, {"alpha": -0.1}, "alpha"),
        (RMSprop, {"eps": -1e-8}, "eps"),
        (RMSprop, {"second_moment": "nonsense"}, "second_moment.*(batch|per_sample)"),
    ],
)
def test_options_of_the_choices(form: type, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){match}"):
        form(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -0.1}, "lr|learning rate"),
        ({"lr": float("nan")}, "lr|learning rate"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_numbers_out_of_range(options: dict[str, float], match: str) -> None:
    refused(f"(?i){match}", **options)
    model = mlp()
    group = {"params": model.parameters(), **options}
    with pytest.raises(ValueError, match=f"(?i){match}"):
        DDPNOpt(model, params=[group])
    assert hooks(model) == 0


def test_negative_rate_in_an_added_group() -> None:
    model = mlp()
    opt = DDPNOpt(model, params=model[2:].parameters())
    with pytest.raises(ValueError, match="(?i)lr|learning rate"):
        opt.add_param_group({"params": model[:2].parameters(), "lr": -1.0})
    assert len(opt.param_groups) == 1


def test_parameters_given_twice() -> None:
    model = mlp()
    groups = [{"params": model.parameters()}, {"params": model[0].parameters()}]
    with pytest.raises(ValueError):
        DDPNOpt(model, params=groups)


@pytest.mark.parametrize("model", [None, 3, torch.nn.Parameter(torch.zeros(2))])
def test_model_that_is_no_module(model: object) -> None:
    with pytest.raises(TypeError, match=r"Module"):
        DDPNOpt(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [[1, 2], "net", [{"params": [1]}]])
def test_members_that_are_no_parameters(model: object) -> None:
    with pytest.raises(ValueError, match=r"member 0 .*Module"):
        DDPNOpt(model)  # type: ignore[arg-type]


def test_parameters_twice() -> None:
    with pytest.raises(TypeError, match=r"twice"):
        DDPNOpt(mlp().parameters(), params=mlp().parameters())


def test_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="parameter"):
        DDPNOpt(nn.Sequential(nn.Tanh()))


def test_open_loop_with_a_value_that_has_none() -> None:
    """Handled, or refused at construction by name; never another algorithm silently."""
    model = mlp()
    try:
        opt = DDPNOpt(model, feedback="open_loop", value=Dense(regularization=1e-3))
    except ValueError as error:
        assert "open_loop" in str(error)
        return
    iterate(model, opt, [0])


def test_wrong_types_of_options() -> None:
    refused("value", (TypeError, ValueError), value=nn.Linear(2, 2))
    refused("curvature", (TypeError, ValueError), curvature=nn.Linear(2, 2))
    refused("terminal", (TypeError, ValueError), terminal=7)
