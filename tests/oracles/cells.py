# SPDX-License-Identifier: MIT
"""Recurrent cells written out, and nets that unroll them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles.graph import Net, Program
from oracles.graph_parts import cat, linear, tanh

#: Width of a cell's input and of its state.
INPUT, STATE = 3, 2


class Gates(nn.Module):
    """A cell's four parameters and its equations, as a function of (input, state).

    Args:
        cell: Whose parameters it copies.
    """

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        for name, p in cell.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))
        equations: dict[type[nn.Module], Callable[..., Tensor]] = {
            nn.RNNCell: self.plain,
            nn.GRUCell: self.gru,
            nn.LSTMCell: self.lstm,
        }
        self.equation = equations[type(cell)]
        self.relu = getattr(cell, "nonlinearity", "") == "relu"

    def forward(self, both: Tensor) -> Tensor:
        """The new state; an LSTM's are h and c."""
        x, state = both[..., :INPUT], both[..., INPUT:]
        a, b = x @ self.weight_ih.mT, state[..., :STATE] @ self.weight_hh.mT
        if hasattr(self, "bias_ih"):
            a, b = a + self.bias_ih, b + self.bias_hh
        return self.equation(a, b, state)

    def plain(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """f(a + b)."""
        return torch.relu(a + b) if self.relu else torch.tanh(a + b)

    def gru(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """The reset gate acts behind the state's matrix."""
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        n = torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n)
        z = torch.sigmoid(a_z + b_z)
        return (1 - z) * n + z * state

    def lstm(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """Input, forget, cell and output gates, in this order."""
        i, f, g, o = (a + b).chunk(4, -1)
        c = torch.sigmoid(f) * state[..., STATE:] + torch.sigmoid(i) * torch.tanh(g)
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], -1)


class Unrolled(nn.Module):
    """stem, cell, cell, ..., head over (B, T, 2).

    Args:
        cell: A cell of torch, or its `Gates`.
        call: How it is called: "state", "keywords", "state first", or "none": no first state.
    """

    def __init__(self, cell: nn.Module, call: str = "state") -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {"stem": linear(2, INPUT), "cell": cell, "head": linear(STATE, 3)}
        )
        self.bare: dict[str, Tensor] = {}
        self.call = call

    def zeros(self, x: Tensor) -> object:
        """The state before the first call."""
        zero = x.new_zeros(len(x), STATE)
        return (zero, zero) if type(self.layers["cell"]) is nn.LSTMCell else zero

    def step(self, x: Tensor, state: object) -> object:
        """One call of the cell."""
        cell = self.layers["cell"]
        if state is None:
            return cell(x)
        if self.call == "keywords":
            return cell(input=x, hx=state)
        return cell(hx=state, input=x) if self.call == "state first" else cell(x, state)

    def forward(self, x: Tensor) -> Tensor:
        """The last state, classified."""
        state = None if self.call == "none" else self.zeros(x)
        for t in range(x.shape[1]):
            state = self.step(torch.tanh(self.layers["stem"](x[:, t])), state)
        made: Tensor = self.layers["head"](state[0] if isinstance(state, tuple) else state)
        return made


class UnrolledGates(Unrolled):
    """The same with `Gates`."""

    def zeros(self, x: Tensor) -> object:
        """An LSTM's two states lie one behind the other."""
        double = self.layers["cell"].equation == self.layers["cell"].lstm
        return x.new_zeros(len(x), STATE * (1 + double))

    def step(self, x: Tensor, state: object) -> object:
        """One call of the cell."""
        assert isinstance(state, Tensor)
        return self.layers["cell"](torch.cat([x, state], -1))

    def forward(self, x: Tensor) -> Tensor:
        """The last state, classified."""
        state = self.zeros(x)
        for t in range(x.shape[1]):
            state = self.step(torch.tanh(self.layers["stem"](x[:, t])), state)
        assert isinstance(state, Tensor)
        made: Tensor = self.layers["head"](state[:, :STATE])
        return made


def program(net: UnrolledGates, length: int) -> Net:
    """The oracle's net: inputs are T tensors (B, 2) and the zero state."""
    p = Program(length + 1)
    state = length
    for t in range(length):
        state = p("cell", p(cat, p(tanh, p("stem", t)), state))
    p("head", p(lambda s: s[:, :STATE], state))
    return Net(dict(net.layers.items()), p)
