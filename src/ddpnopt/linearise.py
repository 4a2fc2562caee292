# SPDX-License-Identifier: MIT
"""Linearisation of the recorded dynamics, while their graph is still there.

Runs when the output's gradient arrives, and keeps what the value function needs: the terminal
factor's columns pulled back to every stage, or the Jacobians of the segments between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.layers.base import unit_columns
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.terminal import Cost
from ddpnopt.typing import Tensor
from ddpnopt.value.base import ValueFunction

#: Nodes of the graph that apply one function to every entry of their one input.
ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        "Tanh Relu Sigmoid Softplus Gelu Silu Elu LeakyRelu Hardtanh Mish Hardswish LogSigmoid"
    ).split()
)
#: Their derivative as a function of their value, where it is one.
FROM_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "TanhBackward0": lambda y: torch.ones_like(y).addcmul_(y, y, value=-1),
    "SigmoidBackward0": lambda y: y * (1 - y),
    "ReluBackward0": lambda y: (y > 0).to(y.dtype),
}


def linearise(
    trajectory: Trajectory,
    z: Tensor,
    link: Link | None,
    cost: Cost,
    value: ValueFunction,
) -> None:
    """Pull the terminal factor's columns, or the segments' Jacobians, back to the stages.

    Args:
        trajectory: The pass.
        z: Its output that has just received its gradient.
        link: Edges of its stages, newest first.
        cost: The output's terminal cost.
        value: Says what is needed.
    """
    if value.linearization == "gradient" or link is None:
        return
    factor = value.linearization == "factor"
    samples = cost.w.numel()
    columns = cost.factor(value.rank) if factor else unit_columns(z, samples)
    if factor and (trajectory.path is not None or trajectory.heads or not link.x):
        _pull_to_crossings(trajectory, link, columns)
        return
    last = link.stage
    if not last.plain:
        if factor:
            last.fresh_Z["Z_h"] = columns
        else:
            last.fresh_Z["J"] = per_sample(columns, samples)
    if not any(link.x):
        return
    if factor:
        last.fresh_Z["Z_x"] = columns = _through_layer(last, columns)
    links: list[Link] = []
    before = link.before
    while before is not None:
        links.append(before)
        before = before.before
    links = [one for one in links if not one.stage.plain and one.h is not None]
    if not links:
        return
    if factor:
        _pull_columns(link, links, columns)
    else:
        _segment_jacobians(link, links, columns, samples)


def _pull_columns(link: Link, links: list[Link], Z_x: Tensor) -> None:
    """One batched back-propagation of all columns from the last layer's input to every stage."""
    inner = [one for one in links if any(one.x)]
    single = [one for one in inner if len(one.x) == 1]
    edges = [one.h for one in links] + [one.x[0] for one in single]
    found = iter(_vjp(link, Z_x, edges))
    for one in links:
        one.stage.fresh_Z["Z_h"] = one.stage.arranged(next(found), 1)
    for one in single:
        one.stage.fresh_Z["Z_x"] = one.stage.arranged(next(found), 1)
    for one in inner:
        if len(one.x) > 1:  # one input may depend on another: not what autograd has there
            one.stage.fresh_Z["Z_x"] = pulled(one.stage, one.stage.fresh_Z["Z_h"])


def _pull_to_crossings(trajectory: Trajectory, link: Link, columns: Tensor) -> None:
    """One batched back-propagation of all columns from an output to every stage and crossing."""
    # The running node itself: a hook that held its own node could never be collected.
    output = GradientEdge(torch._C._current_autograd_node(), link.number)
    links, at = [], link.before
    taps = [pair for pair in link.taps if pair[0].wanted]
    while at is not None:
        if not at.stage.plain and at.h is not None:
            links.append(at)
        taps += [pair for pair in at.taps if pair[0].wanted]
        at = at.before
    targets: list[Any] = [*(one.h for one in links), *(edge for _, edge in taps)]
    before, trajectory.columns = trajectory.columns, trajectory.columns + len(columns)
    if not link.stage.plain:
        _append(link.stage.fresh_Z, "Z_h", columns, before)
    head = trajectory.heads.get(link.stage)
    if head is not None and head.crossing is not None:
        _append(head.crossing.fresh_Z, "Z", columns, before)
    if not targets:
        return
    seed = columns[:, 0] if link.stage.unbatched else columns
    found = torch.autograd.grad(
        (output,),
        targets,
        (seed.contiguous(),),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    for one, Z in zip(links, found, strict=False):
        if Z is not None:
            _append(one.stage.fresh_Z, "Z_h", one.stage.arranged(Z, 1), before)
    for (crossing, _), Z in zip(taps, found[len(links) :], strict=True):
        if Z is not None:
            _append(crossing.fresh_Z, "Z", Z, before)


def _append(kept: dict[str, Tensor], name: str, Z: Tensor, before: int) -> None:
    """One output's columns behind those of the outputs before it."""
    if before:
        known = kept.get(name, Z[:0])
        Z = torch.cat([_padded(known, before, Z), Z])
    kept[name] = Z


def _padded(Z: Tensor, columns: int, like: Tensor) -> Tensor:
    missing = like.new_zeros(columns - len(Z), *like.shape[1:])
    return torch.cat([Z, missing]) if len(missing) else Z


def fill_columns(trajectory: Trajectory) -> None:
    """Zero columns of the outputs that a stage or crossing has no part in."""
    columns = trajectory.columns
    for stage in trajectory.stages:
        if stage.fresh_G is not None and stage.rule is not None:
            _fill(stage.fresh_Z, "Z_h", columns, stage.fresh_G)
    for one in trajectory.crossings:
        if one.fresh_g is not None:
            _fill(one.fresh_Z, "Z", columns, one.fresh_g)


def _fill(kept: dict[str, Tensor], name: str, columns: int, like: Tensor) -> None:
    kept[name] = _padded(kept.get(name, like[None][:0]), columns, like[None])


def _segment_jacobians(link: Link, links: list[Link], columns: Tensor, samples: int) -> None:
    """Jacobians of each active stage's state by the h before it; the tail goes to the output."""
    upper = link
    for one in links:
        slope = _slope(upper, one)
        if slope is not None:
            one.stage.fresh_Z["J"] = torch.diag_embed(slope.reshape(samples, -1))
        else:
            if upper is link and upper.stage.plain:
                columns = _through_layer(upper.stage, columns)
            else:
                columns = unit_columns(upper.stage.x, samples)
            (J,) = _vjp(upper, columns, [one.h])
            one.stage.fresh_Z["J"] = per_sample(one.stage.arranged(J, 1), samples)
        upper = one
        if not any(upper.x):
            break


def _slope(upper: Link, lower: Link) -> Tensor | None:
    """The derivative of a segment that is one elementwise function; None for others.

    Its Jacobian is diagonal: one gradient gives it, where a general one takes a column a unit.
    """
    edge, h = upper.x[0] if len(upper.x) == 1 else None, lower.h
    if edge is None or h is None or upper.stage.plain or upper.stage.unbatched:
        return None
    name, before = edge.node.name(), edge.node.next_functions
    if name not in ELEMENTWISE or before[:1] != ((h.node, h.output_nr),):
        return None
    if name in FROM_VALUE:
        return FROM_VALUE[name](upper.stage.x)
    ones = torch.ones_like(upper.stage.x)
    (slope,) = torch.autograd.grad((edge,), (h,), (ones,), retain_graph=True)
    return slope


def _vjp(link: Link, columns: Tensor, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Pull columns at a stage's state back to edges of the graph."""
    stage = link.stage
    columns = columns[:, 0] if stage.unbatched else columns
    parts = stage.rule.unpack(stage.module, columns) if stage.rule else (columns,)
    known: list[tuple[GradientEdge, Tensor]] = [
        (edge, part.contiguous()) for edge, part in zip(link.x, parts, strict=False) if edge
    ]
    found = torch.autograd.grad(
        tuple(edge for edge, _ in known),
        inputs,
        tuple(part for _, part in known),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    if any(p is None for p in found):
        raise UnsupportedModelError(
            "a layer's output does not reach the loss through the layers behind it; "
            "use value='moreau' or feedback=False"
        )
    return found


def _through_layer(stage: Stage, columns: Tensor) -> Tensor:
    """Columns at a stage's output to its state, by its rule or by autograd."""
    if stage.rule is not None:
        return pulled(stage, columns)
    columns = columns.to(stage.x.dtype)
    vjp: Any = torch.func.vjp(stage.module, stage.x)[1]
    back: Tensor = torch.func.vmap(lambda column: vjp(column)[0])(columns)
    return back


@torch.no_grad()
def pulled(stage: Stage, columns: Tensor) -> Tensor:
    """Columns at a stage's output to its state, by its rule."""
    assert stage.rule is not None
    dtype = next(stage.module.parameters()).dtype  # autocast may run x in a narrower one
    x = cast_state(stage.x, dtype)
    return cast_state(stage.rule.pull(stage.module, x, columns.to(dtype)), stage.x.dtype)


def second_derivative(h: Tensor, end: Tensor, V: Tensor, samples: int) -> Tensor:
    """V . sigma_hh of the function from a layer's output to the next layer's state.

    Args:
        h: The output, a leaf.
        end: The state, on h's graph.
        V: (B, X').
        samples: B.

    Returns:
        (B, H, H); zero where the function is piecewise linear.
    """
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(
            end, h, V.reshape(end.shape).to(end.dtype), create_graph=True
        )
        columns = unit_columns(h, samples)
        if not slope.requires_grad:
            return per_sample(torch.zeros_like(columns), samples)
        found = torch.autograd.grad(
            slope, h, columns, retain_graph=True, is_grads_batched=True, allow_unused=True
        )[0]
    return per_sample(torch.zeros_like(columns) if found is None else found, samples)


def cast_state(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A state in another dtype; indices stay what they are."""
    return x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype)


def per_sample(columns: Tensor, samples: int) -> Tensor:
    """(k, n, ..) to (B, k, elements)."""
    return columns.reshape(columns.shape[0], samples, -1).transpose(0, 1)


def flat(t: Tensor, samples: int) -> Tensor:
    """(B, elements)."""
    return t if t.dim() == 2 and t.shape[0] == samples else t.reshape(samples, -1)
