# SPDX-License-Identifier: MIT
"""Recurrent cells against autograd of the cells themselves, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpnopt.layers import LayerRule, registered, rule_for, rule_of_call
from ddpnopt.testing import check_layer

CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNNCell(4, 3),
    "rnn, relu": lambda: nn.RNNCell(4, 3, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(4, 3),
    "gru, no bias": lambda: nn.GRUCell(2, 5, bias=False),
    "lstm": lambda: nn.LSTMCell(4, 3),
    "lstm, no bias": lambda: nn.LSTMCell(2, 5, bias=False),
}
ROWS = 6


class Flat(nn.Module):
    """A cell called with tensors side by side, which returns one."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(x, state or None), -1)
        return self.cell(x, *state)


class FlatLSTMCell(nn.LSTMCell):
    """The same, with a cell's own parameters, for `check_layer`."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat(super().forward(x, (h, c)), -1)


class Case:
    """A cell in float64, its inputs and autograd's derivatives of it."""

    def __init__(self, kind: str, samples: int = ROWS) -> None:
        torch.manual_seed(11)
        self.cell = CELLS[kind]().double()
        for p in self.cell.parameters():
            p.data.mul_(3)  # away from where tanh is the identity
        self.names = [name for name, _ in self.cell.named_parameters()]
        self.params = dict(self.cell.named_parameters())
        found = registered(self.cell)
        assert found is not None and rule_for(self.cell) is found
        self.rule: LayerRule = found
        width, states = self.cell.hidden_size, 2 if isinstance(self.cell, nn.LSTMCell) else 1
        shapes = [(ROWS, self.cell.input_size), *[(ROWS, width)] * states]
        self.inputs = [torch.randn(shape).double() for shape in shapes]
        self.x = self.rule.pack(self.cell, self.inputs)
        self.samples = samples
        self.V = torch.randn(3, ROWS, width * states).double()

    def forward(self, inputs: Sequence[Tensor], params: dict[str, Tensor] | None = None) -> Tensor:
        given = {f"cell.{n}": p for n, p in (params or self.params).items()}
        return functional_call(Flat(self.cell), given, tuple(inputs))

    def sample_gradients(self) -> dict[str, Tensor]:
        """(r, B, *shape), one sample and column after another."""
        m = ROWS // self.samples
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for v in self.V:
            for i in range(self.samples):
                rows = slice(i * m, (i + 1) * m)
                along = (self.forward([t[rows] for t in self.inputs]) * v[rows]).sum()
                for name, g in zip(
                    self.names, torch.autograd.grad(along, list(self.params.values())), strict=True
                ):
                    found[name].append(g)
        shape = (len(self.V), self.samples)
        return {n: torch.stack(g).reshape(*shape, *g[0].shape) for n, g in found.items()}


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_function_and_packing(kind: str) -> None:
    case = Case(kind)
    rule, cell = case.rule, case.cell
    assert all(map(torch.equal, rule.unpack(cell, case.x), case.inputs))
    h = case.forward(case.inputs)
    same(rule.function(cell, case.x), h)
    given = tuple(case.inputs[1:])
    returned = cell(case.inputs[0], given if len(given) == 2 else given[0])
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    assert len(outputs) in rule.results
    assert torch.equal(rule.pack_output(cell, outputs), h)
    assert all(map(torch.equal, rule.unpack_output(cell, h), outputs))
    other = {n: torch.randn_like(p) for n, p in case.params.items()}
    same(rule.output(cell, case.x, other), case.forward(case.inputs, other))
    one = case.names[0]
    mixture = {**case.params, one: other[one]}
    same(rule.output(cell, case.x, {one: other[one]}), case.forward(case.inputs, mixture))


@pytest.mark.parametrize("kind", CELLS)
def test_a_call_without_a_state_has_a_zero_one(kind: str) -> None:
    case = Case(kind)
    x, *state = case.inputs
    packed = case.rule.pack(case.cell, [x])
    same(packed, case.rule.pack(case.cell, [x, *map(torch.zeros_like, state)]))
    same(case.rule.function(case.cell, packed), case.forward([x]))
    single = case.rule.pack(case.cell, [x[0]])
    assert single.dim() < case.rule.batched_dim(case.cell) and torch.equal(single, packed[0])


@pytest.mark.parametrize("kind", CELLS)
def test_push_and_pull(kind: str) -> None:
    case = Case(kind)
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    h = case.forward(leaves)
    found = torch.autograd.grad(h, leaves, case.V, is_grads_batched=True)
    pulled = torch.cat(found, -1)
    same(case.rule.pull(case.cell, case.x, case.V), pulled)
    dx = torch.randn_like(case.x)
    moved = torch.autograd.functional.jvp(
        lambda s: case.forward(case.rule.unpack(case.cell, s)), case.x, dx
    )[1]
    same(case.rule.push(case.cell, case.x, dx), moved)


@pytest.mark.parametrize("samples", [ROWS, ROWS // 2, 1])
@pytest.mark.parametrize("kind", CELLS)
def test_weight_gradients(kind: str, samples: int) -> None:
    """Rows that are folded into one sample are executions of an unrolled cell."""
    case = Case(kind, samples)
    rule, cell, x, V = case.rule, case.cell, case.x, case.V
    G = case.sample_gradients()
    ours = rule.sample_gradients(cell, x, V, samples)
    total, squares = rule.gradient(cell, x, V[0]), rule.squares(cell, x, V[0], samples)
    start = {n: torch.randn_like(p) for n, p in case.params.items()}
    onto = rule.onto(cell, x, V[0], start, 0.3)
    assert set(ours) == set(total) == set(squares) == set(G)
    for name, g in G.items():
        same(ours[name], g)
        same(total[name], g[0].sum(0))
        same(squares[name], g[0].square().sum(0))
        same(onto[name], start[name] + 0.3 * g[0].sum(0))
    for names in (case.names, case.names[:1], case.names[-1:]):
        change = {n: torch.randn_like(G[n][0, 0]) for n in names}
        expected = sum(torch.einsum("rb...,...->br", G[n], du) for n, du in change.items())
        same(rule.along(cell, x, V, change, samples), torch.as_tensor(expected))
    assert set(rule.onto(cell, x, V[0], {"weight_hh": start["weight_hh"]}, 1.0)) == {"weight_hh"}


GAINS: dict[str, Callable[[Tensor], float | Tensor]] = {
    "number": lambda p: 0.3,
    "numbers": lambda p: 0.2 + p.numel() / 50,
    "diagonal": lambda p: torch.rand_like(p) + 0.1,
}


@pytest.mark.parametrize("samples", [ROWS, ROWS // 2, 1])
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("kind", CELLS)
def test_gram_products(kind: str, gain: str, samples: int) -> None:
    case = Case(kind, samples)
    rule, cell, x, V = case.rule, case.cell, case.x, case.V
    G = case.sample_gradients()
    sets = (case.names, case.names[:-1], case.names[:1], case.names[-1:])
    for known in sets:  # the others are fixed
        P = {name: GAINS[gain](case.params[name].detach()) for name in known}
        expected = torch.zeros(samples, 3, 3, dtype=torch.float64)
        for name in known:
            g = G[name].flatten(2)
            D = torch.ones_like(case.params[name]).mul(P[name]).flatten().detach()
            expected += torch.einsum("rbi,i,sbi->brs", g, D, g)
        same(rule.gram(cell, x, V, P, samples), expected)
        kept = rule.kept_gram(cell, x, V[:1], P, samples)
        assert kept is not None
        same(kept[0], expected[:, :1, :1])
        a = torch.randn(samples).double()
        start = {name: torch.randn_like(case.params[name]) for name in known}
        found = kept[1].onto(start, a, 0.3)
        assert set(found) == set(known)
        for name in known:
            along = torch.einsum("b,b...->...", a, G[name][0])
            same(found[name], start[name] + 0.3 * along)


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_curvature_is_the_gram_matrix_of_the_whole_jacobian(kind: str) -> None:
    case = Case(kind, ROWS // 2)
    P = {name: GAINS["diagonal"](p.detach()) for name, p in case.params.items()}
    found = case.rule.curvature(case.cell, case.x, case.V[0], P, case.samples)
    h = case.forward(case.inputs).reshape(case.samples, -1)
    for i in range(case.samples):
        expected = torch.zeros(h.shape[1], h.shape[1]).double()
        for name, p in case.params.items():
            rows = [torch.autograd.grad(one, p, retain_graph=True)[0].flatten() for one in h[i]]
            J = torch.stack(rows)
            expected += J * torch.as_tensor(P[name]).flatten() @ J.T
        same(found[i], expected)


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives(kind: str) -> None:
    case = Case(kind)
    rule, cell, v = case.rule, case.cell, case.V[0]
    dx = torch.randn_like(case.x)

    def along(state: Tensor) -> Tensor:
        return (case.forward(rule.unpack(cell, state)) * v).sum()

    state = case.x.clone().requires_grad_()
    (g_x,) = torch.autograd.grad(along(state), state, create_graph=True)
    expected = torch.autograd.grad((g_x * dx).sum(), list(case.params.values()), allow_unused=True)
    found = rule.mixed(cell, case.x, dx, v)
    for (name, p), one in zip(case.params.items(), expected, strict=True):
        same(found[name], torch.zeros_like(p) if one is None else one)
    hessian = torch.autograd.functional.hessian(along, case.x)
    size = case.x.shape[1]
    whole = hessian.reshape(ROWS // 2, 2 * size, ROWS // 2, 2 * size)
    own = torch.stack([whole[i, :, i] for i in range(ROWS // 2)])
    curvature = rule.state_curvature(cell, case.x, v, ROWS // 2)
    assert curvature is not None
    same(curvature, own)


@pytest.mark.parametrize("samples", [4, 2])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_the_check_for_users(kind: str, samples: int) -> None:
    layer = FlatLSTMCell(4, 3) if kind == "lstm" else CELLS[kind]()
    states = 2 if kind == "lstm" else 1
    inputs = [torch.randn(4, 4), *[torch.randn(4, 3) for _ in range(states)]]
    rule = registered(CELLS[kind]())
    check_layer(layer, inputs, rule=rule, samples=samples)


def test_an_unrolled_cell_merged_into_rows_has_the_gradient_of_the_unrolled_net() -> None:
    """Executions as rows of a sample: autograd's gradient through time, with G at each of them."""
    torch.manual_seed(2)
    cell, steps, B = nn.LSTMCell(3, 4).double(), 5, 6
    rule = registered(cell)
    assert rule is not None
    sequence = torch.randn(steps, B, 3).double()
    state, states, results = None, [], []
    for x in sequence:
        states.append(rule.pack(cell, [x, *(state or ())]).detach())
        packed = rule.pack_output(cell, cell(x, state))
        packed.retain_grad()
        results.append(packed)
        h, c = rule.unpack_output(cell, packed)
        state = (h, c)
    weight = torch.randn(B).double()
    (h.sin().sum(1) * weight).sum().backward()
    rows = torch.stack(states, 1).flatten(0, 1)
    G = torch.stack([packed.grad for packed in results], 1).flatten(0, 1)
    found = rule.gradient(cell, rows, G)
    for name, p in cell.named_parameters():
        assert p.grad is not None
        same(found[name], p.grad)
    gram = rule.gram(cell, rows, G[None], dict.fromkeys(found, 1.0), B)[:, 0, 0]
    for i in range(B):
        h, c = cell(sequence[0, i : i + 1])
        for x in sequence[1:, i : i + 1]:
            h, c = cell(x, (h, c))
        own = torch.autograd.grad(h.sin().sum() * weight[i], list(cell.parameters()))
        same(gram[i], torch.stack([g.square().sum() for g in own]).sum())


CALLS = {
    "gru": (lambda: nn.GRUCell(4, 3), (torch.randn(2, 4), torch.randn(2, 3)), 1),
    "gru, none": (lambda: nn.GRUCell(4, 3), (torch.randn(2, 4), None), 1),
    "lstm": (
        lambda: nn.LSTMCell(4, 3),
        (torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 3))),
        2,
    ),
    "lstm, none": (lambda: nn.LSTMCell(4, 3), (torch.randn(2, 4),), 2),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_that_have_a_rule(kind: str) -> None:
    make, given, outputs = CALLS[kind]
    cell = make()
    assert rule_of_call(cell, given, outputs) == (registered(cell), "")
    assert rule_of_call(cell, given) == (registered(cell), "")  # before it has returned
    assert "returned 3 tensors" in rule_of_call(cell, given, 3)[1]


@pytest.mark.parametrize(
    ("layer", "cell"),
    [
        (nn.LSTM(4, 3), "nn.LSTMCell"),
        (nn.GRU(4, 3, num_layers=2), "nn.GRUCell"),
        (nn.RNN(4, 3, nonlinearity="relu"), "nn.RNNCell"),
    ],
)
def test_fused_layers_name_the_way_out(layer: nn.Module, cell: str) -> None:
    rule, reason = rule_of_call(layer, (torch.randn(5, 2, 4),), 2)
    assert rule is None and rule_for(layer) is None
    assert type(layer).__name__ in reason and f"unroll {cell}" in reason
    with pytest.raises(ValueError, match="no rule is registered"):
        check_layer(layer, torch.randn(5, 2, 4))
