# SPDX-License-Identifier: MIT
"""Small float64 nets of every kind of graph, with three outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles.graph import Net, Program
from oracles.graph_parts import (
    add,
    attend,
    cat,
    channel_gate,
    conv,
    gate,
    linear,
    mul,
    noise,
    norm,
    over_positions,
    pool,
    split_gate,
    tanh,
)

Case = tuple[Net, tuple[Tensor, ...]]


def chain() -> Case:
    """No branch at all."""
    p = Program()
    h = p(tanh, p("a", 0))
    p("head", p(tanh, p("b", h)))
    return Net({"a": linear(4, 5), "b": linear(5, 4), "head": linear(4, 3)}, p), (noise(4),)


def conv_chain() -> Case:
    """Convolutions, pooled."""
    p = Program()
    h = p(tanh, p("a", 0))
    p("head", p(pool, p(tanh, p("b", h))))
    layers = {"a": conv(2, 3), "b": conv(3, 4, 1), "head": linear(4, 3)}
    return Net(layers, p), (noise(2, 4, 4),)


def identity_skip() -> Case:
    """Two residual blocks, one of two layers."""
    p = Program()
    h = p(tanh, p("stem", 0))
    h = p(add, h, p("b", p(tanh, p("a", h))))
    h = p(add, h, p(tanh, p("c", h)))
    p("head", h)
    layers = {name: linear(4, 4) for name in ("stem", "a", "b", "c")}
    return Net(layers | {"head": linear(4, 3)}, p), (noise(4),)


def projection_skip() -> Case:
    """A layer on the skip, which runs last."""
    p = Program()
    h = p(tanh, p("stem", 0))
    inner = p("b", p(tanh, p("a", h)))
    p("head", p(tanh, p(add, inner, p("project", h))))
    layers = {"stem": linear(4, 4), "a": linear(4, 5), "b": linear(5, 3), "project": linear(4, 3)}
    return Net(layers | {"head": linear(3, 3)}, p), (noise(4),)


def conv_skip() -> Case:
    """A convolutional residual block."""
    p = Program()
    h = p(tanh, p("stem", 0))
    h = p(tanh, p(add, p("b", p(tanh, p("a", h))), h))
    p("head", p(pool, h))
    layers = {"stem": conv(2, 3), "a": conv(3, 3), "b": conv(3, 3, 1), "head": linear(3, 3)}
    return Net(layers, p), (noise(2, 4, 4),)


def concatenation() -> Case:
    """A U-shaped skip."""
    p = Program()
    h = p(tanh, p("a", 0))
    low = p(tanh, p("c", p(tanh, p("b", h))))
    p("head", p(cat, h, low))
    layers = {"a": linear(4, 3), "b": linear(3, 2), "c": linear(2, 3), "head": linear(6, 3)}
    return Net(layers, p), (noise(4),)


def densenet() -> Case:
    """Every layer reads all earlier ones, and the input."""
    p = Program()
    h = p(tanh, p(cat, 0, p("a", 0)))
    h = p(tanh, p(cat, h, p("b", h)))
    h = p(tanh, p(cat, h, p("c", h)))
    p("head", h)
    layers = {"a": linear(3, 2), "b": linear(5, 2), "c": linear(7, 2), "head": linear(9, 3)}
    return Net(layers, p), (noise(3),)


def inception() -> Case:
    """Two parallel branches, concatenated."""
    p = Program()
    h = p(tanh, p("stem", 0))
    left = p(tanh, p("one", h))
    right = p(tanh, p("three", p(tanh, p("reduce", h))))
    p("head", p(pool, p(cat, left, right)))
    layers: dict[str, nn.Module] = {"stem": conv(2, 3), "one": conv(3, 2, 1)}
    layers |= {"reduce": conv(3, 2, 1), "three": conv(2, 2), "head": linear(4, 3)}
    return Net(layers, p), (noise(2, 4, 4),)


def squeeze_excite() -> Case:
    """Channels gated by a net of their means, on a skip."""
    p = Program()
    h = p(tanh, p("stem", 0))
    features = p("a", h)
    gates = p("up", p(tanh, p("down", p(pool, features))))
    h = p(add, h, p(channel_gate, features, gates))
    p("head", p(pool, p(tanh, h)))
    layers: dict[str, nn.Module] = {"stem": conv(2, 3), "a": conv(3, 3), "down": linear(3, 2)}
    layers |= {"up": linear(2, 3), "head": linear(3, 3)}
    with torch.no_grad():  # gates that say something
        for name in ("down", "up", "head"):
            layers[name].weight.mul_(4)
    return Net(layers, p), (noise(2, 3, 3),)


def glu() -> Case:
    """A split gate, then a gate of two layers."""
    p = Program()
    h = p(split_gate, p("a", 0))
    value, gated = p("value", h), p("gate", h)
    p("head", p(gate, value, gated))
    layers = {"a": linear(4, 6), "value": linear(3, 4), "gate": linear(3, 4), "head": linear(4, 3)}
    return Net(layers, p), (noise(4),)


def product() -> Case:
    """A plain product of two branches: both factors are bilinear."""
    p = Program()
    h = p(tanh, p("a", 0))
    p("head", p(mul, p("left", h), p(tanh, p("right", h))))
    layers = {"a": linear(3, 3), "left": linear(3, 3), "right": linear(3, 3), "head": linear(3, 3)}
    return Net(layers, p), (noise(3),)


def two_towers() -> Case:
    """Two inputs, one tower each; the second input is read late."""
    p = Program(2)
    left = p(tanh, p("a2", p(tanh, p("a1", 0))))
    right = p(tanh, p("b1", 1))
    p("head", p(cat, p(mul, left, right), right))
    layers = {"a1": linear(4, 3), "a2": linear(3, 3), "b1": linear(2, 3), "head": linear(6, 3)}
    return Net(layers, p), (noise(4), noise(2))


def siamese() -> Case:
    """One layer for both inputs."""
    p = Program(2)
    left, right = p(tanh, p("tower", 0)), p(tanh, p("tower", 1))
    p("head", p(cat, p(mul, left, right), left))
    return Net({"tower": linear(4, 3), "head": linear(6, 3)}, p), (noise(4), noise(4))


def unrolled() -> Case:
    """One layer three times, between two others."""
    p = Program()
    h = p(tanh, p("stem", 0))
    for _ in range(3):
        h = p(tanh, p("core", h))
    p("head", h)
    layers = {"stem": linear(4, 3), "core": linear(3, 3), "head": linear(3, 3)}
    return Net(layers, p), (noise(4),)


def interleaved() -> Case:
    """Two layers in turn, twice, with skips: both are carried, not at the same cuts."""
    p = Program()
    h = p(tanh, p("stem", 0))
    for _ in range(2):
        h = p(add, h, p(tanh, p("b", p(tanh, p("a", h)))))
    p("head", h)
    layers = {"stem": linear(3, 3), "a": linear(3, 2), "b": linear(2, 3), "head": linear(3, 3)}
    return Net(layers, p), (noise(3),)


def shared_conv() -> Case:
    """A convolution of two scales, and its own input added to the second."""
    p = Program()
    h = p(tanh, p("stem", 0))
    first = p(tanh, p("core", h))
    second = p(tanh, p("core", p(add, h, first)))
    p("head", p(pool, p(cat, second, first)))
    layers = {"stem": conv(2, 3), "core": conv(3, 3), "head": linear(6, 3)}
    return Net(layers, p), (noise(2, 3, 3),)


def shared_norm() -> Case:
    """One LayerNorm in two places."""
    p = Program()
    h = p("stem", 0)
    h = p(add, h, p(tanh, p("a", p("norm", h))))
    p("head", p("norm", h))
    layers = {"stem": linear(4, 4), "a": linear(4, 4), "norm": norm(4), "head": linear(4, 3)}
    return Net(layers, p), (noise(4),)


def prenorm() -> Case:
    """A pre-norm residual MLP."""
    p = Program()
    h = p("stem", 0)
    for k in "12":
        h = p(add, h, p("out" + k, p(tanh, p("in" + k, p("norm" + k, h)))))
    p("head", p("norm", h))
    layers: dict[str, nn.Module] = {"stem": linear(3, 4)}
    for k in "12":
        layers |= {"norm" + k: norm(4), "in" + k: linear(4, 3), "out" + k: linear(3, 4)}
    return Net(layers | {"norm": norm(4), "head": linear(4, 3)}, p), (noise(3),)


def attention() -> Case:
    """Self-attention by hand over (B, T, d), on a skip; the mean over positions."""
    p = Program()
    h = p("stem", 0)
    parts = [p(name, h) for name in ("q", "k", "v")]
    h = p(add, h, p("out", p(attend, *parts)))
    p("head", p(over_positions, p(tanh, h)))
    layers = {"stem": linear(2, 3)} | {name: linear(3, 3) for name in ("q", "k", "v", "out")}
    return Net(layers | {"head": linear(3, 3)}, p), (noise(4, 2),)


def tied() -> Case:
    """The embedding is the output layer's weight; integer inputs."""
    p = Program()
    h = p(over_positions, p("embed", 0))
    p("head", p(add, h, p(tanh, p("a", h))))
    embed = nn.Embedding(3, 4, dtype=torch.float64)
    head = linear(4, 3, bias=False)
    head.weight = embed.weight
    layers = {"embed": embed, "a": linear(4, 4), "head": head}
    return Net(layers, p), (torch.randint(0, 3, (5, 2)),)


def summed_heads() -> Case:
    """The output is no layer's but a sum of two."""
    p = Program()
    h = p(tanh, p("a", 0))
    low = p(tanh, p("b", h))
    p(add, p("first", h), p("second", low))
    layers = {"a": linear(4, 4), "b": linear(4, 3), "first": linear(4, 3), "second": linear(3, 3)}
    return Net(layers, p), (noise(4),)


def late_activation() -> Case:
    """A branch whose activation comes after another layer: the state there is its raw output."""
    p = Program()
    h = p("a", 0)
    other = p("b", 0)
    p("head", p(add, p(tanh, h), p("c", p(gate, other, h))))
    layers = {"a": linear(3, 3), "b": linear(3, 3), "c": linear(3, 3), "head": linear(3, 3)}
    return Net(layers, p), (noise(3),)


def layer_scale() -> Case:
    """Bare parameters: a scale on the branch, an offset added to the stem's output."""
    p = Program()
    h = p(tanh, p(add, p("stem", 0), "offset"))
    h = p(add, h, p(mul, "scale", p("b", p(tanh, p("a", h)))))
    p("head", h)
    layers = {"stem": linear(4, 4), "a": linear(4, 3), "b": linear(3, 4), "head": linear(4, 3)}
    bare = {"offset": 0.1 * noise(4)[0], "scale": 0.5 + 0.1 * noise(4)[0]}
    return Net(layers, p, bare), (noise(4),)


#: Name to constructor; those without a branch or a shared layer first.
CHAINS: tuple[Callable[[], Case], ...] = (chain, conv_chain)
GRAPHS: tuple[Callable[[], Case], ...] = (
    identity_skip,
    projection_skip,
    conv_skip,
    concatenation,
    densenet,
    inception,
    squeeze_excite,
    glu,
    product,
    two_towers,
    prenorm,
    attention,
    summed_heads,
    late_activation,
)
SHARED: tuple[Callable[[], Case], ...] = (
    siamese,
    unrolled,
    interleaved,
    shared_conv,
    shared_norm,
    tied,
)
NETS = {build.__name__: build for build in (*CHAINS, *GRAPHS, *SHARED)}


#: Nets for options that every net need not be tried with.
FEW = ("projection_skip", "squeeze_excite", "interleaved")
#: Nets of which some parameters take the plain step, with a warning.
PARTLY = {"layer_scale": layer_scale}


def net(name: str, seed: int = 0) -> Case:
    """A net by name, with its inputs, always the same."""
    torch.manual_seed(seed)
    return (NETS | PARTLY)[name]()
