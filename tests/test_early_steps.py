# SPDX-License-Identifier: MIT
"""Steps of recorded loops that are computed in the backward pass, before they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt import (
    CapturedLoop,
    DDPNOpt,
    DDPNOptWarning,
    Feedback,
    UnsupportedModelError,
    capture,
)
from ddpnopt.captured.compiling import _watched
from ddpnopt.captured.early import Early, beside, sample_of, sampling
from ddpnopt.captured.program import Value, graph_of
from ddpnopt.captured.tracing import Tracer
from ddpnopt.curvature import EKFAC, AdamW, Trust
from ddpnopt.errors import LinAlgError
from oracles.recorded import NETS, OPTIONS, STEPS, apart, batches

pytestmark = pytest.mark.filterwarnings("ignore:each sample is weighted once")


class Twins:
    """A net and its twin; the latter's loop is recorded."""

    def __init__(self, name: str = "dense", **options: Any) -> None:
        self.nets, self.optimizers = [], []
        for _ in range(2):
            torch.manual_seed(0)
            net = NETS[name][0]().double()
            self.nets.append(net)
            self.optimizers.append(DDPNOpt(net, **options))
        self.record = capture(self.optimizers[1], passes=True)
        self.data = batches(NETS[name][1], 60)

    def train(
        self,
        steps: int,
        between: Callable[[nn.Module, DDPNOpt, int], None] = lambda net, opt, turn: None,
        to_none: bool = True,
    ) -> None:
        for turn in range(steps):
            x, y = self.data.pop()
            for net, opt in zip(self.nets, self.optimizers, strict=True):
                opt.zero_grad(set_to_none=to_none)
                F.cross_entropy(net(x), y).backward()
                between(net, opt, turn)
                opt.step()

    @property
    def apart(self) -> float:
        return apart(*self.nets)

    @property
    def joined(self) -> list[bool]:
        return [plan.phases.joined for plan in self.record._plans.values()]


@pytest.mark.parametrize("name", ["dense", "convolutions", "BatchNorm"])
@pytest.mark.parametrize("options", ["closed loop", "adamw, open loop"])
def test_gradients_that_are_zero_instead_of_none(name: str, options: str) -> None:
    both = Twins(name, **OPTIONS[options])
    both.train(3 * STEPS, to_none=False)
    # The backward pass can't know what p.grad is going to be: the records have three parts.
    assert both.joined == [False] and both.record.reason == ""
    late = 3 if options == "closed loop" else 0  # open loop's records have three parts anyway
    assert both.record.missed == late and both.record.replayed > STEPS
    assert both.apart < (1e-9 if name == "BatchNorm" else 1e-12)


def test_rates_that_change_right_before_the_step() -> None:
    both = Twins(lr=0.2)

    def warm_up(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        opt.param_groups[0]["lr"] = 0.01 * (turn + 1)

    both.train(3 * STEPS, warm_up)
    assert both.joined == [False] and both.record.reason == ""
    assert both.record.replayed > STEPS and both.apart < 1e-12


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize(
    "what", ["rate", "written", "unseen", "replaced", "strided", "data", "state"]
)
def test_what_changes_once_before_a_step_counts(what: str, feedback: bool | str) -> None:
    both = Twins(lr=0.01, curvature="rmsprop", feedback=feedback)

    def once(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if turn != 12:
            return
        p = opt.param_groups[0]["params"][0]
        assert p.grad is not None
        if what == "rate":
            opt.param_groups[0]["lr"] *= 3
        elif what == "written":
            p.grad.mul_(1.7)
        elif what == "unseen":  # by versions
            p.grad.data.clamp_(-1e-3, 1e-3)
        elif what == "strided":
            p.grad = p.grad[:1].expand(p.shape)
        elif what == "replaced":
            p.grad = p.grad * 1.7
        elif what == "data":
            p.data = p.data.clone()
        else:
            for state in opt.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        value.mul_(0.5)

    both.train(24, once)
    assert both.joined == [feedback is True] and both.record.reason == ""
    assert both.record.replayed >= 24 - (13 if what == "data" else 8)
    assert both.apart < 1e-12


def test_weights_that_are_changed_before_an_open_loops_step() -> None:
    both = Twins(lr=0.2, feedback="open_loop")

    def shrink(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if turn == 12:
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(0.7)

    both.train(24, shrink)
    assert both.record.reason == "" and both.record.replayed > 10
    assert both.apart < 1e-12


@pytest.mark.parametrize("what", ["weights", "state"])
def test_writes_that_no_version_counts_are_refused(what: str) -> None:
    net, opt, _, plan = ready()
    x, y = batches(NETS["dense"][1], 1)[0]
    F.cross_entropy(net(x), y).backward()
    if what == "weights":
        next(net.parameters()).data.mul_(0.9)
    else:
        next(iter(plan.slots)).tensor.data.mul_(0.9)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedModelError, match="written to between"):
        opt.step()
    assert alike(before, net)
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    assert not alike(before, net)


def test_hooks_on_parameters_are_not_recorded() -> None:
    both = Twins(lr=0.1)
    for net in both.nets:
        next(net.parameters()).register_hook(lambda g: g * 0.5)
    with pytest.warns(DDPNOptWarning, match="a parameter has hooks"):
        both.train(20)
    assert both.record.replayed == 0 and both.apart < 1e-14


def test_a_large_nets_gradients_are_looked_at_in_places() -> None:
    tensors = [torch.randn(300, 200), torch.randn(7)]
    before = sample_of(tensors)
    assert len(before) < 2000
    tensors[0].data.clamp_(-0.5, 0.5)
    assert not torch.equal(sample_of(tensors), before)
    assert len(sample_of(tensors, 1)) == len(before) - 7


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=3), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_program_takes_the_same_sample(shapes: list[list[int]], large: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if large:
        shapes = [*shapes, [300, 200]]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] = tensors[0].double()
    if tensors[-1].dim() == 2:
        tensors[-1] = tensors[-1].t()
    values = [Value(number, number, t.dim()) for number, t in enumerate(tensors)]
    calls, sample = sampling(values, tensors)
    for native in (True, False):
        (found,) = graph_of(values, calls, [sample], native=native)(*tensors)
        assert torch.equal(found, sample_of(tensors)) and found.dtype == torch.float64


def test_a_program_leaves_its_sample_with_the_step() -> None:
    net, opt, _, _ = ready()
    x, y = batches(NETS["dense"][1], 1)[0]
    taken: list[Tensor] = []
    before = [p.detach().clone() for p in net.parameters()]
    state = [v.clone() for s in opt.state.values() for v in s.values() if v.numel() > 1]
    check = Early.check_values

    def note(early: Early, tensors: list[Tensor]) -> bool:
        taken.append(early.sample.clone())
        return check(early, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Early, "check_values", note)
        F.cross_entropy(net(x), y).backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        opt.step()
    found = sorted(taken[0].tolist())
    assert found == sorted(torch.cat([t.flatten() for t in (*grads, *before, *state)]).tolist())


@pytest.mark.parametrize("what", ["strides", "dtype", "memory", "gone"])
def test_state_that_becomes_another_is_looked_at_anew(what: str) -> None:
    both = Twins(lr=0.05, curvature="rmsprop")

    def change(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if turn not in (12, 13):
            return
        for state in opt.state.values():
            for name, value in list(state.items()):
                if what == "gone":
                    del state[name]
                elif what == "memory":
                    value.data = value.data.clone()
                elif what == "dtype":
                    state[name] = value.float()
                else:
                    state[name] = value[:1].clone().expand(value.shape)

    both.train(24, change)
    assert both.record.replayed > 4
    # RMSprop that begins anew divides by single gradients: rounding grows with those near 0.
    assert both.apart < {"dtype": 1e-5, "gone": 1e-10}.get(what, 1e-12)


def test_state_of_another_shape_is_not_given_to_a_record() -> None:
    """Its kernels would read past the end."""
    net, opt, record, plan = ready()
    x, y = batches(NETS["dense"][1], 1)[0]
    assert plan.current()
    value = next(v for s in opt.state.values() for v in s.values() if v.dim() == 2)
    whole = value.data
    value.data = whole[:-1]
    assert not plan.current()
    before, runs = copy.deepcopy(net.state_dict()), record.replayed
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError):  # as without a record
        opt.step()
    assert alike(before, net) and record.replayed == runs
    value.data = whole


def test_state_of_another_dtype_is_not_given_to_a_record() -> None:
    _, opt, _, plan = ready()
    assert plan.current()
    value = next(v for s in opt.state.values() for v in s.values() if v.dim() == 2)
    value.data = value.data.float()
    assert not plan.current()


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_that_is_written_in_place_and_moves_is_recorded_anew(kind: str, passes: bool) -> None:
    """As a state does that was on another device for a while."""
    ends, states = [], []
    for recorded in (True, False):
        torch.manual_seed(0)
        net = NETS["dense"][0]().double()
        options: dict[str, Any] = {"momentum": 0.9} if kind == "sgd" else {}
        make = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
        inner = make(net.parameters(), lr=0.05, fused=True, **options)
        opt = Feedback(net, inner)
        record = capture(opt, passes=passes) if recorded else None
        for turn, (x, y) in enumerate(batches(NETS["dense"][1], 36)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            if turn == 15:
                for state in inner.state.values():
                    for value in state.values():
                        value.data = value.data.clone()
        assert record is None or record.replayed > 20
        ends.append(net)
        states += [[v for s in inner.state.values() for v in s.values()]]
    assert apart(*ends) < 1e-12
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_options_within_options_make_records_void() -> None:
    both = Twins(lr=0.05, curvature=Trust(AdamW(betas=(0.9, 0.99))))

    def change(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if turn == 12:
            opt.param_groups[0]["curvature"]["inner"]["betas"] = (0.5, 0.6)

    both.train(24, change)
    assert both.record.reason == "" and both.record.replayed > 8
    assert both.apart < 1e-10


@pytest.mark.parametrize("between", ["nothing", "a copy", "two programs", "nobody"])
def test_kernels_are_called_themselves_only_if_nothing_is_between(between: str) -> None:
    class Inner:
        def current_callable(self, given: list[Tensor]) -> list[Tensor]:
            made = [given[0] + given[1]]
            given.clear()
            return made

    inner, inputs = Inner(), [torch.ones(2), torch.ones(2)]
    kernels = inner.current_callable

    def made(*given: Tensor) -> list[Tensor]:
        if between == "nobody":
            return [given[0] + given[1]]
        results = inner.current_callable(list(given))
        return [t.clone() for t in results] if between == "a copy" else results

    programs: list[Any] = [inner, Inner()] if between == "two programs" else [inner]
    results, direct = _watched(made, programs, inputs)
    assert torch.equal(results[0], torch.full((2,), 2.0))
    assert (direct is not None) == (between == "nothing")
    assert inner.current_callable == kernels


def test_weights_that_are_turned_around_are_not_given_to_a_record() -> None:
    ends = []
    for recorded in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        opt = DDPNOpt(net, lr=0.1)
        record = capture(opt, passes=True) if recorded else None
        for turn in range(20):
            if turn == 12:
                first = net[0].weight
                assert isinstance(first, Tensor)
                first.data = first.data.t()  # of the same shape, in the same memory
            opt.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(turn)).double()
            F.cross_entropy(net(x), torch.arange(8) % 3).backward()
            opt.step()
        assert record is None or record.replayed > 6
        ends.append(net)
    assert apart(*ends) < 1e-12


def test_comparisons_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedLoop, "compare_every", 2)
    both, compared = Twins(lr=0.1), []

    def note(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if net is both.nets[1]:
            compared.append((both.record.written, both.record.replayed))

    both.train(55, note)
    steps = [runs for (before, _), (now, runs) in pairwise(compared) if now > before]
    # The first ones are written; then after as many runs as the record has held, 20 at most.
    assert steps == [0, 0, 0, 0, 0, 0, 2, 4, 8, 16, 32]
    assert both.apart < 1e-12


def test_another_pass_before_the_step_does_not_take_its_place() -> None:
    """Both would write to the room beside the weights."""
    both = Twins(lr=0.2)
    x, y = both.data[0]

    def look(net: nn.Module, opt: DDPNOpt, turn: int) -> None:
        if turn > 8 and turn % 4 == 0:  # gradients for a plot, thrown away
            torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))

    both.train(30, look)
    assert both.record.reason == "" and both.record.replayed > 10
    assert both.apart < 1e-12


def ready() -> tuple[nn.Module, DDPNOpt, CapturedLoop, Any]:
    torch.manual_seed(0)
    net = NETS["dense"][0]().double()
    opt = DDPNOpt(net, lr=0.2, curvature="rmsprop")
    record = capture(opt, passes=True)
    for x, y in batches(NETS["dense"][1], 10):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    (plan,) = (plan for plan in record._plans.values() if plan.runs)
    opt.zero_grad()
    return net, opt, record, plan


def alike(state: dict[str, Tensor], net: nn.Module) -> bool:
    return all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_nothing_has_changed_before_the_step() -> None:
    net, opt, _, plan = ready()
    x, y = batches(NETS["dense"][1], 1)[0]
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert alike(before, net)
    again = copy.deepcopy(opt.state_dict())["state"]
    torch.testing.assert_close(again, state["state"], rtol=0, atol=0)
    opt.zero_grad()  # thrown away: no step is taken
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    assert alike(before, net)


def test_an_interrupted_backward_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, opt, _, plan = ready()
    x, y = batches(NETS["dense"][1], 1)[0]
    phase, before = plan.phases.phases[1], copy.deepcopy(net.state_dict())
    run = phase._run

    def interrupted(*tensors: Tensor) -> Any:
        run(*tensors)
        raise KeyboardInterrupt

    loss = F.cross_entropy(net(x), y)
    monkeypatch.setattr(phase, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert alike(before, net)
    monkeypatch.undo()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    assert not alike(before, net)


def test_an_interrupt_in_a_step_that_is_known_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, opt, record, plan = ready()
    twin = copy.deepcopy(net)
    x, y = batches(NETS["dense"][1], 1)[0]
    F.cross_entropy(net(x), y).backward()
    settle, times = plan.settle, []

    def interrupted() -> None:
        settle()
        times.append(1)
        if len(times) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(plan, "settle", interrupted)
    replayed = record.replayed
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert len(times) == 2 and record.replayed == replayed + 1
    assert apart(net, twin) > 1e-4


def test_a_factorisation_that_fails_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Twins("convolutions", lr=0.05, curvature=EKFAC(decay=0.5, update_every=3))
    both.train(40)
    (plan, *others) = (plan for plan in both.record._plans.values() if plan.runs)
    assert both.record.replayed > 5

    def fails(*tensors: Tensor) -> Any:
        raise LinAlgError("not positive definite")

    for one in (plan, *others):
        monkeypatch.setattr(one.phases.phases[1], "_run", fails)
    replayed = both.record.replayed
    both.train(4)
    assert both.record.replayed == replayed and both.apart < 1e-11


# Operators that write beside tensors ---------------------------------------------------------

Body = Callable[[Tensor, Tensor, Tensor], Tensor]


def in_place(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    y = p @ x
    p.sub_(y @ x.t())
    return p @ x + y


def through_views(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    flat = p.view(-1)
    row = p.t()[1]
    before = row.sum()
    flat[::2].mul_(0.5)
    return row + before + flat.sum()


def both_at_once(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    torch._foreach_mul_([p, q], 0.9)
    torch._foreach_sub_([p, q], [q, p])
    return p - q.t()


def only_one(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    old = q.clone()
    q.add_(p).clamp_(-1.0, 1.0)
    return old - q @ x


BODIES: list[Body] = [in_place, through_views, both_at_once, only_one]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 5), order=st.permutations(range(len(BODIES))), count=st.integers(1, 4))
def test_operators_beside_tensors_make_what_they_make_in_place(
    size: int, order: list[int], count: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    p, q, x = (torch.randn(size, size, generator=generator).double() for _ in range(3))
    start = [t.clone() for t in (p, q, x)]
    tracer = Tracer()
    known = [tracer.value(t) for t in (p, q, x)]
    with torch.no_grad(), tracer:
        made = [BODIES[i](p, q, x) for i in order[:count]]
    results = [tracer.value(t) for t in made]
    written = {v.storage for call in tracer.calls for v in call.written}
    rooms = {v: Value(10_000 + i, -1 - i, 2) for i, v in enumerate(known) if v.storage in written}
    makers = {v: call for call in tracer.calls[::-1] for v in call.outputs}
    calls, asked = beside(tracer.calls, results, rooms, {}, makers)
    given = [*known, *rooms.values()]
    room = [torch.full((size, size), torch.nan).double() for _ in rooms]
    again = [t.clone() for t in start]
    others = [v for v in tracer.externals if v not in known]
    graph = graph_of([*given, *others], calls, asked, native=True)
    found = graph(*again, *room, *(tracer.externals[v] for v in others))
    torch.testing.assert_close(list(found), made)
    torch.testing.assert_close(again, start, rtol=0, atol=0)  # not written to
    for place, v in enumerate(rooms):
        torch.testing.assert_close(room[place], (p, q, x)[known.index(v)])
