# SPDX-License-Identifier: MIT
"""Is what is run from the record what is written?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ddpnopt.captured.plan import Plan
from ddpnopt.captured.recording import Outcome
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist

#: How far a run may be from the code's step, as a share of it; and with half precision or TF32.
CLOSE, CLOSE_COARSE = 1e-3, 5e-2


def compare(
    plan: Plan,
    run: Callable[[Callable[[Tensor], Tensor]], Outcome | None],
    written: Callable[[], Any],
    asked: Callable[[Any], Any],
    seen: Callable[[Any], Any],
) -> tuple[Any, float | None]:
    """Run an iteration from the record and as it is written, and keep the latter's.

    Another run from the record, with all that it is given off by its rounding, tells how far runs
    may be apart that are equal but for rounding. A basis of eigenvectors, and what is written in
    it, may be any other one: it is seen by its effect on the weights.

    Args:
        plan: The record.
        run: Runs it, on what the given function makes of its inputs.
        written: Runs the iteration as it is written.
        asked: What a record makes of what the latter returns.
        seen: What is compared of that.

    Returns:
        What the latter returns, and by how much the former is too far from it, as a share of the
        step; None where the record could not be run.
    """
    before = [t.clone() for t in plan.changed]

    def left_by(outcome: Outcome) -> list[Tensor]:
        plan.settle()
        return after(outcome.state, outcome.made)

    def after(states: Sequence[Tensor], made: Any) -> list[Tensor]:
        told = [t for slot, t in zip(plan.slots, states, strict=True) if not slot.turns]
        return [t.clone() for t in (*plan.changed, *told, *_tensors(seen(made)))]

    def put_back() -> None:
        for t, old in zip(plan.changed, before, strict=True):
            t.copy_(old)

    nearby = None
    try:
        outcome = run(lambda t: t)
        if outcome is not None:
            replayed = left_by(outcome)
            put_back()
            for t in plan.changed:
                t.copy_(_shaken(t))
            shaken = [t.clone() for t in plan.changed]
            another = run(_shaken)
            nearby = None if another is None else left_by(another)
    finally:  # an interrupt may come right behind a run
        insist(put_back)
    made = written()
    if outcome is None or nearby is None:
        return made, None
    counts = [slot.found for slot, _ in plan.counts]
    if _others(outcome.made) != _others(asked(made)) or outcome.counts != counts:
        return made, math.inf
    now = after([slot.tensor for slot in plan.slots], asked(made))
    return made, _beyond(plan, (replayed, now, nearby), (before, shaken))


def _beyond(
    plan: Plan,
    ends: tuple[list[Tensor], list[Tensor], list[Tensor]],
    starts: tuple[list[Tensor], ...],
) -> float:
    """How far a run is from the code beyond what is allowed; 0 if it is not.

    Weights by what the step has changed, what else there is by what it is: some hardly changes.

    Args:
        plan: The record.
        ends: What the run, the code, and the run off by rounding have left.
        starts: What the first two and the third have begun with.
    """
    blank = [torch.zeros_like(t) for t in ends[1][len(starts[0]) :]]
    begun = [[*start, *blank] for start in starts]
    off = max(map(_apart, *ends, *begun), default=0.0)
    allowed = CLOSE_COARSE if plan.half or _tf32(plan.changed) else CLOSE
    return off if off > allowed or math.isnan(off) else 0.0


def _shaken(t: Tensor) -> Tensor:
    """A tensor off by its rounding, one entry up and the next one down."""
    if not t.is_floating_point() or t.numel() == 0:
        return t
    size = 8 * torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps
    ways = torch.ones(t.numel(), dtype=t.dtype, device=t.device)
    ways[1::2] = -1
    return t.detach() * (1 + size * ways.view(t.shape))


def _tf32(changed: Sequence[Tensor]) -> bool:
    """Whether products of 32 bits may be rounded to TensorFloat-32."""
    coarse = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return coarse and any(t.is_cuda and t.dtype == torch.float32 for t in changed)


def _tensors(made: Any) -> list[Tensor]:
    return [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]


def _others(made: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(made) if not isinstance(leaf, torch.Tensor)]


def _apart(
    replayed: Tensor, written: Tensor, nearby: Tensor, before: Tensor, shaken: Tensor
) -> float:
    """How far a replayed step is from the written one, beyond what rounding explains.

    Args:
        replayed: A tensor after a run from the record.
        written: After the code's step.
        nearby: After a run from the record from weights off by their rounding.
        before: Before the first two.
        shaken: Before the third.

    Returns:
        A share of what the step has changed.
    """
    if not written.is_floating_point():
        return 0.0 if torch.equal(replayed, written) else math.inf
    wide = torch.promote_types(written.dtype, torch.float32)
    a, b, c, start, other = (t.to(wide) for t in (replayed, written, nearby, before, shaken))
    rounding = 8 * torch.finfo(written.dtype).eps * float(b.norm())
    explained = rounding + 10 * float(((c - other) - (a - start)).norm())
    beyond, size = max(0.0, float((a - b).norm()) - explained), float((b - start).norm())
    if size > 0:
        return beyond / size
    return math.inf if beyond > 0 else 0.0
