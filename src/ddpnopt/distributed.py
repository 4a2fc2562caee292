# SPDX-License-Identifier: MIT
"""The open loop over several ranks of DistributedDataParallel: as one process on all samples.

Each rank's loss is the mean over its own samples, and DistributedDataParallel averages p.grad over
the W ranks: a uniform rescaling by 1/W of what the ranks' own backward passes leave. So P becomes
P / W, and everything that belongs to one sample is right where its rank computes it. Three things
belong to the batch: the plain gradient, rho, and the sum of the corrections. They are reduced
here, once backward has ended and DistributedDataParallel has finished; every rank issues the same
collectives in the same order, whatever it has found, and all ranks decide alike.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from ddpnopt.checks import usable
from ddpnopt.errors import NonFiniteError, UnsupportedModelError
from ddpnopt.front import corrections
from ddpnopt.ranks import Ranks, several
from ddpnopt.recognition import Recogniser
from ddpnopt.stages import Trajectory
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.engine import Engine

NOT_REPLICATED = (
    "torch.distributed is initialised with several ranks, but the model was not run by "
    "DistributedDataParallel, so its gradients can't be reduced along with the re-weighting; call "
    "DistributedDataParallel(model), or remove() the open loop"
)


def check_shards(model: nn.Module) -> None:
    """Refuse models whose parts or samples are spread over the ranks.

    Raises:
        UnsupportedModelError: The module is named.
    """
    if not several():
        return
    for name, p in model.named_parameters():
        if hasattr(p, "placements"):
            raise UnsupportedModelError(
                f"'{name}' is a DTensor (fully_shard, tensor parallelism): its gradient is spread "
                "over the ranks; use DistributedDataParallel, or remove() the open loop"
            )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedModelError(
                f"'{name or 'model'}' is FullyShardedDataParallel, which flattens the layers' "
                "parameters; use DistributedDataParallel, or remove() the open loop"
            )
        if isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedModelError(
                f"'{name}' is SyncBatchNorm, which mixes samples of different ranks; use BatchNorm "
                "or GroupNorm"
            )


def reweigh(engine: Engine, trajectories: list[Trajectory], ranks: Ranks | None) -> None:
    """Write the re-weighted gradients to p.grad, the same on every rank, or leave it plain.

    Args:
        engine: In open loop; its backward pass and all reductions of it are over.
        trajectories: The passes that it came through.
        ranks: None where no DistributedDataParallel runs the model: an error at the step.
    """
    try:
        check_shards(engine.model)
        _check_value(engine)
        if ranks is None:
            raise UnsupportedModelError(NOT_REPLICATED)
        inside = {id(p) for p in ranks.replica.module.parameters()}
        for p, name in engine.names().items():
            if engine.trainable(p) and id(p) not in inside:
                raise UnsupportedModelError(
                    f"'{name}' is outside the model's DistributedDataParallel, so its gradient is "
                    "not reduced over the ranks; wrap the module that owns all parameters"
                )
        if ranks.replica._join_config.enable:
            raise UnsupportedModelError(
                "DistributedDataParallel.join() lets ranks run out of batches, and those would "
                "not take part in the re-weighting; give all ranks the same number of batches"
            )
    except UnsupportedModelError as error:  # the same on all ranks
        trajectories[0].error = error
        return
    own = [p for p in engine.parameters() if p.requires_grad]
    plain = _agreed(engine, trajectories, ranks, own)
    if plain is None:
        return
    engine.base = plain
    step = engine.new_step(trajectories, engine.rescale / ranks.size, 1 / ranks.size)
    step.pool, ranks.pooled = ranks.pool, 0
    failure: NonFiniteError | UnsupportedModelError | None = None
    found: dict[Tensor, Tensor] = {}
    try:
        found = corrections(step)
    except (NonFiniteError, UnsupportedModelError) as error:
        failure = error
        layers, cost = len(trajectories[0].active), trajectories[0].cost
        coupled = getattr(engine.options.value, "coupling", False)
        if layers and coupled and not ranks.pooled and cost is not None:
            ranks.pool(cost.w.new_zeros(layers + 1))  # the other ranks wait for it
    reduced, failed = ranks.mean(found, own, failure is not None)
    if failed:
        trajectories[0].error = failure or UnsupportedModelError(
            "another rank could not re-weight its samples; its own error says why"
        )
        return
    engine.write(step, {p: one for p, one in reduced.items() if p.grad is not None})


def _check_value(engine: Engine) -> None:
    """Refuse value functions that look at all samples at once."""
    value = engine.options.value
    fed = any(
        hyper.curvature.statistics != "none" for hyper in engine.host.borrow({}).hyper.values()
    )
    if value.linearization == "jacobian" or (value.statistics == "value" and fed):
        raise UnsupportedModelError(
            f"value={value.name!r} with statistics={value.statistics!r} is not reduced over the "
            "ranks; use value='moreau'"
        )


def _agreed(
    engine: Engine, trajectories: list[Trajectory], ranks: Ranks, own: list[Tensor]
) -> dict[Tensor, Tensor] | None:
    """What p.grad holds besides this pass's own gradient over all ranks; None: leave it plain."""
    ready = all(usable(t) for t in trajectories)
    waits = not ready and len(trajectories) == 1 and _waits(engine, trajectories[0])
    # Reduced already, and nothing else in it: known without another reduction.
    whole = ranks.replica.require_forward_param_sync and not engine.base
    structure = [([s.name for s in t.active], t.front is not None) for t in trajectories[:1]]
    mark = zlib.crc32(repr(structure).encode())
    numbers = [ready or waits, ready, whole, mark, -mark]
    takes_part, all_ready, all_whole, low, high = ranks.least(numbers, own[0].device)
    if takes_part and not all_ready:
        all_ready = _recognised(engine, trajectories, ranks, own[0].device)
    if not (takes_part and all_ready):
        for trajectory in trajectories:
            trajectory.cost = None  # another rank's loss is not recognised
        return None
    if low != -high:
        trajectories[0].error = UnsupportedModelError(
            "the ranks have run different layers (this one: "
            f"{', '.join(structure[0][0])}); run the same on every rank"
        )
        return None
    if all_whole:
        return {}
    grads = {p: p.grad for p in own if p.grad is not None}
    passed = {p: g - engine.base[p] if p in engine.base else g for p, g in grads.items()}
    reduced, _ = ranks.mean(passed, own, False)
    return {p: g - reduced[p] for p, g in grads.items()}


def _waits(engine: Engine, trajectory: Trajectory) -> bool:
    """Whether a pass's rows alone could not tell the loss, and several ranks' may."""
    stage, auto = trajectory.stages[-1], engine.options.terminal == "auto"
    clean = trajectory.error is None and not trajectory.refusal and trajectory.owned
    simple = engine.options.value.linearization == "gradient" and not trajectory.boundary
    if not (auto and clean and simple) or stage.G is None or trajectory.z is None:
        return False
    undecided = trajectory.cost is None and engine.outputs.main.decision != "unrecognised"
    return undecided and stage.G.numel() > 0 and bool(stage.G.isfinite().all())


def _recognised(
    engine: Engine, trajectories: list[Trajectory], ranks: Ranks, device: torch.device
) -> bool:
    """Whether the rows of all ranks together tell the loss; then every pass has its cost."""
    trajectory = trajectories[0]
    z, stage = trajectory.z, trajectory.stages[-1]
    assert z is not None and stage.G is not None
    found = ranks.gathered((z.cpu(), stage.G.cpu(), trajectory.samples))
    axis = stage.rule.feature_axis if stage.rule is not None else -1
    together = Recogniser("auto")
    outputs, gradients, samples = zip(*found, strict=True)
    known = together(torch.cat(outputs), torch.cat(gradients), axis, sum(samples))
    if known is not None and trajectory.cost is None:
        engine.outputs.main.load_state_dict(together.state_dict())
        trajectory.cost = engine.outputs.main(z, stage.G, axis, trajectory.samples)
    return bool(ranks.least([trajectory.cost is not None], device)[0])
