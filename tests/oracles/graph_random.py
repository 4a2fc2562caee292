# SPDX-License-Identifier: MIT
"""Random small nets: skips, sums, products, gates, concatenations, layers used again."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from oracles.graph import Net, Program
from oracles.graph_nets import Case
from oracles.graph_parts import add, cat, gate, linear, mul, noise, tanh


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
