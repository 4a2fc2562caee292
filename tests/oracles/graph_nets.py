# SPDX-License-Identifier: MIT
"""Small float64 nets of every kind of graph, with three outputs, and random ones."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from oracles.graph import Net, Program

Case = tuple[Net, tuple[Tensor, ...]]

tanh = torch.tanh
add, mul = operator.add, operator.mul


def cat(*parts: Tensor) -> Tensor:
    """Along the features (or channels)."""
    return torch.cat(parts, 1)


def gate(x: Tensor, y: Tensor) -> Tensor:
    """x * sigmoid(y)."""
    return x * torch.sigmoid(y)


def split_gate(x: Tensor) -> Tensor:
    """GLU: one half gates the other."""
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(b)


def channel_gate(x: Tensor, y: Tensor) -> Tensor:
    """x (B, C, H, W) * sigmoid(y) (B, C)."""
    return x * torch.sigmoid(y)[:, :, None, None]


def over_positions(x: Tensor) -> Tensor:
    """Mean over all axes between the batch and the features."""
    return x.mean(1)


def pool(x: Tensor) -> Tensor:
    """Mean over the pixels."""
    return x.mean((2, 3))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, written out."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v


def linear(i: int, o: int, bias: bool = True) -> nn.Linear:
    """float64."""
    return nn.Linear(i, o, bias, dtype=torch.float64)


def conv(i: int, o: int, size: int = 3) -> nn.Conv2d:
    """float64, of the same size."""
    return nn.Conv2d(i, o, size, padding=size // 2, dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    """Inputs of five samples."""
    return torch.randn(5, *shape, dtype=torch.float64)


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


def norm(width: int) -> nn.LayerNorm:
    """A LayerNorm whose weights are not all alike."""
    layer = nn.LayerNorm(width, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


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


@st.composite
def random_nets(draw: st.DrawFn) -> Case:
    """Two to six layers of width three, each reading a random expression of earlier values.

    Layers may repeat; what nothing reads is added up before the head, so nothing is without effect.
    """
    seed, count = draw(st.integers(0, 999)), draw(st.integers(1, 5))
    torch.manual_seed(seed)
    p = Program()
    layers: dict[str, nn.Module] = {}
    values, unread = [0], {0}
    for k in range(count):
        kind = draw(st.sampled_from(["one", "add", "mul", "gate", "cat", "again"]))
        picked = [draw(st.sampled_from(values)) for _ in range(2)]
        if kind in ("one", "again"):
            picked = picked[:1]
        again = [name for name, one in layers.items() if one.in_features == 3]
        joined = {"add": add, "mul": mul, "gate": gate, "cat": cat}.get(kind)
        x = picked[0] if joined is None else p(joined, *picked)
        name = f"layer{k}"
        if kind == "again" and again:
            name = draw(st.sampled_from(again))
        else:
            layers[name] = linear(6 if kind == "cat" else 3, 3)
        h = p(name, x)
        if draw(st.booleans()):
            h = p(tanh, h)
        if draw(st.booleans()):
            h = p(add, h, draw(st.sampled_from(values)))
        unread -= {i for node in p.nodes for i in node.sources}
        unread.add(h)
        values.append(h)
    rest = sorted(unread)
    x = rest[0]
    for other in rest[1:]:
        x = p(add, x, other)
    p("head", x)
    return Net(layers | {"head": linear(3, 3)}, p), (noise(3),)
