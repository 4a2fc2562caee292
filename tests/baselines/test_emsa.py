# SPDX-License-Identifier: MIT
"""E-MSA against its augmented Hamiltonian written out sample by sample, and in the plain loop."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EMSA, NonFiniteError, UnsupportedModelError
from ddpnopt.borrowed import Borrowed
from oracles.common import assert_same, assert_unchanged, data, generators, mlp, snapshot

Controls = dict[str, Tensor]
#: One sample's step x' = f(x, u).
Dynamics = Callable[[Tensor, Controls], Tensor]


def controls(model: nn.Sequential) -> dict[str, Controls]:
    return {
        name: {n: p.detach().clone() for n, p in module.named_parameters()}
        for name, module in model.named_children()
        if any(True for _ in module.parameters())
    }


def hamiltonian(
    f: list[Dynamics],
    nominal: list[Controls],
    at: int,
    u: Controls,
    batch: tuple[Tensor, Tensor],
    rho: float,
    decay: float = 0.0,
) -> float:
    """H~ of layer ``at`` by loops over samples and time steps; the loss is cross-entropy."""
    total = 0.0
    for x0, y in zip(*batch, strict=True):
        x = [x0]
        for step, v in zip(f, nominal, strict=True):
            x.append(step(x[-1], v))
        z = x[-1].detach().requires_grad_()
        p = [-torch.autograd.grad(F.cross_entropy(z[None], y[None]), z)[0]]
        for step, v, state in reversed(list(zip(f, nominal, x[:-1], strict=True))):
            leaf = state.detach().requires_grad_()
            p.insert(0, torch.autograd.grad((step(leaf, v) * p[0]).sum(), leaf)[0])
        leaf = x[at].detach().requires_grad_()
        end = f[at](leaf, u)
        along = (p[at + 1] * end).sum()
        slope = torch.autograd.grad(along, leaf)[0]
        residual = (x[at + 1] - end).square().sum() + (p[at] - slope).square().sum()
        total += (along - rho / 2 * residual).item()
    squares = sum(float(v.square().sum()) for v in u.values())
    return total / len(batch[0]) - decay / 2 * squares


def affine(x: Tensor, u: Controls) -> Tensor:
    return u["weight"] @ x + u["bias"]


def dense(
    widths: list[int], activation: str = "tanh", seed: int = 0
) -> tuple[nn.Sequential, list[Dynamics]]:
    torch.manual_seed(seed)
    kinds = {"tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU, "none": nn.Identity}
    act = kinds[activation]()
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(i, o), kinds[activation]()]
    inner: list[Dynamics] = [lambda x, u: act(affine(x, u))] * (len(widths) - 2)
    return nn.Sequential(*layers[:-1]).double(), [*inner, affine]


def convolutional() -> tuple[nn.Sequential, list[Dynamics]]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    ).double()

    def first(x: Tensor, u: Controls) -> Tensor:
        return F.conv2d(x[None], u["weight"], u["bias"], padding=1)[0].tanh()

    def second(x: Tensor, u: Controls) -> Tensor:
        h = F.conv2d(x[None], u["weight"], u["bias"], stride=2)
        return F.avg_pool2d(F.softplus(h), 2).flatten()

    return model, [first, second, affine]


def samples(*shape: int, classes: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x, torch.randint(classes, shape[:1], generator=g)


def take_step(model: nn.Module, opt: EMSA, batch: tuple[Tensor, Tensor]) -> None:
    opt.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    opt.step()


def check_against_loops(
    model: nn.Sequential, f: list[Dynamics], batch: tuple[Tensor, Tensor], opt: EMSA
) -> None:
    """One step; what it reports is the Hamiltonian before and after."""
    decay = opt.param_groups[0]["weight_decay"]
    old = controls(model)
    take_step(model, opt, batch)
    new, nominal = controls(model), list(old.values())
    assert list(opt.hamiltonians) == list(old)
    for at, (name, (before, after)) in enumerate(opt.hamiltonians.items()):
        for u, found in ((old[name], before), (new[name], after)):
            want = hamiltonian(f, nominal, at, u, batch, opt.rho, decay)
            assert found == pytest.approx(want, rel=1e-9, abs=1e-11), name
        assert after >= before


# The augmented Hamiltonian ----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_hamiltonians_are_the_loops(kind: str, decay: float) -> None:
    if kind == "dense":
        (model, f), batch = dense([4, 6, 5, 3]), samples(5, 4, classes=3)
    else:
        (model, f), batch = convolutional(), samples(4, 2, 4, 4, classes=3)
    opt = EMSA(model, rho=0.3, weight_decay=decay)
    for _ in range(3):
        check_against_loops(model, f, batch, opt)
        assert all(after > before for before, after in opt.hamiltonians.values())


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    rows=st.integers(1, 4),
    rho=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0, 1e4]),
    activation=st.sampled_from(["tanh", "softplus", "relu"]),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_hamiltonian_never_decreases(
    widths: list[int], rows: int, rho: float, activation: str, iterations: int, seed: int
) -> None:
    model, f = dense([*widths, 3], activation, seed)
    batch = samples(rows, widths[0], classes=3, seed=seed)
    check_against_loops(model, f, batch, EMSA(model, rho, iterations))


def test_the_maximum_is_reached_where_it_is_known() -> None:
    """One linear layer: u + (mean p x^T - ...) in closed form, by solving the quadratic."""
    model, rho = nn.Linear(3, 2).double(), 0.7
    x, y = samples(6, 3, classes=2)
    z = model(x).detach().requires_grad_()
    p = -len(x) * torch.autograd.grad(F.cross_entropy(z, y), z)[0]
    W = model.weight.detach().clone()
    # -rho (D X X^T + p p^T D) / B + (p - rho d) x^T / B = 0 for the step [D, d], as one system.
    one = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1)
    A = torch.einsum("bi,bj,op->oipj", one, one, torch.eye(2, dtype=x.dtype))
    A[:, :3, :, :3] += torch.einsum("bo,bp,ij->oipj", p, p, torch.eye(3, dtype=x.dtype))
    step = torch.linalg.solve(rho * A.reshape(8, 8), (p.T @ one).reshape(8)).reshape(2, 4)
    take_step(model, EMSA(model, rho, iterations=60), (x, y))
    torch.testing.assert_close(model.weight.detach() - W, step[:, :3], rtol=1e-5, atol=1e-7)


def test_a_large_rho_makes_a_short_step() -> None:
    lengths = []
    for rho in (1e4, 1e6, 1e8):
        model, _ = dense([4, 6, 5, 3])
        old = [p.detach().clone() for p in model.parameters()]
        take_step(model, EMSA(model, rho), samples(5, 4, classes=3))
        moved = [(p.detach() - q).norm() for p, q in zip(model.parameters(), old, strict=True)]
        lengths.append(float(torch.stack(moved).norm()))
    assert lengths[0] / lengths[1] == pytest.approx(100, rel=0.1)
    assert lengths[1] / lengths[2] == pytest.approx(100, rel=0.1)


def test_without_residuals_linear_layers_follow_the_gradient() -> None:
    model, _ = dense([4, 6, 5, 3], "none")
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    take_step(model, EMSA(model, rho=0.0), samples(5, 4, classes=3))
    for name, layer in model.named_children():
        parts = [(n, p) for n, p in layer.named_parameters(prefix=name)]
        if parts:
            step = torch.cat([(p.detach() - old[n]).flatten() for n, p in parts])
            g = torch.cat([p.grad.flatten() for _, p in parts if p.grad is not None])
            assert float(F.cosine_similarity(step, -g, dim=0)) > 1 - 1e-6


def test_passes_of_one_batch_are_that_batch() -> None:
    model, _ = dense([4, 6, 5, 3])
    twin = copy.deepcopy(model)
    x, y = samples(6, 4, classes=3)
    opt, other = EMSA(model, 0.5), EMSA(twin, 0.5)
    take_step(model, opt, (x, y))
    other.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        rows = part.stop - part.start
        (F.cross_entropy(twin(x[part]), y[part]) * rows / 6).backward()
    other.step()
    assert_same(model, twin, 1e-7)


# All or nothing ---------------------------------------------------------------------------------


def test_gradients_buffers_and_generators_are_left_alone() -> None:
    model = mlp()
    model.register_buffer("count", torch.ones(3))
    opt, (x, y) = EMSA(model), data()
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before, buffer = generators(), model.get_buffer("count")
    opt.step()
    assert generators() == before
    assert model.get_buffer("count") is buffer and torch.equal(buffer, torch.ones(3))
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)


class Bomb(nn.Module):
    calls, fatal = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fatal:
            raise RuntimeError("boom")
        return x


@pytest.mark.parametrize("fatal", [2, 10])
def test_an_exception_while_solving_leaves_the_weights(fatal: int) -> None:
    base, bomb = mlp(), Bomb()
    model = nn.Sequential(*base[:2], bomb, *base[2:])
    opt, (x, y), before = EMSA(model), data(), snapshot(model)
    bomb.fatal = fatal
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="boom"):
        opt.step()
    assert_unchanged(model, before)
    assert opt.hamiltonians == {}


def test_an_exception_while_writing_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = mlp(), data()
    opt, before, put, written = EMSA(model), snapshot(model), Borrowed.put, [0]

    def failing(self: Borrowed, p: Tensor, value: Tensor) -> None:
        written[0] += 1
        if written[0] == 4:
            raise RuntimeError("boom")
        put(self, p, value)

    monkeypatch.setattr(Borrowed, "put", failing)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="boom"):
        opt.step()
    assert_unchanged(model, before)


def test_numbers_that_are_not_finite() -> None:
    model, (x, y) = mlp(), data()
    for mode in ("raise", "skip"):
        opt, before = EMSA(model, nonfinite=mode), snapshot(model)
        opt.zero_grad()
        (F.cross_entropy(model(x), y) * float("inf")).backward()
        if mode == "raise":
            with pytest.raises(NonFiniteError):
                opt.step()
        else:
            opt.step()
            assert opt.skipped == 1
        assert_unchanged(model, before)
        opt.detach()


def test_dropout_repeats_its_mask() -> None:
    """H~ at the old weights is the mean of p' . x' only if the pass's own mask is used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    opt, (x, y) = EMSA(model), data()
    F.cross_entropy(model(x), y).backward()
    state = seen[0].requires_grad_()
    loss = F.cross_entropy(F.linear(state, *model[3].parameters()), y)
    (g,) = torch.autograd.grad(loss, state)
    before = generators()
    opt.step()
    assert generators() == before
    assert opt.hamiltonians["0"][0] == pytest.approx(-(g * state).sum().item(), rel=1e-10)


class Clipped(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.4, 0.4)


class Functional(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).tanh().clamp(-0.4, 0.4))


def clip_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].clamp(-0.4, 0.4),)


def clip_output(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output.clamp(-0.4, 0.4)


def clipping(kind: str, first: nn.Linear, last: nn.Linear) -> nn.Sequential:
    """last(clamp(tanh(first(x)))), the clamp done in one way or another."""
    if kind == "modules":
        return nn.Sequential(first, nn.Tanh(), nn.Hardtanh(-0.4, 0.4), last)
    if kind == "nested":
        head = nn.Sequential(nn.Hardtanh(-0.4, 0.4), last)
        return nn.Sequential(nn.Sequential(first, nn.Tanh()), head)
    if kind == "own module":
        return nn.Sequential(first, Clipped(), last)
    if kind == "own forward":
        return Functional(first, last)
    body = nn.Sequential(first, nn.Tanh())
    if kind == "layer hook":
        last.register_forward_pre_hook(clip_input)
    else:
        (body if kind == "container hook" else body[1]).register_forward_hook(clip_output)
    return nn.Sequential(body, last)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("modules", True),
        ("nested", True),
        ("module hook", True),
        ("layer hook", False),
        ("container hook", False),
        ("own module", False),
        ("own forward", False),
    ],
)
def test_whatever_stands_between_two_layers(kind: str, known: bool) -> None:
    """Known modules are called by themselves; otherwise the pass is run again."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    model, twin, passes = clipping(kind, first, last), nn.Sequential(first, last), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    f: list[Dynamics] = [lambda x, u: affine(x, u).tanh().clamp(-0.4, 0.4), affine]
    opt, batch, old = EMSA(model, 0.3), samples(5, 4, classes=3), controls(twin)
    take_step(model, opt, batch)
    assert (passes == 1) == known
    new = controls(twin)
    for at, (before, after) in enumerate(opt.hamiltonians.values()):
        for u, found in ((old[str(at)], before), (new[str(at)], after)):
            want = hamiltonian(f, list(old.values()), at, u, batch, 0.3)
            assert found == pytest.approx(want, rel=1e-9)


def test_an_empty_batch_moves_nothing() -> None:
    model, (x, y) = mlp(), data()
    opt, before = EMSA(model, weight_decay=0.1), snapshot(model)
    take_step(model, opt, (x[:0], y[:0]))
    assert_unchanged(model, before)
    assert opt.last_step is not None and opt.last_step.depth == "off"
    twin = copy.deepcopy(model)
    take_step(twin, EMSA(twin, weight_decay=0.1), (x, y))
    opt.zero_grad()
    F.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    F.cross_entropy(model(x), y).backward()
    opt.step()  # an empty pass beside another one is left out
    assert_same(model, twin)


# In the loop ------------------------------------------------------------------------------------


def test_it_trains() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:480] / 8 - 1), torch.tensor(y[:480])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    opt = EMSA(model, rho=1.0)
    for _ in range(3):
        for rows in torch.randperm(480).split(32):
            take_step(model, opt, (x[rows], y[rows]))
    assert float((model(x).argmax(1) == y).double().mean()) > 0.85


def test_any_loss_and_other_layers() -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh())
    model = nn.Sequential(*layers, nn.Linear(6, 1)).double()
    model[3].requires_grad_(False)
    x, target = data()[0], torch.zeros(6, dtype=torch.float64)
    opt, losses = EMSA(model, rho=5.0), []
    for _ in range(5):
        opt.zero_grad()
        loss = F.huber_loss(model(x)[:, 0], target - 0.7, delta=0.3)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert list(opt.hamiltonians) == ["0", "1", "5"]
    assert losses[-1] < losses[0]


def test_rho_is_saved_and_may_change() -> None:
    model, _ = dense([4, 5, 3])
    twin, batch = copy.deepcopy(model), samples(5, 4, classes=3)
    opt, other = EMSA(model, rho=0.1), EMSA(twin, rho=9.0)
    opt.rho = 2.0
    other.load_state_dict(opt.state_dict())
    assert other.rho == 2.0
    take_step(model, opt, batch)
    take_step(twin, other, batch)
    assert_same(model, twin)
    state = opt.state_dict()
    del state["ddpnopt"]["rho"]
    with pytest.raises(ValueError, match="rho"):
        opt.load_state_dict(state)


def test_a_dropped_optimizer_is_freed() -> None:
    model = mlp()
    opt = EMSA(model)
    take_step(model, opt, data())
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


# Refusals ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.head(x + torch.tanh(self.b(x)))


class Shifted(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6 if not last else 3))
        self.first, self.head, self.last = nn.Linear(5, 6), nn.Linear(6, 3), last
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h) + self.shift if self.last else self.head(h + self.shift)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Residual, "'(a|b).weight'"),
        (lambda: Shifted(False), "'shift'"),
        (lambda: Shifted(True), "'shift'"),
        (normed, "'0.weight'"),
    ],
)
def test_other_models_are_refused(make: Callable[[], nn.Module], named: str) -> None:
    model, (x, y) = make(), data()
    opt = EMSA(model)
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"{named}.*dense and convolutional chains"):
        opt.step()
    assert_unchanged(model, before)


def test_a_detached_optimizer_takes_no_plain_step() -> None:
    model, (x, y) = mlp(), data()
    opt, before = EMSA(model), snapshot(model)
    opt.detach()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="detached from its model"):
        opt.step()
    assert_unchanged(model, before)


def test_a_scheduler_divides_rho() -> None:
    model, twin = mlp(), mlp()
    opt, other = EMSA(model, rho=2.0), EMSA(twin, rho=2.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for k in range(3):
        take_step(model, opt, data())
        schedule.step()
        other.rho = 2.0 / 0.5**k
        take_step(twin, other, data())
    assert_same(model, twin, 1e-12)
    opt.param_groups[0]["lr"] = 0.0
    before = snapshot(model)
    take_step(model, opt, data())
    assert_unchanged(model, before)


def test_one_layer_has_one_rate() -> None:
    model = mlp()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    opt = EMSA(model, params=[{"params": weights}, {"params": biases, "lr": 0.0}])
    before = snapshot(model)
    with pytest.raises(ValueError, match="lr of '0' differs"):
        take_step(model, opt, data())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho=-1.0"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"iterations": 0}, "iterations=0"),
        ({"iterations": 2.5}, "iterations=2.5"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"nonfinite": "hide"}, "nonfinite='hide'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMSA(mlp(), **options)
    with pytest.raises(ValueError, match="rho=-2"):
        EMSA(mlp()).rho = -2.0


@pytest.mark.parametrize(("option", "given"), [("momentum", 0.5)])
def test_options_of_other_optimizers_are_refused(option: str, given: float) -> None:
    model = mlp()
    opt, before = EMSA(model), snapshot(model)
    opt.param_groups[0][option] = given
    with pytest.raises(ValueError, match=rf"{option}={given} for '0\.weight'"):
        take_step(model, opt, data())
    assert_unchanged(model, before)


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_a_rescaled_gradient_is_a_rescaled_loss(factor: float) -> None:
    """Clipping shrinks the costates; a scaled loss that is unscaled again is the loss itself."""
    model, twin = mlp(), mlp()
    x, y = data()
    opt = EMSA(model, rho=3.0)
    (8.0 * F.cross_entropy(model(x), y)).backward()
    for p in model.parameters():
        p.grad.mul_(factor / 8.0)
    opt.step()
    other = EMSA(twin, rho=3.0)
    (factor * F.cross_entropy(twin(x), y)).backward()
    other.step()
    assert_same(model, twin, 1e-9)
