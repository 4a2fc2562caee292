# SPDX-License-Identifier: MIT
"""Nets as explicit lists of nodes, and their states at the cuts between layers.

The same list runs as a plain module and, piece by piece, as a dynamical system: the state at the
cut before a layer is the vector of all tensors that exist there and are still read, and of the
weights of layers that have run already and run again. Found by liveness on the list, which has
nothing in common with how a recorded pass is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from oracles.flat import Inner, apply, flatten

Values = dict[int, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Node:
    """A layer by its name, or a function, applied to values by their indices.

    A function may read a bare parameter, by its name.
    """

    what: str | Callable[..., Tensor]
    sources: tuple[int | str, ...]


class Program:
    """A list of nodes under construction; calling it appends a node and returns its value's index.

    Args:
        inputs: How many values the net is called with; they have the first indices.
    """

    def __init__(self, inputs: int = 1) -> None:
        """Start empty."""
        self.inputs = inputs
        self.nodes: list[Node] = []

    def __call__(self, what: str | Callable[..., Tensor], *sources: int | str) -> int:
        """Append a node."""
        self.nodes.append(Node(what, sources))
        return self.inputs + len(self.nodes) - 1


class Net(nn.Module):
    """A program and its layers as a module like any other; the last value is its output.

    Layers that hold the same parameters are one control, named like the first of them.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        program: Program,
        bare: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store them; ``bare`` are parameters that are no layer's."""
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.bare = nn.ParameterDict(bare or {})
        self.nodes, self.inputs = tuple(program.nodes), program.inputs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the list."""
        values = list(inputs)
        for node in self.nodes:
            arguments = [self.bare[i] if isinstance(i, str) else values[i] for i in node.sources]
            run = self.layers[node.what] if isinstance(node.what, str) else node.what
            values.append(run(*arguments))
        return values[-1]

    @property
    def controls(self) -> dict[str, str]:
        """Layer name to the name of its control."""
        owners: dict[tuple[int, ...], str] = {}
        return {
            name: owners.setdefault(tuple(id(p) for p in layer.parameters()), name)
            for name, layer in self.layers.items()
        }


@dataclass(frozen=True)
class Stage:
    """One time step: the nodes from a layer's up to the next layer's.

    Attributes:
        start: Index of the layer's node.
        stop: Index of the next layer's node, or the number of nodes.
        owner: The layer's control.
        control: The same at its first execution; None where it has moved already.
    """

    start: int
    stop: int
    owner: str
    control: str | None


class System:
    """A net at given weights as a dynamical system, one sample at a time.

    Args:
        net: The net.
        weights: Each control's flat vector, and the bare parameters, by name.
        inputs: Batch first; integer ones are data, no part of the state.
    """

    def __init__(self, net: Net, weights: Weights, inputs: Sequence[Tensor]) -> None:
        """Run the net, and find the cuts."""
        self.net, self.weights = net, dict(weights)
        owners = net.controls
        at = [k for k, node in enumerate(net.nodes) if isinstance(node.what, str)]
        names = [owners[str(net.nodes[k].what)] for k in at]
        self.stages = [
            Stage(k, stop, name, None if name in names[:i] else name)
            for i, (k, stop, name) in enumerate(
                zip(at, [*at[1:], len(net.nodes)], names, strict=True)
            )
        ]
        self.data = {i: x for i, x in enumerate(inputs) if not x.is_floating_point()}
        self.values = self.run(0, len(net.nodes), dict(enumerate(inputs)), self.weights)
        self.states = [self.pack(t, self.values, self.weights) for t in range(len(self.stages) + 1)]

    @property
    def batch(self) -> int:
        """B."""
        return len(self.values[0])

    def run(self, start: int, stop: int, values: Values, weights: Weights) -> Values:
        """The values together with those of the nodes from ``start`` to ``stop``."""
        values, owners = dict(values), self.net.controls
        for k in range(start, stop):
            node = self.net.nodes[k]
            arguments = [weights[i] if isinstance(i, str) else values[i] for i in node.sources]
            if isinstance(node.what, str):
                layer = self.net.layers[node.what]
                found = apply(layer, weights[owners[node.what]], arguments[0])
            else:
                found = node.what(*arguments)
            values[self.net.inputs + k] = found
        return values

    def live(self, t: int) -> list[int]:
        """The floating-point values in the state at cut t."""
        if t == len(self.stages):
            return [self.net.inputs + len(self.net.nodes) - 1]
        start = self.stages[t].start
        read = {i for node in self.net.nodes[start:] for i in node.sources if isinstance(i, int)}
        return sorted(i for i in read if i < self.net.inputs + start and i not in self.data)

    def carried(self, t: int) -> list[str]:
        """The controls in the state at cut t: moved already, and used again."""
        before = {stage.owner for stage in self.stages[:t]}
        return sorted(before & {stage.owner for stage in self.stages[t:]})

    def pack(self, t: int, values: Values, weights: Weights) -> Tensor:
        """The state at cut t (B, X)."""
        rows = len(values[0]) if 0 in values else 1
        parts = [torch.zeros(rows, 0, dtype=torch.float64)]
        parts += [values[i].flatten(1) for i in self.live(t)]
        return torch.cat(parts + [weights[c].expand(rows, -1) for c in self.carried(t)], 1)

    def unpack(self, t: int, state: Tensor) -> tuple[Values, Weights]:
        """One sample's values (batch of one) and the weights it is computed with."""
        values, weights, at = {}, dict(self.weights), 0
        for i in self.live(t):
            shape = self.values[i].shape[1:]
            values[i] = state[at : at + shape.numel()].reshape(1, *shape)
            at += shape.numel()
        for c in self.carried(t):
            weights[c] = state[at : at + len(weights[c])]
            at += len(weights[c])
        return values, weights

    def advance(self, t: int, stop: int, state: Tensor, u: Tensor | None, data: Values) -> Tensor:
        """One sample's state at cut ``stop``, from that at cut t and the control there."""
        values, weights = self.unpack(t, state)
        values |= {i: x[None] for i, x in data.items()}
        control = self.stages[t].control
        if control is not None and u is not None:
            weights[control] = u
        end = self.stages[stop].start if stop < len(self.stages) else len(self.net.nodes)
        values = self.run(self.stages[t].start, end, values, weights)
        return self.pack(stop, values, weights)[0]

    def jacobians(self, t: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Per sample, of the state at cut ``stop`` with respect to that at t and the control."""
        control = self.stages[t].control
        u = None if control is None else self.weights[control]

        def f(state: Tensor, u: Tensor | None, data: Values) -> Tensor:
            return self.advance(t, stop, state, u, data)

        at = self.states[t], u, self.data
        f_x = vmap(jacrev(f, 0), (0, None, 0))(*at)
        return f_x, None if u is None else vmap(jacrev(f, 1), (0, None, 0))(*at)


class GraphOracle:
    """Repeated steps on a net: a subclass finds the policies, and the rollout is here.

    Bare parameters take the borrowed optimizer's step before the rollout.

    Args:
        net: The net; its weights are copied, never changed.
        inner: The borrowed optimizer.
    """

    def __init__(self, net: Net, inner: Inner) -> None:
        """Copy the weights."""
        self.net, self.inner = net, inner
        self.weights = {
            control: flatten(net.layers[control]) for control in set(net.controls.values())
        }
        self.weights |= {name: p.detach().clone() for name, p in net.bare.items()}

    loss: Callable[[Tensor], Tensor]

    def policy(self, t: int, dx: Tensor) -> Tensor:
        """The new flat vector of the control at stage t, given the state's change (B, X)."""
        raise NotImplementedError

    def rollout(self, system: System, inputs: Sequence[Tensor]) -> None:
        """Run the true net with the policies; store the new weights."""
        weights = self.weights | self.plain_steps(system, inputs)
        values = system.run(0, system.stages[0].start, dict(enumerate(inputs)), weights)
        for t, stage in enumerate(system.stages):
            if stage.control is not None:
                dx = system.pack(t, values, weights) - system.states[t]
                weights[stage.control] = self.policy(t, dx.expand(system.batch, -1))
            values = system.run(stage.start, stage.stop, values, weights)
        self.weights = weights

    def plain_steps(self, system: System, inputs: Sequence[Tensor]) -> Weights:
        """The bare parameters after the borrowed optimizer's step."""
        names = list(self.net.bare)
        if not names:
            return {}
        bare = {name: self.weights[name].clone().requires_grad_() for name in names}
        values, end = dict(enumerate(inputs)), len(self.net.nodes)
        z = system.run(0, end, values, self.weights | bare)[self.net.inputs + end - 1]
        G = torch.autograd.grad(self.loss(z), list(bare.values()))
        stepped = {}
        for k, (name, g) in enumerate(zip(names, G, strict=True)):
            key = -1 - k  # beside the stages' states
            self.inner.v[key] = self.inner.moment(key, g**2)
            m = self.inner.diagonal(self.inner.v[key])
            stepped[name] = self.inner.update(key, self.weights[name], g, m)
        return stepped

    def assert_equals(self, net: Net, tolerance: float = 1e-9) -> None:
        """A trained net has these weights, relative to their size."""
        for name, want in self.weights.items():
            got = net.bare[name] if name in net.bare else flatten(net.layers[name])
            error = float((got.detach() - want).abs().max() / want.abs().max().clamp(min=1.0))
            assert error <= tolerance, f"{name}: relative error {error:.2e}"
