# SPDX-License-Identifier: MIT
"""Optimizers made from parameters alone, as frameworks make them, and pickled ones."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.overrides import _get_current_function_mode_stack

from ddpnopt import (
    EMSA,
    KFAC,
    SGDVGR,
    DDPNOpt,
    DDPNOptWarning,
    Feedback,
    UnsupportedModelError,
    VanillaDDP,
)
from reliability.faults import Interrupt, stride

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.DDPNOptWarning")
KINDS: dict[str, Callable[[Any], DDPNOpt]] = {
    "identity": lambda given: DDPNOpt(given, momentum=0.9),
    "adamw": lambda given: DDPNOpt(given, lr=0.01, curvature="adamw", weight_decay=0.1),
    "kfac": lambda given: DDPNOpt(given, curvature="kfac"),
    "low_rank": lambda given: DDPNOpt(given, value="low_rank"),
    "open loop": lambda given: DDPNOpt(given, feedback="open_loop"),
    "off": lambda given: DDPNOpt(given, feedback=False),
    "no weight gradients": lambda given: DDPNOpt(given, weight_gradients=False),
    "KFAC": KFAC,
    "SGDVGR": SGDVGR,
    "EMSA": EMSA,
    "VanillaDDP": VanillaDDP,
}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


class Keywords(nn.Module):
    """Called with keyword arguments, as Hugging Face's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(network())

    def forward(self, inputs: torch.Tensor | None = None) -> torch.Tensor:
        assert inputs is not None
        for layer in self.net:
            inputs = layer(inputs)
        return inputs


def train(
    model: nn.Module,
    opt: Any,
    steps: Iterable[int],
    keyword: bool = False,
    written: bool = False,
) -> torch.Tensor:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator).double()
        y = torch.randint(4, (8,), generator=generator)
        if written:
            x.mul_(1)
        opt.zero_grad()
        F.cross_entropy(model(inputs=x) if keyword else model(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def as_groups(model: nn.Module) -> list[dict[str, Any]]:
    members = list(model.parameters())
    return [{"params": members[:2]}, {"params": members[2:]}]


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "groups": as_groups,
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_do_as_well_as_the_model(kind: str, given: str) -> None:
    model, twin = network(), network()
    opt = KINDS[kind](GIVEN[given](model))
    assert torch.equal(train(model, opt, range(4)), train(twin, KINDS[kind](twin), range(4)))
    assert opt.model is model


def test_params_by_name() -> None:
    model, twin = network(), network()
    opt = DDPNOpt(params=model.parameters(), lr=0.2)
    assert torch.equal(train(model, opt, range(3)), train(twin, DDPNOpt(twin, lr=0.2), range(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_keywords(kind: str) -> None:
    """Tensors that nobody has written to are as they were when the call began."""
    model, twin = Keywords(), Keywords()
    opt = KINDS[kind](model.parameters())
    found = train(model, opt, range(3), keyword=True)
    assert torch.equal(found, train(twin, KINDS[kind](twin), range(3), keyword=True))


def test_the_first_step_is_open_loop_where_keywords_may_have_changed() -> None:
    model, twin = Keywords(), Keywords()
    opt, other = DDPNOpt(model.parameters(), lr=0.5), DDPNOpt(twin, lr=0.5, feedback="open_loop")
    first = train(model, opt, [0], keyword=True, written=True)
    assert opt.last_step is not None and opt.last_step.depth == "open_loop"
    expected = train(twin, other, [0], keyword=True)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    other.detach()
    closed = DDPNOpt(twin, lr=0.5)
    second = train(model, opt, [1], keyword=True, written=True)
    assert opt.last_step.depth == "closed_loop"
    torch.testing.assert_close(second, train(twin, closed, [1], keyword=True), rtol=0, atol=1e-12)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["written", "container"])
def test_keywords_that_the_model_changes(change: str) -> None:
    """Run again with what it has left behind, the pass would be another one."""

    class Changes(Keywords):
        def forward(self, inputs: Any = None) -> torch.Tensor:
            x = inputs.pop() if change == "container" else inputs.clone()
            if change == "written":
                inputs.mul_(3)
            return super().forward(x)

    model, twin = Changes(), Keywords()
    opt, other = DDPNOpt(model.parameters(), lr=0.5), DDPNOpt(twin, lr=0.5, feedback="open_loop")
    x, y = torch.ones(3, 6).double(), torch.tensor([0, 1, 2])
    given = [x.clone()] if change == "container" else x.clone()
    F.cross_entropy(model(inputs=given), y).backward()
    F.cross_entropy(twin(x), y).backward()
    opt.step()
    other.step()
    torch.testing.assert_close(train(model, opt, []), train(twin, other, []), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGDVGR", "EMSA", "VanillaDDP"])
def test_methods_that_must_run_the_pass_again_say_so(kind: str) -> None:
    model = Keywords()
    with pytest.raises(UnsupportedModelError, match="keyword arguments.*give the optimizer the"):
        train(model, KINDS[kind](model.parameters()), [0], keyword=True, written=True)


def test_what_comes_before_the_first_call() -> None:
    """Schedulers, a round trip of the state, evaluation, groups added, zero_grad."""
    model, twin = network(), network()
    last = list(model[4].parameters())
    opt = DDPNOpt(model[:4].parameters(), lr=0.1, momentum=0.9)
    opt.add_param_group({"params": last})
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.zero_grad()
    with torch.no_grad():
        model(torch.zeros(2, 6).double())
    other = DDPNOpt(twin, lr=0.1, momentum=0.9)
    twins = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
    for step in range(5):
        train(model, opt, [step])
        train(twin, other, [step])
        scheduler.step()
        twins.step()
    assert torch.equal(train(model, opt, []), train(twin, other, []))


def test_a_state_is_taken_over_before_the_model_is_known() -> None:
    model, twin = network(), network()
    opt = DDPNOpt(twin, momentum=0.9)
    straight = train(twin, opt, range(5))
    first = DDPNOpt(model.parameters(), momentum=0.9)
    train(model, first, range(3))
    state = copy.deepcopy(first.state_dict())
    first.detach()
    second = DDPNOpt(model.parameters(), momentum=0.9)
    second.load_state_dict(state)
    assert torch.equal(train(model, second, range(3, 5)), straight)


def test_the_outermost_call_that_owns_all_is_the_model() -> None:
    inner = network()
    model = nn.Sequential(nn.Flatten(), inner)
    opt = DDPNOpt(inner.parameters())
    train(model, opt, [0])
    assert opt.model is model and opt.last_step is not None
    assert opt.last_step.depth == "closed_loop"


def test_a_model_that_can_not_be_handled_is_refused_in_its_call() -> None:
    model = network()
    opt = DDPNOpt(model.parameters())
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        train(nn.DataParallel(model), opt, [0])


@pytest.mark.parametrize("kind", ["identity", "KFAC", "EMSA"])
def test_no_single_call_that_owns_all(kind: str) -> None:
    model = network()
    opt = KINDS[kind](model.parameters())
    before = train(model, opt, [])
    parts = lambda x: model[2:](model[:2](x))  # noqa: E731
    F.cross_entropy(parts(torch.ones(3, 6).double()), torch.tensor([0, 1, 2])).backward()
    with pytest.raises(RuntimeError, match=r"owns all parameters.*DDPNOpt\(model"):
        opt.step()
    assert torch.equal(before, train(model, opt, []))


def test_without_feedback_no_model_is_needed() -> None:
    model, twin = network(), network()
    parts = lambda net, x: net[2:](net[:2](x))  # noqa: E731
    opt = DDPNOpt(model.parameters(), lr=0.1, feedback=False)
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    for net, one in ((model, opt), (twin, plain)):
        F.cross_entropy(parts(net, torch.ones(3, 6).double()), torch.tensor([0, 1, 2])).backward()
        one.step()
    assert torch.equal(train(model, opt, []), train(twin, plain, []))


def test_detached_before_the_first_call_it_is_plain() -> None:
    model, twin = network(), network()
    opt = DDPNOpt(model.parameters(), lr=0.1)
    opt.detach()
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    assert torch.equal(train(model, opt, range(2)), train(twin, plain, range(2)))


@pytest.mark.parametrize("keyword", [False, True])
def test_interrupted_as_it_is_found(keyword: bool) -> None:
    """Ctrl-C wherever Python lets it in: the next call is found, and trains as ever."""
    number = 1
    while True:
        model, twin = (Keywords(), Keywords()) if keyword else (network(), network())
        opt, other = DDPNOpt(model.parameters(), momentum=0.9), DDPNOpt(twin, momentum=0.9)
        x = torch.ones(3, 6).double()
        try:
            with Interrupt(number) as interrupt:
                model(inputs=x) if keyword else model(x)
        except KeyboardInterrupt:
            pass
        found = train(model, opt, range(2), keyword)
        assert opt.model is model and opt.last_step is not None, number
        assert opt.last_step.depth == "closed_loop", number
        assert torch.equal(found, train(twin, other, range(2), keyword)), number
        assert not _get_current_function_mode_stack(), number
        if not interrupt.fired:
            return
        number += stride(61)


def test_nothing_stays_behind() -> None:
    before = len(_global_forward_pre_hooks)
    model = network()
    dropped, used = DDPNOpt(model.parameters()), DDPNOpt(model.parameters())
    assert len(_global_forward_pre_hooks) == before + 2
    train(model, used, [0])
    ref = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert ref() is None
    assert len(_global_forward_pre_hooks) == before


# Copies -----------------------------------------------------------------------------------------


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "Feedback": lambda model: Feedback(model, torch.optim.AdamW(model.parameters(), 0.01)),
    "brake": lambda model: Feedback(
        model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), mode="brake"
    ),
    "two": lambda model: Feedback(
        model,
        [
            torch.optim.AdamW(model[:2].parameters(), 0.01),
            torch.optim.SGD(model[2:].parameters(), 0.1, momentum=0.9),
        ],
    ),
}


@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle, by_save])
@pytest.mark.parametrize("kind", [*KINDS, *WRAPPED])
def test_a_copied_pair_goes_on_to_the_bit(kind: str, copier: Callable[[Any], Any]) -> None:
    for steps in (0, 2):
        model = network()
        opt = {**KINDS, **WRAPPED}[kind](model)
        train(model, opt, range(steps))
        copied, other = copier((model, opt))
        assert type(other) is type(opt) and copied is other.model
        rest = range(steps, 5)
        assert torch.equal(train(model, opt, rest), train(copied, other, rest))
        assert opt.last_step.depth == other.last_step.depth


def test_copies_of_a_pair_that_is_not_bound_yet_and_of_a_detached_one() -> None:
    model = network()
    copied, other = by_pickle((model, DDPNOpt(model.parameters())))
    twin = network()
    assert torch.equal(train(copied, other, range(2)), train(twin, DDPNOpt(twin), range(2)))
    opt = DDPNOpt(model, lr=0.1)
    opt.detach()
    copied, other = by_pickle((model, opt))
    plain = torch.optim.SGD(model.parameters(), 0.1)
    assert torch.equal(train(copied, other, range(2)), train(model, plain, range(2)))


@pytest.mark.filterwarnings("default::ddpnopt.DDPNOptWarning")
def test_what_was_said_is_not_said_again_by_a_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    opt = DDPNOpt(model)
    with pytest.warns(DDPNOptWarning, match="weighted once"):
        train(model, opt, [0])
    copied, other = by_pickle((model, opt))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(copied, other, [1])
