# SPDX-License-Identifier: MIT
"""Plain loops whose passes and steps are run from a record are the plain loops."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

from ddpnopt import (
    CapturedLoop,
    DDPNOpt,
    DDPNOptWarning,
    Feedback,
    NonFiniteError,
    UnsupportedModelError,
    capture,
    rows,
)
from ddpnopt.captured import records
from ddpnopt.captured.compiling import Compiled
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.curvature import EKFAC, KFAC
from oracles import graph_nets
from oracles.effort import crossed
from oracles.recorded import (
    CLASSES,
    INNER,
    KRONECKER,
    NETS,
    OPTIONS,
    STEPS,
    apart,
    batches,
    counts,
    dense_net,
    model,
    plain,
)

pytestmark = pytest.mark.filterwarnings("ignore:each sample is weighted once")
FED = [name for name in OPTIONS if name not in ("dense", "off")]


class Twins:
    """A net and its twin; the latter's loop is recorded."""

    def __init__(self, build: Callable[[], nn.Module], make: Callable[[nn.Module], Any]) -> None:
        self.nets = []
        for _ in range(2):
            torch.manual_seed(0)
            self.nets.append(build().double())
        self.optimizers = [make(net) for net in self.nets]
        self.record = capture(self.optimizers[1], passes=True)

    @property
    def pairs(self) -> list[tuple[nn.Module, Any]]:
        return list(zip(self.nets, self.optimizers, strict=True))

    @property
    def apart(self) -> float:
        return apart(*self.nets)

    def train(self, data: list[tuple[Tensor, Tensor]], decay: float = 1.0) -> None:
        for x, y in data:
            losses = [plain(opt, net, x, y) for net, opt in self.pairs]
            torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
            for _, opt in self.pairs:
                for group in opt.param_groups:
                    group["lr"] *= decay


def twins(name: str = "dense", **options: Any) -> Twins:
    return Twins(NETS[name][0], lambda net: DDPNOpt(net, **options))


@pytest.mark.parametrize(("name", "options"), crossed(NETS, FED))
def test_a_recorded_loop_is_the_loop(name: str, options: str) -> None:
    both = twins(name, **OPTIONS[options])
    both.train(batches(NETS[name][1], 2 * STEPS), decay=0.9)  # a scheduler: no new record
    record = both.record
    assert (record.reason, record.missed) == ("", 0)
    assert record.replayed >= 2 * STEPS - (9 if name == "BatchNorm" else 7)
    assert record.replayed + record.written == 2 * STEPS
    assert both.apart < 1e-9 if name == "BatchNorm" else both.apart < 1e-12
    for p, q in zip(*(net.parameters() for net in both.nets), strict=True):
        if p.grad is None or q.grad is None:
            assert p.grad is q.grad
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)
    reports = [opt.last_step for opt in both.optimizers]
    assert reports[0].terminal == reports[1].terminal
    for one, other in zip(*(report.layers for report in reports), strict=True):
        torch.testing.assert_close(one.S, other.S, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "kind"), crossed([name for name in KRONECKER if name != "off"], [EKFAC, KFAC])
)
def test_kronecker_curvatures(kind: type[KFAC] | type[EKFAC], options: str) -> None:
    curvature = kind(decay=0.5, update_every=3)
    both = twins("convolutions", lr=0.05, curvature=curvature, **KRONECKER[options])
    both.train(batches(NETS["convolutions"][1], 40))
    assert (both.record.reason, both.record.missed) == ("", 0) and both.record.replayed > 20
    assert counts(both.optimizers[0]) == counts(both.optimizers[1])
    assert both.apart < 1e-11


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("inner", INNER)
def test_around_torch_optimizers(inner: str, feedback: bool | str) -> None:
    build, shape = NETS["dense"]
    both = Twins(
        build, lambda m: Feedback(m, INNER[inner](list(m.parameters())), feedback=feedback)
    )
    both.train(batches(shape, 2 * STEPS))
    assert both.record.reason == "" and both.record.replayed >= STEPS
    assert both.apart < 1e-12


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", sorted(graph_nets.NETS))
def test_networks_that_are_no_chain(name: str, feedback: bool | str) -> None:
    _, inputs = graph_nets.net(name)
    both = Twins(
        lambda: graph_nets.net(name)[0], lambda net: DDPNOpt(net, lr=0.1, feedback=feedback)
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(2 * STEPS):
        some = [
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t
            for t in inputs
        ]
        labels = torch.randint(3, (len(some[0]),), generator=generator)
        for net, opt in both.pairs:
            opt.zero_grad()
            F.cross_entropy(net(*some), labels).backward()
            opt.step()
    assert (both.record.reason, both.record.missed) == ("", 0) and both.record.replayed >= STEPS
    assert both.apart < 1e-12


@pytest.mark.parametrize("options", ["closed loop", "no weight gradients", "open loop"])
def test_dropout_is_drawn_as_by_the_code(options: str) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, CLASSES))
        opt = DDPNOpt(net.double(), **OPTIONS[options])
        record = capture(opt, passes=True) if recorded else None
        torch.manual_seed(1)
        for x, y in batches((5,), 2 * STEPS):
            plain(opt, net, x, y)
        ends.append((net, torch.rand(()), record))
    (net, after, _), (twin, later, record) = ends
    assert record is not None and record.reason == "" and record.replayed >= STEPS
    assert apart(net, twin) < 1e-12
    assert after == later  # the generator is where it would be


@settings(max_examples=10, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    samples=st.integers(2, 9),
    lr=st.floats(1e-3, 10),
    feedback=st.sampled_from([True, "open_loop"]),
)
def test_any_dense_net(widths: list[int], samples: int, lr: float, feedback: bool | str) -> None:
    both = Twins(lambda: dense_net(widths), lambda net: DDPNOpt(net, lr=lr, feedback=feedback))
    for x, y in batches((3,), 9, samples):
        for net, opt in both.pairs:
            plain(opt, net, x, y)
    assert both.record.reason == ""
    assert both.apart < 1e-9  # a step at an absurd rate enlarges rounding


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_clipped_gradients_are_stepped_on_as_the_code_does(feedback: bool | str) -> None:
    both = twins(lr=0.3, feedback=feedback)
    for turn, (x, y) in enumerate(batches(NETS["dense"][1], 3 * STEPS)):
        for net, opt in both.pairs:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if turn % 5 == 4:
                nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            opt.step()
        assert both.optimizers[0].last_step.rescale == pytest.approx(
            both.optimizers[1].last_step.rescale
        )
    assert both.record.reason == "" and both.record.replayed >= STEPS
    assert both.apart < 1e-12


def test_gradients_that_hold_more_are_not_recorded() -> None:
    both = twins(lr=0.3)
    for x, y in batches(NETS["dense"][1], 2 * STEPS):
        for net, opt in both.pairs:
            opt.zero_grad()
            penalty = sum(p.square().sum() for p in net.parameters())
            (F.cross_entropy(net(x), y) + 0.01 * penalty).backward()
            opt.step()
    assert both.record.reason == "p.grad is changed before the step"
    assert both.apart < 1e-12


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_accumulated_passes(feedback: bool | str) -> None:
    both = twins(lr=0.3, feedback=feedback)
    data = batches(NETS["dense"][1], 30)
    for turn in range(len(data)):
        some = data[turn : turn + 1 + (turn % 4 == 3)]
        for net, opt in both.pairs:
            opt.zero_grad()
            for x, y in some:
                (F.cross_entropy(net(x), y) / len(some)).backward()
            opt.step()
    assert both.record.reason == "" and both.record.replayed > 10
    assert both.apart < 1e-12


def test_passes_that_are_always_several_are_given_up() -> None:
    both = twins(lr=0.3)
    both.train(batches(NETS["dense"][1], 10))
    with pytest.warns(DDPNOptWarning, match="several passes belong to a step"):
        for x, y in batches(NETS["dense"][1], 10):
            for net, opt in both.pairs:
                opt.zero_grad()
                for _ in range(2):
                    F.cross_entropy(net(x), y).backward()
                opt.step()
    assert both.apart < 1e-12


def test_two_losses_on_one_pass() -> None:
    both = twins(lr=0.3)
    for turn, (x, y) in enumerate(batches(NETS["dense"][1], 2 * STEPS)):
        for net, opt in both.pairs:
            opt.zero_grad()
            z = net(x)
            if turn % 3 == 2:
                (0.5 * F.cross_entropy(z, y)).backward(retain_graph=True)
                (0.5 * F.cross_entropy(z, y)).backward()
            else:
                F.cross_entropy(z, y).backward()
            opt.step()
    assert both.record.reason == "" and both.record.replayed > 5
    assert both.apart < 1e-12


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_large_outputs(feedback: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.CHUNK, "cpu", 20)  # as of a language model's logits
    both = twins(lr=0.3, feedback=feedback)
    both.train(batches(NETS["dense"][1], 2 * STEPS))
    assert (both.record.reason, both.record.missed) == ("", 0) and both.record.replayed > STEPS
    assert both.apart < 1e-12


class Tail(nn.Module):
    """Returns the logits, and what they are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).tanh()
        return {"h": h, "z": self.b(h)}


@pytest.mark.filterwarnings("ignore:the loss was not recognised")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_losses_of_changing_outputs(feedback: bool | str) -> None:
    both = Twins(Tail, lambda net: DDPNOpt(net, lr=0.2, feedback=feedback))
    with warnings.catch_warnings():  # in closed loop the structure is never found out for good
        warnings.filterwarnings("ignore", "capture: the model's structure")
        for turn, (x, y) in enumerate(batches((5,), 60)):
            for net, opt in both.pairs:
                opt.zero_grad()
                out = net(x)
                loss = F.cross_entropy(out["z"], y)
                if turn % 4 == 3:
                    loss = loss + out["h"].square().mean()
                loss.backward()
                opt.step()
    assert both.record.replayed > 10 or feedback is True
    assert both.apart < 1e-12


class WithLoss(nn.Module):
    """Returns the loss, as some libraries' models do, and the logits that it is made from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.b(self.a(x).tanh())
        return F.cross_entropy(z, labels), z


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_models_that_return_their_loss(feedback: bool | str) -> None:
    both = Twins(WithLoss, lambda net: DDPNOpt(net, lr=0.2, feedback=feedback))
    for x, y in batches((5,), 2 * STEPS):
        for net, opt in both.pairs:
            opt.zero_grad()
            loss, z = net(x, labels=y)
            assert z.shape == (6, CLASSES)
            loss.backward()
            opt.step()
    assert both.record.reason == "" and both.record.replayed >= STEPS
    assert both.apart < 1e-12


def test_gradients_that_are_only_asked_for_do_not_count() -> None:
    both = twins(lr=0.3)
    for x, y in batches(NETS["dense"][1], 2 * STEPS):
        for net, opt in both.pairs:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if both.record.replayed:
                torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            loss.backward()
            opt.step()
    assert both.record.reason == "" and both.record.replayed > STEPS
    assert both.apart < 1e-12


def test_passes_without_a_step_and_evaluation_in_between() -> None:
    both = twins("BatchNorm", lr=0.2)
    data = batches(NETS["BatchNorm"][1], 3 * STEPS)
    for turn, (x, y) in enumerate(data):
        for net, opt in both.pairs:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if turn % 3 == 1:
                net.zero_grad()  # this batch is left out
                continue
            opt.step()
            net.eval()
            with torch.no_grad():
                net(x)
            net(x).sum()  # under gradients, without a backward pass
            net.train()
    assert both.record.reason == ""
    assert both.apart < 1e-9


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("options", ["closed loop", "open loop", "no weight gradients"])
def test_numbers_that_are_not_finite_change_nothing(options: str, nonfinite: str) -> None:
    net, shape = model()
    opt = DDPNOpt(net, **OPTIONS[options], momentum=0.9, nonfinite=nonfinite)
    record = capture(opt, passes=True)
    data = batches(shape, 16)
    for x, y in data[:10]:
        plain(opt, net, x, y)
    assert record.replayed > 0
    before = copy.deepcopy(net.state_dict())
    x, y = data[10]
    spoilt = x.clone()
    spoilt[0, 0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="the gradient at"):
            plain(opt, net, spoilt, y)
    else:
        plain(opt, net, spoilt, y)
        assert opt.skipped == 1
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    for x, y in data[11:]:
        plain(opt, net, x, y)
    assert record.replayed > 5


def trained(steps: int = 10, **options: Any) -> tuple[nn.Module, DDPNOpt, CapturedLoop]:
    net, shape = model()
    opt = DDPNOpt(net, **{"lr": 0.3, **options})
    record = capture(opt, passes=True)
    for x, y in batches(shape, steps):
        plain(opt, net, x, y)
    assert record.replayed > 0
    return net, opt, record


def test_weights_that_have_moved_since_the_pass_are_refused() -> None:
    net, opt, _ = trained()
    x, y = batches((5,), 1)[0]
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(UnsupportedModelError, match="weights were changed between"):
        opt.step()


@pytest.mark.parametrize("when", ["before backward", "before the step"])
def test_an_argument_that_is_overwritten_is_refused(when: str) -> None:
    net, opt, _ = trained()
    x, y = batches((5,), 1)[0]
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    if when == "before backward":
        x.zero_()
        with pytest.raises(UnsupportedModelError, match="input tensor 0"):
            loss.backward()
        return
    loss.backward()
    x.zero_()
    with pytest.raises(UnsupportedModelError, match="input tensor 0"):
        opt.step()


def test_outputs_may_be_written_to() -> None:
    both = twins(lr=0.3)
    both.train(batches(NETS["dense"][1], 10))
    x, y = batches((5,), 1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DDPNOptWarning)
        for net, opt in both.pairs:
            opt.zero_grad()
            z = net(x)
            z.mul_(0.5)
            F.cross_entropy(z, y).backward()
            opt.step()
    assert both.apart < 1e-12


def test_a_second_step_needs_a_second_pass() -> None:
    _, opt, _ = trained()
    with pytest.raises(RuntimeError, match="without a backward pass"):
        opt.step()


def test_closures() -> None:
    both = twins(lr=0.3)
    for x, y in batches(NETS["dense"][1], 14):
        for net, opt in both.pairs:

            def closure(
                net: nn.Module = net, opt: DDPNOpt = opt, x: Tensor = x, y: Tensor = y
            ) -> Any:
                opt.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    assert both.apart < 1e-12


class Switched(nn.Module):
    """Its way depends on an attribute that no record can see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.steep = nn.Linear(5, 8), nn.Linear(8, CLASSES), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b((3 * h if self.steep else h).tanh())


def test_what_a_record_can_not_see_is_found_before_long() -> None:
    torch.manual_seed(0)
    net = Switched().double()
    opt = DDPNOpt(net, lr=0.2)
    record = capture(opt, passes=True)
    data = batches((5,), 130)
    for x, y in data[:20]:
        plain(opt, net, x, y)
    net.steep = True
    with pytest.warns(DDPNOptWarning, match="a recorded iteration differs from the code"):
        for x, y in data[20:]:
            plain(opt, net, x, y)
    assert record.replayed == 100 and "differs" in record.reason


def test_a_part_that_is_replaced_voids_the_records() -> None:
    both = Twins(Switched, lambda net: DDPNOpt(net, lr=0.2))
    both.train(batches((5,), 20))
    for net, opt in both.pairs:
        torch.manual_seed(3)
        net.b = nn.Linear(8, CLASSES).double()
        opt.add_param_group({"params": list(net.b.parameters())})
    both.train(batches((5,), 20))
    assert both.record.reason == "" and both.record.replayed > 20
    assert both.apart < 1e-12


def test_the_last_batch_may_be_smaller() -> None:
    both = twins(lr=0.3)
    for _ in range(12):
        both.train(batches(NETS["dense"][1], 2) + batches(NETS["dense"][1], 1, samples=4))
    assert both.record.reason == "" and both.record.replayed >= 24
    assert both.apart < 1e-12


def test_hooks_on_modules_are_called() -> None:
    both = twins(lr=0.3)
    seen: list[int] = []
    both.nets[1][2].register_forward_hook(lambda *given: seen.append(1))
    with pytest.warns(DDPNOptWarning, match="a Linear has hooks"):
        both.train(batches(NETS["dense"][1], STEPS))
    assert both.record.replayed == 0 and len(seen) >= STEPS
    assert both.apart < 1e-14


def test_it_can_be_taken_off() -> None:
    both = twins(lr=0.3)
    both.train(batches(NETS["dense"][1], 10))
    count = both.record.replayed
    both.record.remove()
    both.record.remove()
    assert "forward" not in vars(both.nets[1])
    both.train(batches(NETS["dense"][1], 10))
    assert both.record.replayed == count > 0
    assert both.apart < 1e-12


def test_copies_and_pickles_have_no_record() -> None:
    net, opt, _ = trained()
    twin, other = copy.deepcopy((net, opt))
    third = pickle.loads(pickle.dumps(net))
    x, y = batches((5,), 1)[0]
    assert torch.equal(twin(x), net(x)) and torch.equal(third(x), net(x))
    for one, optimizer in ((net, opt), (twin, other)):
        plain(optimizer, one, x, y)
    assert other.engine.shortcut is None
    assert apart(net, twin) < 1e-13


def test_a_recorded_optimizer_that_is_dropped_leaves_the_model_alone() -> None:
    net, opt, record = trained()
    x, y = batches((5,), 1)[0]
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    del opt, record
    assert "forward" not in vars(net)
    with pytest.raises(RuntimeError, match="the optimizer of this pass is gone"):
        loss.backward()
    F.cross_entropy(net(x), y).backward()


def test_losses_whose_recognition_reads_numbers_run_as_they_are_written() -> None:
    both = twins(lr=0.2)
    with pytest.warns(DDPNOptWarning, match=r"fitted to the.*capture\(opt\) without passes"):
        for x, y in batches(NETS["dense"][1], STEPS):
            for net, opt in both.pairs:
                opt.zero_grad()
                F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
                opt.step()
    assert both.record.replayed == 0 and both.apart < 1e-14


def test_without_feedback_there_is_nothing_to_record() -> None:
    both = twins(lr=0.1, feedback=False)
    with pytest.warns(DDPNOptWarning, match="feedback is off"):
        both.train(batches(NETS["dense"][1], 5))
    assert both.apart == 0


def test_an_interrupted_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, opt, record = trained()
    for x, y in batches((5,), 15):  # p.grad is there: the step is a part of its own
        opt.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), y).backward()
        opt.step()
    (plan,) = (plan for plan in record._plans.values() if plan.runs)
    phase = plan.phases.phases[2]
    run = phase._run

    def interrupted(*tensors: Tensor) -> Any:
        run(*tensors)
        raise KeyboardInterrupt

    opt.zero_grad(set_to_none=False)
    F.cross_entropy(net(x), y).backward()
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setattr(phase, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_loss_function_and_passes_are_refused() -> None:
    net, _ = model()
    with pytest.raises(TypeError, match="not both"):
        capture(DDPNOpt(net), lambda x: net(x).sum(), passes=True)  # type: ignore[call-overload]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler")
def test_compiled() -> None:
    build, shape = NETS["convolutions"]
    nets = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = build()
        opt = DDPNOpt(net, lr=0.5)
        record = capture(opt, passes=True, compile=True) if recorded else None
        for x, y in batches(shape, STEPS):
            plain(opt, net, x.float(), y)
        nets.append(net)
    assert isinstance(record, CapturedLoop) and record.compiles and record.replayed > 5
    assert apart(*nets) < 1e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler")
@pytest.mark.skipif(
    "ignore_shape_env" not in signature(compile_fx).parameters, reason="this torch keeps nothing"
)
@pytest.mark.parametrize("options", ["momentum, decay", "adamw, open loop"])
def test_what_is_compiled_is_kept_for_the_next_training(options: str) -> None:
    found = []
    for seed in range(2):  # like two processes: nothing is kept here but on disk
        before = Counter(counters["inductor"] + counters["aot_autograd"])
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        opt = DDPNOpt(net, **OPTIONS[options])
        twin = copy.deepcopy(net)
        other = DDPNOpt(twin, **OPTIONS[options])
        record = capture(opt, passes=True, compile=True)
        for x, y in batches((5,), STEPS):
            plain(opt, net, x.float(), y)
            plain(other, twin, x.float(), y)
        assert record.compiles and record.replayed > 5 and apart(net, twin) < 1e-5
        found.append(counters["inductor"] + counters["aot_autograd"] - before)
        assert found[-1]["autograd_cache_hit"] == 0
        (plan,) = record._plans.values()
        assert isinstance(plan, PhasedPlan)
        for program in (phase._run for phase in plan.phases.phases):
            assert isinstance(program, Compiled) and program._run is not None
            assert program._run.__module__ != Compiled.__module__  # torch's own kernels
        torch._dynamo.reset()
    assert found[1]["fxgraph_cache_miss"] == 0 and found[1]["fxgraph_cache_hit"] > 1
    assert all(one["fxgraph_cache_bypass"] == 0 for one in found)


def moved(net: nn.Module, opt: Any) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.data = p.data.clone()


def replaced(net: nn.Module, opt: Any) -> None:
    """By others; what autograd has kept of a pass is as before."""
    with torch.no_grad():
        for p in net.parameters():
            p.data = 1.3 * p.data


def evaluated(net: nn.Module, opt: Any) -> None:
    net.eval()
    net(batches((5,), 1)[0][0])  # under gradients
    net.train()


def counted(net: nn.Module, opt: Any) -> None:
    with torch.no_grad():
        net(batches((5,), 1)[0][0])  # its running means move on


def loaded(net: nn.Module, opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def reset(net: nn.Module, opt: Any) -> None:
    net[1].reset_running_stats()


BETWEEN = {one.__name__: one for one in (moved, replaced, evaluated, counted, loaded, reset)}


@pytest.mark.parametrize("before", ["backward", "the step"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("event", BETWEEN)
def test_what_happens_between_the_passes_and_the_step(
    event: str, feedback: bool | str, before: str
) -> None:
    if event == "reset" and before == "backward":
        pytest.skip("autograd itself refuses that")
    both = twins("BatchNorm", lr=0.3, feedback=feedback)
    for turn, (x, y) in enumerate(batches((5,), 30)):
        for net, opt in both.pairs:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if turn in (17, 23) and before == "backward":
                BETWEEN[event](net, opt)
            loss.backward()
            if turn in (17, 23) and before == "the step":
                BETWEEN[event](net, opt)
            opt.step()
    assert both.record.replayed > 5 and both.record.reason == ""
    assert both.apart < 1e-9


@pytest.mark.parametrize("turn", [4, 5, 9])  # recorded, compared, run from the record
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_gradients_of_weights_that_are_replaced_before_backward(
    name: str, feedback: bool | str, turn: int
) -> None:
    both = twins(name, lr=0.3, feedback=feedback)
    data = batches(NETS[name][1], turn + 1)
    both.train(data[:-1])
    x, y = data[-1]
    for net, opt in both.pairs:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        replaced(net, opt)
        loss.backward()
    for p, q in zip(*(net.parameters() for net in both.nets), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for opt in both.optimizers:
        opt.step()
    assert both.apart < 1e-12


def test_a_replacement_of_weights_survives_a_pass_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, opt, record = trained()
    x, y = batches((5,), 1)[0]
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    replaced(net, opt)
    before = [(p.data_ptr(), p.detach().clone()) for p in net.parameters()]

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(record._rerun, "_again", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    for p, (place, value) in zip(net.parameters(), before, strict=True):
        assert p.data_ptr() == place and torch.equal(p, value)


@pytest.mark.parametrize("ignored", [range(4, 6), range(4, 9), range(3, 12, 2)])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_batches_of_ignored_labels_are_left_to_other_recordings(
    feedback: bool | str, ignored: range
) -> None:
    both = twins(lr=0.3, feedback=feedback)
    for turn, (x, y) in enumerate(batches((5,), 24)):
        labels = torch.full_like(y, -100) if turn in ignored else y
        for net, opt in both.pairs:
            plain(opt, net, x, labels)
    assert both.record.reason == "" and both.record.replayed > 10
    assert both.apart < 1e-12


def test_nothing_but_ignored_labels_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "POSTPONED", 5)
    net, _ = model()
    opt = DDPNOpt(net, lr=0.3)
    record = capture(opt, passes=True)
    data = batches((5,), 12)
    for x, y in data[:4]:
        plain(opt, net, x, y)
    with pytest.warns(DDPNOptWarning, match="capture: too many batches show nothing of their loss"):
        for x, y in data[4:]:
            plain(opt, net, x, torch.full_like(y, -100))
    assert "all labels are ignored" in record.reason


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_two_passes_in_one_loss(feedback: bool | str) -> None:
    both = twins("BatchNorm" if feedback is True else "dense", lr=0.3, feedback=feedback)
    for turn, (x, y) in enumerate(batches((5,), 30)):
        for net, opt in both.pairs:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if turn == 20:
                loss = loss + F.cross_entropy(net(x + 1), y)
            loss.backward()
            opt.step()
    assert both.record.replayed > 5 and both.record.reason == ""
    # In open loop each pass of such a loss is weighted by itself.
    assert both.apart < (1e-9 if feedback is True else 1e-3)


def test_a_pass_that_is_run_again_leaves_the_buffers_alone() -> None:
    both = twins("BatchNorm", lr=0.3)
    for turn, (x, y) in enumerate(batches((5,), 30)):
        for net, opt in both.pairs:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if turn in (17, 23):
                nn.utils.clip_grad_norm_(net.parameters(), 0.01)
                counted(net, opt)
            opt.step()
    assert both.record.missed == 2
    assert both.apart < 1e-9


def test_a_detached_optimizer_takes_plain_steps() -> None:
    both = twins(lr=0.3)
    both.train(batches((5,), 12))
    x, y = batches((5,), 1)[0]
    for net, opt in both.pairs:
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.detach()
        opt.step()
    both.train(batches((5,), 3))
    assert both.apart < 1e-12


@pytest.mark.parametrize("before", ["backward", "the step"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_it_can_be_taken_off_in_the_middle(feedback: bool | str, again: bool, before: str) -> None:
    both = twins(lr=0.3, feedback=feedback)
    both.train(batches((5,), 12))
    assert both.record.replayed > 0
    x, y = batches((5,), 1)[0]
    for net, opt in both.pairs:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if before == "the step":
            loss.backward()
        if opt is both.optimizers[1]:
            if again:
                capture(opt)
            else:
                both.record.remove()
        if before == "backward":
            loss.backward()
        opt.step()
    both.train(batches((5,), 10))
    assert both.apart < 1e-12


def test_a_pass_that_is_differentiated_twice_says_the_way_out() -> None:
    net, opt, record = trained()
    x, y = batches((5,), 1)[0]

    def step() -> None:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + 0.01 * sum(g.square().sum() for g in grads)).backward()
        opt.step()

    with pytest.raises(RuntimeError, match=r"can't be differentiated twice.*capture\(opt\)"):
        step()
    assert "create_graph" in record.reason
    step()


def test_a_step_that_was_refused_can_be_taken_again() -> None:
    both = twins(lr=0.3)
    both.train(batches((5,), 12))
    x, y = batches((5,), 1)[0]
    for net, opt in both.pairs:
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
    rate = both.optimizers[1].param_groups[0]["lr"]
    both.optimizers[1].param_groups[0]["lr"] = "no number"
    with pytest.raises(ValueError):
        both.optimizers[1].step()
    both.optimizers[1].param_groups[0]["lr"] = rate
    for opt in both.optimizers:
        opt.step()
    assert both.apart < 1e-12
