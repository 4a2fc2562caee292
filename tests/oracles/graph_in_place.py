# SPDX-License-Identifier: MIT
"""Nets that overwrite what an earlier layer has made, and the same nets that don't."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.graph import Net, Node, Program
from oracles.graph_nets import Case
from oracles.graph_parts import add, conv, linear, noise, pool, tanh


def iadd(x: Tensor, y: Tensor) -> Tensor:
    """x += y."""
    x += y
    return x


def gate_(x: Tensor, y: Tensor) -> Tensor:
    """Channels times sigmoid, in place."""
    return x.mul_(torch.sigmoid(y)[:, :, None, None])


def gate(x: Tensor, y: Tensor) -> Tensor:
    """The same on a copy."""
    return x * torch.sigmoid(y)[:, :, None, None]


def relu_(x: Tensor) -> Tensor:
    """As nn.ReLU(inplace=True)."""
    return F.relu(x, inplace=True)


def assign(x: Tensor, y: Tensor) -> Tensor:
    """The first entries replaced."""
    x[:, : y.shape[1]] = y
    return x


def assigned(x: Tensor, y: Tensor) -> Tensor:
    """The same on a copy."""
    return torch.cat([y, x[:, y.shape[1] :]], 1)


def slice_add_(x: Tensor, y: Tensor) -> Tensor:
    """A view of the first entries added to."""
    x[:, : y.shape[1]].add_(y)
    return x


def slice_added(x: Tensor, y: Tensor) -> Tensor:
    """The same on a copy."""
    n = y.shape[1]
    return torch.cat([x[:, :n] + y, x[:, n:]], 1)


def double_(x: Tensor, y: Tensor) -> Tensor:
    """Itself added, so that both arguments are the tensor, and something else."""
    x += x
    x += y
    return x


def doubled(x: Tensor, y: Tensor) -> Tensor:
    """The same on a copy."""
    return x + x + y


def flat(x: Tensor) -> Tensor:
    """A view of all of it."""
    return x.flatten(1)


#: In place: the same on a copy.
TWINS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    iadd: add,
    gate_: gate,
    relu_: torch.relu,
    assign: assigned,
    slice_add_: slice_added,
    double_: doubled,
}


def group_norm(channels: int) -> nn.GroupNorm:
    """Of one group, weights not all alike."""
    layer = nn.GroupNorm(1, channels, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


class PlainNorm(nn.Module):
    """The same of a GroupNorm of one group, written out."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        """Take its parameters over."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Over all channels and pixels of a sample."""
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), False, keepdim=True)
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]
        return (x - mean) * (var + self.eps).rsqrt() * scale + shift


def basic_block() -> Case:
    """The block of a residual net of 18 layers, with a projection and in-place functions."""
    p = Program()
    h = p(relu_, p("norm", p("stem", 0)))
    inner = p("norm2", p("b", p(relu_, p("norm1", p("a", h)))))
    h = p(relu_, p(iadd, inner, p("norm3", p("project", h))))
    inner = p("d", p(relu_, p("c", h)))
    h = p(relu_, p(iadd, inner, h))
    p("head", p(pool, h))
    layers: dict[str, nn.Module] = {"stem": conv(2, 2), "a": conv(2, 3), "b": conv(3, 3)}
    layers |= {"project": conv(2, 3, 1), "c": conv(3, 3), "d": conv(3, 3, 1)}
    layers |= {"norm": group_norm(2)} | {f"norm{k}": group_norm(3) for k in (1, 2, 3)}
    return Net(layers | {"head": linear(3, 3)}, p), (noise(2, 4, 4),)


def squeeze_excite() -> Case:
    """A gate that overwrites what it was made from."""
    p = Program()
    h = p(relu_, p("stem", 0))
    features = p("a", h)
    gates = p("up", p(relu_, p("down", p(pool, features))))
    h = p(relu_, p(iadd, p(gate_, features, gates), p("project", h)))
    p("head", p(pool, h))
    layers: dict[str, nn.Module] = {"stem": conv(2, 3), "a": conv(3, 3), "down": linear(3, 2)}
    layers |= {"up": linear(2, 3), "project": conv(3, 3, 1), "head": linear(3, 3)}
    return Net(layers, p), (noise(2, 3, 3),)


def stream() -> Case:
    """A residual stream that is added to again and again."""
    p = Program()
    h = p("stem", 0)
    for k in "12":
        h = p(iadd, h, p("out" + k, p(tanh, p("in" + k, p(tanh, h)))))
    p("head", p(tanh, h))
    layers = {name: linear(3, 3) for name in ("stem", "in1", "out1", "in2", "out2", "head")}
    return Net(layers, p), (noise(3),)


def read_before() -> Case:
    """Used in a later step, then overwritten in a still later one."""
    p = Program()
    h, k = p("a", 0), p("b", 0)
    m = p("c", p(tanh, p(add, h, k)))
    p("head", p(tanh, p(iadd, h, m)))
    layers = {name: linear(3, 3) for name in ("a", "b", "c", "head")}
    return Net(layers, p), (noise(3),)


def filled() -> Case:
    """Entries of an earlier output replaced."""
    p = Program()
    h = p("a", 0)
    k = p("b", p(tanh, h))
    p("head", p(tanh, p(assign, h, k)))
    layers = {"a": linear(3, 4), "b": linear(4, 2), "head": linear(4, 3)}
    return Net(layers, p), (noise(3),)


def sliced() -> Case:
    """A view of an earlier output added to."""
    p = Program()
    h = p("a", 0)
    k = p("b", p(tanh, h))
    p("head", p(tanh, p(slice_add_, h, k)))
    layers = {"a": linear(3, 4), "b": linear(4, 2), "head": linear(4, 3)}
    return Net(layers, p), (noise(3),)


def early_view() -> Case:
    """What is overwritten is a view that was made with its base."""
    p = Program()
    h = p(flat, p("a", 0))
    k = p("b", p(tanh, h))
    p("head", p(tanh, p(iadd, h, k)))
    layers = {"a": conv(2, 1), "b": linear(9, 9), "head": linear(9, 3)}
    return Net(layers, p), (noise(2, 3, 3),)


def by_itself() -> Case:
    """Overwritten twice between two layers, once by itself."""
    p = Program()
    h = p("a", 0)
    k = p("b", p(tanh, h))
    p("head", p(tanh, p(double_, h, k)))
    layers = {name: linear(3, 3) for name in ("a", "b", "head")}
    return Net(layers, p), (noise(3),)


NETS: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        *(basic_block, squeeze_excite, stream, read_before),
        *(filled, sliced, early_view, by_itself),
    )
}


def both(name: str) -> tuple[Case, Net]:
    """The net on copies with its inputs, and the one that overwrites; the same weights."""
    torch.manual_seed(0)
    written, inputs = NETS[name]()
    copied = copy.deepcopy(written)
    copied.nodes = tuple(
        Node(n.what if isinstance(n.what, str) else TWINS.get(n.what, n.what), n.sources)
        for n in written.nodes
    )
    for name, layer in copied.layers.items():
        if isinstance(layer, nn.GroupNorm):
            copied.layers[name] = PlainNorm(layer)
    return (copied, inputs), written
