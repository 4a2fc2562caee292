# SPDX-License-Identifier: MIT
"""Plain loops whose steps are run from a record are the plain loops."""

from __future__ import annotations

import copy
import gc
import math
import shutil
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ddpnopt
from ddpnopt import (
    CapturedUpdate,
    DDPNOpt,
    DDPNOptWarning,
    Feedback,
    NonFiniteError,
    UnsupportedModelError,
    capture,
)
from ddpnopt.curvature import EKFAC, KFAC
from ddpnopt.report import StepReport
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

Loss = Callable[[Tensor, Tensor], Tensor]


def pair(name: str = "dense", **options: Any) -> tuple[nn.Module, nn.Module, DDPNOpt, DDPNOpt]:
    """A net and its twin, and their optimizers."""
    (net, _), (twin, _) = model(name), model(name)
    return net, twin, DDPNOpt(net, **options), DDPNOpt(twin, **options)


def one_step(
    opt: torch.optim.Optimizer, net: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
) -> None:
    opt.zero_grad()
    loss(net(x), y).backward()
    opt.step()


def same_reports(a: StepReport | None, b: StepReport | None) -> None:
    assert a is not None and b is not None
    assert (a.depth, a.terminal, a.samples) == (b.depth, b.terminal, b.samples)
    assert (a.plain, a.skipped) == (b.plain, b.skipped)
    assert [one.name for one in a.layers] == [one.name for one in b.layers]
    fronts = [(a.front, b.front)] if a.front is not None and b.front is not None else []
    assert (a.front is None) == (b.front is None)
    for one, other in (*zip(a.layers, b.layers, strict=True), *fronts):
        for field in ("coefficient", "S"):
            torch.testing.assert_close(
                getattr(one, field), getattr(other, field), rtol=1e-7, atol=1e-9
            )


@pytest.mark.parametrize(
    ("name", "options"), crossed(NETS, [name for name in OPTIONS if name != "dense"], start=1)
)
def test_a_recorded_step_is_the_code(name: str, options: str) -> None:
    net, twin, opt, other = pair(name, **OPTIONS[options])
    record = capture(other)
    for x, y in batches(NETS[name][1], 2 * STEPS):
        expected = plain(opt, net, x, y)
        torch.testing.assert_close(plain(other, twin, x, y), expected, rtol=1e-9, atol=1e-12)
        same_reports(opt.last_step, other.last_step)
        for group in (*opt.param_groups, *other.param_groups):
            group["lr"] *= 0.9  # a scheduler: no new record
    assert (record.reason, record.missed) == ("", 0)
    # Four to begin with, of which the first may be another kind, one recorded, one compared; where
    # samples are mixed the boundary is found out first.
    assert record.replayed >= 2 * STEPS - (9 if name == "BatchNorm" else 7)
    assert record.replayed + record.written == 2 * STEPS
    assert apart(net, twin) < 1e-9 if name == "BatchNorm" else apart(net, twin) < 1e-13


@pytest.mark.parametrize(("options", "kind"), crossed(KRONECKER, [KFAC, EKFAC]))
def test_kronecker_curvatures(kind: type[KFAC] | type[EKFAC], options: str) -> None:
    curvature = kind(decay=0.5, update_every=3)
    net, twin, opt, other = pair("convolutions", lr=0.05, curvature=curvature, **KRONECKER[options])
    record = capture(other)
    for x, y in batches(NETS["convolutions"][1], 40):
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert (record.reason, record.missed) == ("", 0) and record.replayed > 20
    assert counts(opt) == counts(other)
    assert apart(net, twin) < 1e-11


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize("inner", INNER)
def test_around_torch_optimizers(inner: str, feedback: bool | str) -> None:
    (net, shape), (twin, _) = model(), model()
    opt = Feedback(net, INNER[inner](list(net.parameters())), feedback=feedback)
    other = Feedback(twin, INNER[inner](list(twin.parameters())), feedback=feedback)
    record = capture(other)
    for x, y in batches(shape, 2 * STEPS):
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert record.reason == "" and record.replayed >= STEPS
    assert apart(net, twin) < 1e-13


# Where the passes are recorded, too, it is every network in both loops.
@pytest.mark.parametrize(
    ("name", "feedback"), crossed(sorted(graph_nets.NETS), [True, "open_loop"])
)
def test_networks_that_are_no_chain(name: str, feedback: bool | str) -> None:
    (net, inputs), (twin, _) = graph_nets.net(name), graph_nets.net(name)
    opt, other = (DDPNOpt(one, lr=0.1, feedback=feedback) for one in (net, twin))
    record = capture(other)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2 * STEPS):
        given = [
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t
            for t in inputs
        ]
        labels = torch.randint(3, (len(given[0]),), generator=generator)
        for one, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            F.cross_entropy(one(*given), labels).backward()
            optimizer.step()
    assert (record.reason, record.missed) == ("", 0) and record.replayed >= STEPS
    same_reports(opt.last_step, other.last_step)
    assert apart(net, twin) < 1e-12


class Encoder(nn.Module):
    """A transformer's layer between two dense ones, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Linear(1, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x[..., None])).mean(1))


@pytest.mark.parametrize("options", ["closed loop", "no weight gradients", "open loop", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_drawn_again(dropout: float, options: str) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = Encoder(dropout).double()
        opt = DDPNOpt(net, **OPTIONS[options])
        record = capture(opt) if recorded else None
        torch.manual_seed(1)
        for x, y in batches((5,), 2 * STEPS):
            one_step(opt, net, x, y)
        ends.append((net, torch.rand(()), record))
    (net, after, _), (twin, later, record) = ends
    assert record is not None and record.reason == "" and record.replayed >= STEPS
    assert apart(net, twin) < 1e-9
    assert after == later  # the generator is where it would be


LOSSES: dict[str, Loss] = {
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(z, y, z.new_tensor([1.0, 2.0, 0.5, 1.0])),
    "soft targets": lambda z, y: F.cross_entropy(z, torch.eye(CLASSES).to(z)[y] * 0.7 + 0.075),
    "logistic": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.eye(CLASSES).to(z)[y]),
    "unknown": lambda z, y: (z.logsumexp(1) - z[torch.arange(len(y)), y]).square().mean(),
}


@pytest.mark.filterwarnings("ignore:the loss was not recognised")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_any_loss(feedback: bool | str, loss: str) -> None:
    net, twin, opt, other = pair(lr=0.2, feedback=feedback)
    record = capture(other)
    for x, y in batches(NETS["dense"][1], 2 * STEPS):
        one_step(opt, net, x, y, LOSSES[loss])
        one_step(other, twin, x, y, LOSSES[loss])
        same_reports(opt.last_step, other.last_step)
    assert record.reason == "" and record.replayed >= STEPS
    assert apart(net, twin) < 1e-13


@settings(max_examples=10, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    samples=st.integers(2, 9),
    lr=st.floats(1e-3, 10),
    feedback=st.sampled_from([True, "open_loop"]),
)
def test_any_dense_net(widths: list[int], samples: int, lr: float, feedback: bool | str) -> None:
    net, twin = dense_net(widths), dense_net(widths)
    opt, other = (DDPNOpt(one, lr=lr, feedback=feedback) for one in (net, twin))
    record = capture(other)
    for x, y in batches((3,), 9, samples):
        one_step(opt, net, x, y)
        one_step(other, twin, x, y)
    assert record.reason == ""
    assert apart(net, twin) < 1e-9  # a step at an absurd rate enlarges rounding


def test_clipped_gradients_are_stepped_on_as_the_code_does() -> None:
    net, twin, opt, other = pair(lr=0.3)
    record = capture(other)
    for turn, (x, y) in enumerate(batches(NETS["dense"][1], 2 * STEPS)):
        for one, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            F.cross_entropy(one(x), y).backward()
            if turn % 3 == 2:
                nn.utils.clip_grad_norm_(one.parameters(), 0.01)
            optimizer.step()
        assert opt.last_step.rescale == pytest.approx(other.last_step.rescale)
    assert record.reason == "" and record.replayed >= 12
    assert apart(net, twin) < 1e-13


def test_gradients_that_are_changed_are_stepped_on() -> None:
    net, twin, opt, other = pair(lr=0.3)
    record = capture(other)
    for x, y in batches(NETS["dense"][1], 2 * STEPS):
        for one, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            F.cross_entropy(one(x), y).backward()
            for p in one.parameters():
                p.grad.clamp_(-0.01, 0.01)
            optimizer.step()
    assert record.reason == "" and record.replayed >= STEPS
    assert apart(net, twin) < 1e-13


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_accumulated_passes(feedback: bool | str) -> None:
    net, twin, opt, other = pair(lr=0.3, feedback=feedback)
    record = capture(other)
    data = batches(NETS["dense"][1], 30)
    for turn in range(len(data)):
        some = data[turn : turn + 1 + (turn % 4 == 3)]
        for one, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            for x, y in some:
                (F.cross_entropy(one(x), y) / len(some)).backward()
            optimizer.step()
    assert record.reason == ""
    assert record.replayed > (10 if feedback is True else 0)
    assert apart(net, twin) < 1e-13


def test_closures() -> None:
    net, twin, opt, other = pair(lr=0.3)
    record = capture(other)
    for x, y in batches(NETS["dense"][1], 12):
        plain(opt, net, x, y)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            other.zero_grad()
            loss = F.cross_entropy(twin(x), y)
            loss.backward()
            return loss

        other.step(closure)
    assert record.replayed == 0 and record.reason == ""
    assert apart(net, twin) == 0


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("options", ["closed loop", "open loop", "no weight gradients"])
def test_numbers_that_are_not_finite_change_nothing(options: str, nonfinite: str) -> None:
    net, shape = model()
    opt = DDPNOpt(net, **OPTIONS[options], momentum=0.9, nonfinite=nonfinite)
    record = capture(opt)
    data = batches(shape, 16)
    for x, y in data[:10]:
        one_step(opt, net, x, y)
    assert record.replayed > 0
    before = copy.deepcopy([*net.parameters()])
    momenta = copy.deepcopy([state["momentum_buffer"] for state in opt.state.values()])
    x, y = data[10]
    spoilt = x.clone()
    spoilt[0, 0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="the gradient at"):
            one_step(opt, net, spoilt, y)
    else:
        one_step(opt, net, spoilt, y)
        assert opt.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    now = [state["momentum_buffer"] for state in opt.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, now, strict=True))
    for x, y in data[11:]:
        one_step(opt, net, x, y)
    assert record.replayed > 5


def test_an_interrupted_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, shape = model("BatchNorm")
    opt = DDPNOpt(net, lr=0.5)
    record = capture(opt)
    data = batches(shape, 20)
    for x, y in data[:19]:
        one_step(opt, net, x, y)
    plans = [plan for plan in record._steps._plans.values() if plan.runs]
    assert len(plans) == 1
    function = plans[0]._function

    def interrupted(*given: Tensor) -> list[Tensor]:
        function(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(plans[0], "_function", interrupted)
    opt.zero_grad()
    F.cross_entropy(net(data[19][0]), data[19][1]).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_weights_that_have_moved_since_the_pass_are_refused() -> None:
    net, shape = model()
    opt = DDPNOpt(net, lr=0.5)
    record = capture(opt)
    data = batches(shape, 12)
    for x, y in data[:10]:
        one_step(opt, net, x, y)
    assert record.replayed > 0
    opt.zero_grad()
    F.cross_entropy(net(data[10][0]), data[10][1]).backward()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(UnsupportedModelError, match="'0' were changed between"):
        opt.step()


class Scaled(nn.Module):
    """Its first layer is not given the argument itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.between: nn.Module = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x / 2)))


def test_an_argument_that_is_overwritten_is_refused() -> None:
    torch.manual_seed(0)
    net = Scaled().double()
    opt = DDPNOpt(net, lr=0.2)
    record = capture(opt)
    data = batches((5,), 20)
    for x, y in data[:18]:
        one_step(opt, net, x, y)
    assert record.replayed > 0
    opt.zero_grad()
    x, y = data[18]
    F.cross_entropy(net(x), y).backward()
    x.copy_(data[19][0])
    with pytest.raises(UnsupportedModelError, match="input tensor 0"):
        opt.step()


def test_a_part_that_is_replaced_voids_the_records() -> None:
    nets = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = Scaled().double()
        opt = DDPNOpt(net, lr=0.2)
        record = capture(opt) if recorded else None
        for turn, (x, y) in enumerate(batches((5,), 50)):
            if turn == 20:
                net.between = nn.Sigmoid()
            one_step(opt, net, x, y)
        nets.append(net)
    assert record is not None and record.reason == "" and record.replayed > 20
    assert apart(*nets) < 1e-13


def test_a_warm_up_from_zero() -> None:
    nets = []
    for recorded in (False, True):
        net, shape = model("BatchNorm")
        opt = DDPNOpt(net, lr=0.1)
        record = capture(opt) if recorded else None
        for turn, (x, y) in enumerate(batches(shape, 40)):
            opt.param_groups[0]["lr"] = 0.1 * (turn // 10) / 4
            one_step(opt, net, x, y)
        nets.append(net)
    assert record is not None and record.replayed > 10
    assert apart(*nets) < 1e-11


def test_settings_that_change_void_the_records() -> None:
    net, twin, opt, other = pair("BatchNorm", lr=0.2, momentum=0.5)
    record = capture(other)
    for turn, (x, y) in enumerate(batches(NETS["BatchNorm"][1], 48)):
        if turn == 16:
            net.eval()
            twin.eval()
        if turn == 32:
            for group in (*opt.param_groups, *other.param_groups):
                group["momentum"] = 0.8
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert record.replayed > 20 and record.reason == ""
    assert apart(net, twin) < 1e-11


def test_frozen_layers() -> None:
    net, twin, opt, other = pair(lr=0.2)
    record = capture(other)
    for turn, (x, y) in enumerate(batches(NETS["dense"][1], 36)):
        for one in (net, twin):
            one[2].requires_grad_(turn < 12 or turn >= 24)
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert record.replayed > 12 and record.reason == ""
    assert apart(net, twin) < 1e-13


class Switched(nn.Module):
    """What it does between its layers is switched by hand: no record of a step can see that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.steep = nn.Linear(5, 8), nn.Linear(8, CLASSES), False

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * (2 if self.steep else 1)))


def test_what_a_record_can_not_see_is_found_before_long() -> None:
    torch.manual_seed(0)
    net = Switched().double()
    opt = DDPNOpt(net, lr=0.2)
    record = capture(opt)
    data = batches((5,), 130)
    for x, y in data[:20]:
        one_step(opt, net, x, y)
    net.steep = True
    with pytest.warns(DDPNOptWarning, match="a recorded step differs from the code"):
        for x, y in data[20:]:
            one_step(opt, net, x, y)
    assert record.replayed == 100 and "differs" in record.reason


def test_it_can_be_taken_off() -> None:
    net, twin, opt, other = pair(lr=0.2)
    record = capture(other)
    data = batches(NETS["dense"][1], 20)
    for x, y in data[:10]:
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    third = copy.deepcopy((twin, other))  # copies have no record
    count = record.replayed
    record.remove()
    record.remove()
    for x, y in data[10:]:
        plain(opt, net, x, y)
        plain(other, twin, x, y)
        plain(third[1], third[0], x, y)
    assert record.replayed == count > 0
    assert apart(net, twin) < 1e-13 and apart(net, third[0]) < 1e-13
    again = capture(other)
    for x, y in data:
        plain(other, twin, x, y)
    assert again.replayed > 10


def test_what_can_not_be_recorded_is_said_once_where_the_user_is() -> None:
    net, shape = model()
    opt = DDPNOpt(net, lr=0.2, value="dense")
    record = capture(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(shape):
            one_step(opt, net, x, y)
    (warning,) = (one for one in caught if str(one.message).startswith("capture:"))
    assert "neither the model's nor the pass's; steps run as they are written" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert record.replayed == 0 and record.written == STEPS


def test_the_rescaling_of_a_clipped_step_is_forgotten() -> None:
    net, twin, opt, other = pair(lr=0.3, feedback="open_loop")
    capture(other)
    for turn, (x, y) in enumerate(batches(NETS["dense"][1], 30)):
        for one, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            F.cross_entropy(one(x), y).backward()
            if turn % 5 == 4:
                nn.utils.clip_grad_norm_(one.parameters(), 0.01)
            optimizer.step()
        assert opt.engine.rescale == pytest.approx(other.engine.rescale, rel=1e-9)
    assert apart(net, twin) < 1e-13


def test_skipped_steps_are_counted_in_reports_from_the_record() -> None:
    net, shape = model()
    opt = DDPNOpt(net, lr=0.2, nonfinite="skip")
    record = capture(opt)
    for turn, (x, y) in enumerate(batches(shape, 20)):
        one_step(opt, net, x * (math.nan if turn == 12 else 1), y)
    assert record.replayed > 10
    assert opt.last_step is not None and opt.last_step.skipped == 1


def test_a_recorded_optimizer_that_is_dropped_leaves_the_model_alone() -> None:
    net, shape = model()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    opt = DDPNOpt(net, lr=0.2)
    record = capture(opt)
    gc.disable()  # it must not take a collection
    try:
        for x, y in batches(shape):
            one_step(opt, net, x, y)
        assert record.replayed > 0 and record.optimizer is opt
        alive = weakref.ref(opt.engine)
        del opt
        assert alive() is None and record.optimizer is None
    finally:
        gc.enable()
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    record.remove()


def test_sparse_gradients_run_as_they_are_written() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten(), nn.Linear(15, 4))

    nets = build().double(), build().double()
    opts = [DDPNOpt(net, lr=0.2) for net in nets]
    record = capture(opts[1])
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DDPNOptWarning)
        for _ in range(STEPS):
            x = torch.randint(9, (6, 3), generator=generator)
            y = torch.randint(4, (6,), generator=generator)
            for net, opt in zip(nets, opts, strict=True):
                one_step(opt, net, x, y)
    assert record.replayed == 0 and "sparse" in record.reason
    assert apart(*nets) < 1e-13


class Told(nn.Module):
    """Takes an argument that has no hash."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, how: bytearray) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * len(how))


def test_arguments_that_can_not_be_told_apart() -> None:
    torch.manual_seed(0)
    net = Told().double()
    opt = DDPNOpt(net, lr=0.2)
    record = capture(opt)
    with pytest.warns(DDPNOptWarning, match="can't be told from others"):
        for x, y in batches((5,)):
            opt.zero_grad()
            F.cross_entropy(net(x, bytearray(2)), y).backward()
            opt.step()
    assert record.written == STEPS


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_half_precision(feedback: bool | str, passes: bool) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        opt = DDPNOpt(net, lr=0.3, feedback=feedback)
        record = capture(opt, passes=True) if passes else capture(opt)
        if not recorded:
            record.remove()
        for x, y in batches((5,), 2 * STEPS):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x.float()), y)
            loss.backward()
            opt.step()
        ends.append((net, record))
    record = ends[1][1]
    assert record.reason == "" and record.replayed >= STEPS
    # The rate's own rounding to 32 bits turns roundings to bfloat16 (eps 8e-3) here and there.
    assert apart(ends[0][0], ends[1][0]) < 8e-3


def test_step_hooks_are_called() -> None:
    net, _, opt, _ = pair(lr=0.2)
    record, seen = capture(opt), []
    opt.register_step_pre_hook(lambda *given: seen.append("before"))
    opt.register_step_post_hook(lambda *given: seen.append("after"))
    for x, y in batches(NETS["dense"][1]):
        one_step(opt, net, x, y)
    assert record.replayed > 0 and seen == ["before", "after"] * STEPS


@pytest.mark.filterwarnings("ignore:capture")
def test_a_brake_runs_as_it_is_written() -> None:
    (net, shape), (twin, _) = model(), model()
    opt, other = (
        Feedback(one, torch.optim.SGD(one.parameters(), lr=0.5), mode="brake")
        for one in (net, twin)
    )
    capture(other)
    for x, y in batches(shape, 2 * STEPS):
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert apart(net, twin) < 1e-12


def test_a_torch_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a DDPNOpt or a Feedback, got SGD"):
        capture(torch.optim.SGD(model()[0].parameters(), lr=0.1))  # type: ignore[call-overload]


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
@pytest.mark.parametrize(
    ("name", "options"), [("dense", "closed loop"), ("convolutions", "adamw, open loop")]
)
def test_compiled(name: str, options: str) -> None:
    net, twin, opt, other = pair(name, **OPTIONS[options])
    record = capture(other, compile=True)
    assert isinstance(record, CapturedUpdate)
    for x, y in batches(NETS[name][1], 2 * STEPS):
        plain(opt, net, x, y)
        plain(other, twin, x, y)
    assert (record.reason, record.missed, record.compiles) == ("", 0, True)
    assert record.replayed >= STEPS
    assert apart(net, twin) < 1e-13


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_dropout_compiled() -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 4)).double()
        opt = DDPNOpt(net, lr=0.3)
        record = ddpnopt.capture(opt, compile=True) if recorded else None
        for x, y in batches((5,), STEPS):
            one_step(opt, net, x, y)
        ends.append((net, record))
    assert ends[1][1] is not None and ends[1][1].replayed >= STEPS - 7
    assert apart(ends[0][0], ends[1][0]) < 1e-13
