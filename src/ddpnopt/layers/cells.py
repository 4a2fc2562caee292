# SPDX-License-Identifier: MIT
"""Recurrent cells: two matrices whose outputs meet in elementwise gates.

With a = W_ih x + b_ih and b = W_hh s + b_hh the cell is a function of a, b and its state that acts
on each unit alone. A vector in h-space is pulled back through that function first; what arrives at
a and b belongs to two dense layers with inputs x and s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.decisions import same
from ddpnopt.layers.base import Kept, LayerRule
from ddpnopt.layers.forward import own_parameters
from ddpnopt.layers.registry import register
from ddpnopt.positions import (
    AT_ONCE,
    Gain,
    Kronecker,
    bias_gram,
    diagonal,
    sample_gradients,
    scalar,
    weight_gram,
    weight_squares,
)
from ddpnopt.typing import Tensor


@dataclass(frozen=True, eq=False)
class Pulled:
    """Columns in h-space pulled back through the gates.

    Attributes:
        ih: To a = W_ih x + b_ih.
        hh: To b = W_hh s + b_hh.
        direct: To each tensor of the state, past both matrices; None for nothing.
    """

    ih: Tensor
    hh: Tensor
    direct: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class KeptGates:
    """What the gates pull back of every row: the weight gradients lack one product each.

    Attributes:
        sides: Inputs (n, i) and pulled-back outputs (n, o) of both matrices.
    """

    sides: Mapping[str, tuple[Tensor, Tensor]]

    def onto(self, gradients: Mapping[str, Tensor], a: Tensor, scale: float) -> dict[str, Tensor]:
        """gradients + scale sum_i a_i G_i."""
        found = {}
        for side, (U, A) in self.sides.items():
            A = A * a.repeat_interleave(len(A) // len(a))[:, None].to(A.dtype)
            weight, bias = f"weight_{side}", f"bias_{side}"
            if weight in gradients:
                found[weight] = torch.addmm(gradients[weight].to(A.dtype), A.T, U, alpha=scale)
            if bias in gradients:
                found[bias] = gradients[bias].to(A.dtype).add(A.sum(0), alpha=scale)
        return found


class CellRule(LayerRule, ABC):
    """The state holds x and the cell's own state, which is zero where a call has none."""

    parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    arguments = (1, 2)
    #: Tensors of a state, which the cell returns, too.
    states: int = 1
    #: a and b meet in their sum alone.
    summed: bool = True

    @abstractmethod
    def combine(self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor]) -> Tensor:
        """h, from a = W_ih x + b_ih and b = W_hh s + b_hh."""

    @abstractmethod
    def back(
        self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor], V: Tensor
    ) -> Pulled:
        """Pull back through `combine`; V may have a leading axis of columns."""

    def pack(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """One behind the other."""
        x = inputs[0]
        if len(inputs) == 1:
            width = self.states * cast(nn.RNNCell, module).hidden_size
            inputs = (x, x.new_zeros(*x.shape[:-1], width))
        return torch.cat(list(inputs), -1)

    def unpack(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """x and the state, also where the call gave none."""
        cell = cast(nn.RNNCell, module)
        return torch.split(x, [cell.input_size, *[cell.hidden_size] * self.states], -1)

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """The cell itself, by its own algebra: fused kernels have no forward derivatives."""
        return self.output(module, x, {})

    def output(self, module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The cell at other parameters."""
        state, a, b = self._products(module, x, parameters)
        return self.combine(module, a, b, state)

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """(W_ih^T v_a, W_hh^T v_b + what reaches s directly, ...)."""
        cell = cast(nn.RNNCell, module)
        pulled = self._pulled(module, x, V)
        through = pulled.hh @ cell.weight_hh.to(x.dtype)
        first, *others = pulled.direct
        parts = [through if first is None else through + first]
        parts += [p for p in others if p is not None]
        return torch.cat([pulled.ih @ cell.weight_ih.to(x.dtype), *parts], -1)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """v_a^T x, v_b^T s and the sums of v_a and v_b over the batch."""
        found = {}
        for side, U, A in self._sides(module, x, V[None], 1):
            U, A = U[0, 0], A[0, 0, 0]
            found[f"weight_{side}"] = A.T @ U
            found[f"bias_{side}"] = A.sum(0)
        return _owned(module, found)

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """The same sample by sample."""
        found = {}
        for side, U, A in self._sides(module, x, V, samples):
            found[f"weight_{side}"] = sample_gradients(U, A)[:, :, 0]
            found[f"bias_{side}"] = A[:, :, 0].sum(2)
        return _owned(module, found)

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """(v_a^2)^T x^2 and so on, where a sample is one row."""
        found = {}
        for side, U, A in self._sides(module, x, V[None], samples):
            found[f"weight_{side}"] = weight_squares(U, A[0])[0]
            found[f"bias_{side}"] = A[0, :, 0].sum(1).square().sum(0)
        return _owned(module, found)

    def along(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        change: Mapping[str, Tensor],
        samples: int,
    ) -> Tensor:
        """(dW_ih x + db_ih) . v_a + (dW_hh s + db_hh) . v_b."""
        total = V.new_zeros(samples, V.shape[0])
        for side, U, A in self._sides(module, x, V, samples):
            weight, bias = change.get(f"weight_{side}"), change.get(f"bias_{side}")
            if weight is not None:
                total = total + torch.einsum("bgto,rbgto->br", U @ weight.mT, A)
            if bias is not None:
                total = total + torch.einsum("rbgto,o->br", A, bias)
        return total

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Of two dense layers, exact."""
        return self._gram(list(self._sides(module, x, V, samples)), gain)

    def kept_gram(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> tuple[Tensor, Kept] | None:
        """With what the gates pull back, so that it need not be found again."""
        sides = list(self._sides(module, x, V, samples))
        kept = {side: (U.flatten(0, 2), A[0].flatten(0, 2)) for side, U, A in sides}
        return self._gram(sides, gain), KeptGates(kept)

    def pack_output(self, module: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
        """The new state's tensors, one behind the other."""
        return torch.cat(list(outputs), -1) if self.states > 1 else outputs[0]

    def unpack_output(self, module: nn.Module, h: Tensor) -> tuple[Tensor, ...]:
        """And apart."""
        return torch.split(h, cast(nn.RNNCell, module).hidden_size, -1)

    def _products(
        self, module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The cell's own state, a and b."""
        own = {**own_parameters(module, x), **parameters}
        x, *state = self.unpack(module, x)
        a = F.linear(x, own["weight_ih"], own.get("bias_ih"))
        b = F.linear(state[0], own["weight_hh"], own.get("bias_hh"))
        return state, a, b

    def _pulled(self, module: nn.Module, x: Tensor, V: Tensor) -> Pulled:
        state, a, b = self._products(module, x, {})
        return self.back(module, a, b, state, V)

    def _sides(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each matrix its inputs (b, 1, t, i), and columns (r, b, 1, t, o) at its outputs.

        The gates' many temporaries exist for some rows at a time.
        """
        width = max(1, V.shape[0] * V.shape[-1])
        rows_at = max(1, AT_ONCE // (4 * width))
        x = x.reshape(-1, x.shape[-1])
        V = V.reshape(V.shape[0], -1, V.shape[-1])
        parts = [
            self._pulled(module, one, v)
            for one, v in zip(torch.split(x, rows_at), torch.split(V, rows_at, 1), strict=True)
        ]
        ih, hh = (torch.cat(side, 1) for side in zip(*((p.ih, p.hh) for p in parts), strict=True))
        first, second, *_ = self.unpack(module, x)
        for side, U, A in (("ih", first, ih), ("hh", second, hh)):
            rows = A.reshape(V.shape[0], samples, 1, -1, A.shape[-1])
            yield side, U.reshape(samples, 1, -1, U.shape[-1]), rows

    def _gram(
        self, sides: Sequence[tuple[str, Tensor, Tensor]], gain: Mapping[str, Gain]
    ) -> Tensor:
        """V_u^T P V_u, (B, r, r)."""
        (_, first, A), (_, second, _) = sides
        numbers = [P for P in gain.values() if scalar(P)]
        equal = len(numbers) == len(gain) and all(same(P, numbers[0]) for P in numbers)
        if self.summed and equal and "weight_ih" in gain and "weight_hh" in gain:
            # One matrix: a bias is the weight of a constant input.
            biases = first.new_ones(*first.shape[:-1], len(gain) - 2)
            return weight_gram(torch.cat([first, second, biases], -1), A, numbers[0])
        total = A.new_zeros(A.shape[1], A.shape[0], A.shape[0])
        for side, U, A in sides:
            P = gain.get(f"weight_{side}")
            if P is not None:
                total = total + weight_gram(U, A, P[None] if diagonal(P) else P)
            P = gain.get(f"bias_{side}")
            if P is not None:
                assert not isinstance(P, Kronecker)
                total = total + bias_gram(A, P[None] if diagonal(P) else P)
        return total


@register(nn.RNNCell)
class RNNCellRule(CellRule):
    """h = f(a + b), f tanh or relu."""

    def combine(self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor]) -> Tensor:
        """f(a + b)."""
        return (a + b).relu() if _relu(module) else (a + b).tanh()

    def back(
        self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor], V: Tensor
    ) -> Pulled:
        """f' v to both."""
        h = self.combine(module, a, b, state)
        v = V * (h > 0) if _relu(module) else V * (1 - h.square())
        return Pulled(v, v, (None,))


@register(nn.GRUCell)
class GRUCellRule(CellRule):
    """h = (1 - z) n + z s with gates r, z of a + b, and n = tanh(a_n + r b_n)."""

    summed = False

    def combine(self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor]) -> Tensor:
        """n + z (s - n)."""
        _, z, n, _ = _gru_gates(a, b)
        return n + z * (state[0] - n)

    def back(
        self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor], V: Tensor
    ) -> Pulled:
        """The reset gate stands between b and n, so a and b get different vectors."""
        r, z, n, b_n = _gru_gates(a, b)
        v_n = V * ((1 - z) * (1 - n.square()))
        v_r = v_n * (b_n * r * (1 - r))
        v_z = V * ((state[0] - n) * z * (1 - z))
        both = torch.cat([v_r, v_z], -1)
        return Pulled(torch.cat([both, v_n], -1), torch.cat([both, v_n * r], -1), (V * z,))


@register(nn.LSTMCell)
class LSTMCellRule(CellRule):
    """c = f c' + i g, h = o tanh(c), the gates of a + b; h-space holds h and c."""

    arguments = (1, 3)
    results = (2,)
    states = 2

    def combine(self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor]) -> Tensor:
        """h and c."""
        _, _, _, o, c = _lstm_gates(a, b, state)
        return torch.cat([o * c.tanh(), c], -1)

    def back(
        self, module: nn.Module, a: Tensor, b: Tensor, state: Sequence[Tensor], V: Tensor
    ) -> Pulled:
        """v of c gets what reaches it through h."""
        i, f, g, o, c = _lstm_gates(a, b, state)
        v_h, v_c = V.chunk(2, -1)
        tanh_c = c.tanh()
        v_c = v_c + v_h * (o * (1 - tanh_c.square()))
        v_i = v_c * (g * i * (1 - i))
        v_f = v_c * (state[1] * f * (1 - f))
        v_g = v_c * (i * (1 - g.square()))
        v_o = v_h * (tanh_c * o * (1 - o))
        v = torch.cat([v_i, v_f, v_g, v_o], -1)
        return Pulled(v, v, (None, v_c * f))


def _gru_gates(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n and b_n."""
    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
    r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
    return r, z, (a_n + r * b_n).tanh(), b_n


def _lstm_gates(
    a: Tensor, b: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """i, f, g, o and the new c."""
    i, f, g, o = (a + b).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    return i, f, g, o, f * state[1] + i * g


def _relu(module: nn.Module) -> bool:
    return cast(nn.RNNCell, module).nonlinearity == "relu"


def _owned(module: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without biases that the cell has not."""
    return {name: g for name, g in found.items() if getattr(module, name) is not None}
