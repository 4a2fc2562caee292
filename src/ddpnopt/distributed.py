# SPDX-License-Identifier: MIT
"""Training over several ranks: as one process on all samples.

The loss is the mean of the ranks' losses, as DistributedDataParallel has it: p.grad is the mean of
the ranks' gradients, and every sample's w and G are those of its rank over W. So a step's
recursion runs with r / W for r, everything that belongs to one sample is right where its rank
computes it, and what belongs to the batch is a sum over the ranks: the statistics of M before they
are squared or inverted, the two sums in rho, and d of each layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from ddpnopt.checks import usable
from ddpnopt.company import checksum
from ddpnopt.errors import NonFiniteError, RankError, UnsupportedModelError
from ddpnopt.front import corrections
from ddpnopt.gradients import dense_gradients
from ddpnopt.notices import ANOTHER_NOT_RECOGNISED, DEFAULT_GROUP, UNEVEN
from ddpnopt.recognition import Recogniser
from ddpnopt.reweighting import Reweighing, write
from ddpnopt.spread import check_ranks, check_reduced
from ddpnopt.stages import Trajectory
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.engine import Engine

#: Numbers of one total of gradients: what is communicated is copied once.
BUCKET = 1 << 23
NO, WAITS, READY = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class Fact:
    """What a rank tells the others, before they act on it together.

    Attributes:
        layers: Mark of what it has run.
        ready: Its passes take part in feedback; or wait for the other ranks' rows.
        samples: How many.
        unit: w of its samples, where all have the same; else 0.
        grads: Mark of which parameters have a gradient.
        again: Its passes can be run again.
        whole: p.grad is the ranks' mean already, and nothing else.
        norm: Sum of the norms of p.grad.
        weights: Checksum of the weights.
    """

    layers: float
    ready: float
    samples: float
    unit: float
    grads: float
    again: float
    whole: float = 0.0
    norm: float = 0.0
    weights: float = 0.0


# When a backward pass has ended --------------------------------------------------------------


def backward_ended(engine: Engine, trajectories: list[Trajectory]) -> None:
    """Average p.grad over the ranks where nobody else does; in open loop, re-weight it.

    Args:
        engine: Its backward pass and all reductions of it are over.
        trajectories: The passes that it came through.
    """
    if not trajectories or not (engine.company.averages or engine.in_backward):
        return
    try:
        check_ranks(engine)
    except UnsupportedModelError as error:  # raised at the step, where it is expected
        trajectories[0].error = error
        return
    with engine.company.ranks.together(engine.parameters()):
        facts = _exchange(engine, trajectories)
        ready = min(fact.ready for fact in facts)
        if ready == WAITS:
            ready = READY if _recognised(engine, trajectories) else NO
            facts = _exchange(engine, trajectories)
        if engine.company.averages:
            _average(engine, trajectories, facts)
        if engine.in_backward:
            _reweigh(engine, trajectories, facts, ready == READY)


def _exchange(
    engine: Engine, trajectories: list[Trajectory], norm: float = 0.0, weights: float = 0.0
) -> list[Fact]:
    """Every rank's facts."""
    ready = all(usable(t) for t in trajectories)
    waits = not ready and len(trajectories) == 1 and _waits(engine, trajectories[0])
    structure = [
        ([(s.name, not s.plain, s.G is not None) for s in t.stages], t.front is not None)
        for t in trajectories[:1]
    ]
    units = [t.cost.w[t.cost.w > 0] for t in trajectories if t.cost is not None]
    w = torch.cat(units) if ready and units else torch.zeros(0)
    low, high = (float(one) for one in w.aminmax()) if w.numel() else (0.0, 0.0)
    ddp, own = engine.company.replica, engine.expected()
    reduced = engine.host.sharded or (ddp is not None and ddp.require_forward_param_sync)
    mine = Fact(
        layers=float(_mark(structure)),
        ready=READY if ready else WAITS if waits else NO,
        samples=float(sum(t.samples for t in trajectories)),
        unit=low if high <= low * (1 + 1e-3) else 0.0,
        grads=float(_mark([p.grad is None for p in own])),
        again=float(all(t.call is not None for t in trajectories)),
        whole=float(reduced and not engine.base),
        norm=norm,
        weights=weights,
    )
    return [Fact(*row) for row in engine.company.ranks.meet(*astuple(mine))]


def _mark(thing: object) -> int:
    return zlib.crc32(repr(thing).encode())


def _share(engine: Engine, facts: Sequence[Fact]) -> float:
    """What this rank's loss is multiplied by, times W: 1 for equal batches.

    The mean over all samples of a loss that is a mean over each rank's own weights the ranks by
    their counts: 1 / w where all samples have one w (so that rows without a label don't count, and
    a sum stays a sum), else the samples. Where there is DistributedDataParallel its average holds.
    """
    if engine.company.replica is not None:
        return 1.0
    counts = [fact.samples for fact in facts]
    if all(fact.unit > 0 for fact in facts):
        own = [1 / fact.unit for fact in facts]
        ratios = [a / b if b else 0.0 for a, b in zip(own, counts, strict=True)]
        # Counts are exact, fitted weights are not.
        counts = counts if max(ratios) <= min(ratios) * (1 + 1e-3) else own
    total = sum(counts)
    share = counts[engine.company.ranks.rank] * len(counts) / total if total else 1.0
    return 1.0 if abs(share - 1) < 1e-3 / len(counts) else share


def _average(engine: Engine, trajectories: list[Trajectory], facts: Sequence[Fact]) -> None:
    """p.grad of this pass becomes the ranks' weighted mean."""
    share, ranks = _share(engine, facts), engine.company.ranks
    present = len({fact.grads for fact in facts}) == 1
    own = [p for p in engine.expected() if p.grad is not None or not present]
    for p in own:
        if p.grad is not None and p.grad.is_sparse:
            raise UnsupportedModelError(
                f"'{engine.names()[p]}' has a sparse gradient, which is not averaged over the "
                "ranks; make the layer with sparse=False, or use DistributedDataParallel"
            )
    buckets: list[dict[Tensor, Tensor]] = [{}]
    room = BUCKET
    for p in own:
        if room < p.numel() and buckets[-1]:
            buckets.append({})
            room = BUCKET
        base, grad = engine.base.get(p), p.grad
        passed = torch.zeros_like(p) if grad is None else grad if base is None else grad - base
        buckets[-1][p] = passed * (share / ranks.size)
        room -= p.numel()
    ranks.announce([sum(p.numel() for p in bucket) for bucket in buckets if bucket])
    for bucket in buckets:
        for p, mean in ranks.total(bucket).items() if bucket else ():
            base = engine.base.get(p)
            mean = mean if base is None else base + mean
            p.grad = mean.clone() if p.grad is None else p.grad.copy_(mean)
    ddp = engine.company.replica
    if ddp is not None:  # told not to reduce, it is to keep its buffers alike all the same
        ddp.require_forward_param_sync = True
    for trajectory in trajectories:
        trajectory.share = share


def _reweigh(
    engine: Engine, trajectories: list[Trajectory], facts: Sequence[Fact], ready: bool
) -> None:
    """Write the re-weighted gradients to p.grad, the same on every rank, or leave it plain."""
    if not ready:
        for trajectory in trajectories:
            trajectory.cost = None  # another rank's loss is not recognised
        return
    if len({fact.layers for fact in facts}) > 1:
        trajectories[0].error = _other_layers(trajectories[0])
        return
    # Sparse gradients are plain, and DistributedDataParallel has averaged them.
    ranks, grads = engine.company.ranks, dense_gradients(engine.expected())
    _weigh(trajectories)
    if not engine.company.averages:
        if all(fact.whole for fact in facts):
            engine.base = {}
        else:
            base = engine.base
            passed = {p: g - base[p] if p in base else g for p, g in grads.items()}
            engine.base = {p: grads[p] - one for p, one in _mean(engine, passed).items()}
    try:
        with ranks.together(engine.parameters()):
            scale = 1 / ranks.size
            step = engine.new_step(trajectories, engine.rescale * scale, scale)
            found = corrections(step)
            if engine.host.sharded:
                check_reduced(step)
            given = {p: found[p] if p in found else torch.zeros_like(p) for p in grads}
            mean = _mean(engine, given)
    except (NonFiniteError, UnsupportedModelError, RankError) as error:
        trajectories[0].error = error  # p.grad is still plain
        return
    write(engine, Reweighing.of(engine, step, mean))


def _mean(engine: Engine, given: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The ranks' mean."""
    found = engine.company.ranks.total(given) if given else {}
    return {p: one / engine.company.ranks.size for p, one in found.items()}


def _weigh(trajectories: Sequence[Trajectory]) -> None:
    for trajectory in trajectories:
        if trajectory.share != 1.0:
            trajectory.weigh(trajectory.share)
            trajectory.share = 1.0


# At a step ------------------------------------------------------------------------------------


def agree(
    engine: Engine,
    trajectories: list[Trajectory],
    ready: bool,
    sizes: Mapping[Tensor, float | Tensor],
) -> bool:
    """Whether a step has feedback: the same on every rank.

    Args:
        engine: About to step.
        trajectories: Its passes.
        ready: They take part in feedback, as far as this rank knows.
        sizes: The norms of p.grad.

    Raises:
        RankError: The ranks' weights or gradients differ.
        UnsupportedModelError: They have run different layers, or what can't be reduced.
    """
    ranks = engine.company.ranks
    if not ranks.several:
        return ready
    if engine.company.process_group is None:
        engine.notices.say(DEFAULT_GROUP)
    facts = _exchange(
        engine,
        trajectories,
        norm=math.fsum(map(float, sizes.values())),
        weights=float(checksum(engine.parameters())) if engine.company.due else 0.0,
    )
    engine.company.compared += 1
    if len({fact.weights for fact in facts}) > 1:
        raise RankError(
            "the ranks' weights differ: start all from the same ones (a seed, a checkpoint, or "
            "DistributedDataParallel, which hands out rank 0's), and change them on all ranks alike"
        )
    if len({(fact.norm, fact.grads) for fact in facts}) > 1:
        raise RankError(
            f"p.grad differs between the ranks (sums of norms {[fact.norm for fact in facts]}): "
            "the last backward pass ran under no_sync, or around DistributedDataParallel, or "
            "p.grad was changed on some ranks only"
        )
    if engine.options.feedback is False or not trajectories:
        return ready
    if len({fact.layers for fact in facts}) > 1:
        raise _other_layers(trajectories[0])
    least = min(fact.ready for fact in facts)
    if least == NO:
        if ready:
            engine.notices.say(ANOTHER_NOT_RECOGNISED)
        return False
    if least == WAITS and not _recognised(engine, trajectories):
        return False
    if engine.company.replica is not None and len({fact.samples for fact in facts}) > 1:
        engine.notices.say(UNEVEN)
    if not all(fact.again for fact in facts):
        for trajectory in trajectories:
            trajectory.call = None  # no rank rolls out what another one can't
    _weigh(trajectories)
    return True


def _other_layers(trajectory: Trajectory) -> UnsupportedModelError:
    names = ", ".join(stage.name for stage in trajectory.active)
    return UnsupportedModelError(
        f"the ranks have run different layers (this one: {names}); run the same on every rank"
    )


def _waits(engine: Engine, trajectory: Trajectory) -> bool:
    """Whether a pass's rows alone could not tell the loss, and several ranks' may."""
    stage, auto = trajectory.stages[-1], engine.options.terminal == "auto"
    clean = trajectory.error is None and not trajectory.refusal and trajectory.owned
    simple = engine.options.value.linearization == "gradient" and not trajectory.boundary
    if not (auto and clean and simple) or stage.G is None or trajectory.z is None:
        return False
    undecided = trajectory.cost is None and engine.outputs.main.decision != "unrecognised"
    return undecided and stage.G.numel() > 0 and bool(stage.G.isfinite().all())


def _recognised(engine: Engine, trajectories: list[Trajectory]) -> bool:
    """Whether the rows of all ranks together tell the loss; then every pass has its cost."""
    trajectory = trajectories[0]
    z, stage = trajectory.z, trajectory.stages[-1]
    assert z is not None and stage.G is not None
    found = engine.company.ranks.gathered((z.cpu(), stage.G.cpu(), trajectory.samples))
    axis = stage.rule.feature_axis if stage.rule is not None else -1
    outputs, gradients, samples = zip(*found, strict=True)
    # A sum, or means over as many rows on each rank; else means over the rows with a gradient.
    counted = [G * int(G.movedim(axis, -1).any(-1).sum()) for G in gradients]
    for scaled in (gradients, counted):
        together = Recogniser("auto")
        if together(torch.cat(outputs), torch.cat(scaled), axis, sum(samples)) is None:
            continue
        if trajectory.cost is None:
            known = together.state_dict()
            # Its w is that of all rows; this rank's own is fitted anew.
            engine.outputs.main.load_state_dict({**known, "weights": {}, "common": 0.0})
            trajectory.cost = engine.outputs.main(z, stage.G, axis, trajectory.samples)
        break
    return all(row[0] for row in engine.company.ranks.meet(float(trajectory.cost is not None)))
