# SPDX-License-Identifier: MIT
"""What can't be trained over several ranks, each with an error that names it and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpnopt.dtensors import spread_out
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.value.augmented import Augmented

if TYPE_CHECKING:
    from ddpnopt.engine import Engine
    from ddpnopt.step import Step

#: What is further off than rounding in half precision takes it: a factor, another pass.
FAR = 0.3

NOT_REPLICATED = (
    "torch.distributed is initialised with several ranks, but the model was not run by "
    "DistributedDataParallel, so its gradients can't be reduced along with the re-weighting; call "
    "DistributedDataParallel(model) or fully_shard(model), or remove() the open loop"
)


def check_shards(engine: Engine) -> None:
    """Refuse modules that share parameters or samples out to the ranks, but for open loop's.

    Raises:
        UnsupportedModelError: The module is named.
    """
    if engine.host.sharded and engine.options.value.linearization != "gradient":
        raise UnsupportedModelError(
            f"value={engine.options.value.name!r} linearises the model inside the backward pass, "
            "where fully_shard's own hooks would run; use value='moreau' or 'gauss_newton'"
        )
    for name, module in engine.model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedModelError(
                f"'{name or 'model'}' is FullyShardedDataParallel, which flattens the layers' "
                "parameters; use DistributedDataParallel, or the optimizer without feedback"
            )
        if isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedModelError(
                f"'{name}' is SyncBatchNorm, which mixes samples of different ranks; use BatchNorm "
                "or GroupNorm"
            )


def check_whole(engine: Engine) -> None:
    """Refuse parameters of which each rank holds a part, but for open loop's.

    Raises:
        UnsupportedModelError: The parameter is named.
    """
    if engine.host.sharded or not (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        return
    parts = [name for name, p in engine.model.named_parameters() if spread_out(p)]
    if not parts:
        return
    # A unit's length is that of all its parts.
    bounded = any(one.curvature.relative for one in engine.host.borrow({}).hyper.values())
    if engine.options.feedback is False and not (bounded or engine.company.ranks.several):
        return  # distributed=False: exactly the borrowed optimizer
    way = "call open_loop(model, optimizer) after fully_shard, or use DistributedDataParallel"
    if bounded:
        way = (
            "use DistributedDataParallel, or leave trust out and call open_loop(model, optimizer) "
            "after fully_shard"
        )
    raise UnsupportedModelError(
        f"'{parts[0]}' is a DTensor (fully_shard, tensor parallelism): its gradient is spread "
        f"over the ranks; {way}"
    )


def check_parts(engine: Engine) -> None:
    """Refuse models, value functions and methods that can't be spread over several ranks.

    Raises:
        UnsupportedModelError: Named, with the way out.
    """
    check_whole(engine)  # with distributed=False, too
    if not engine.company.ranks.several:
        return
    check_shards(engine)
    augmented = "value='augmented'" if isinstance(engine.options.value, Augmented) else ""
    alone = engine.alone or augmented
    if alone:
        raise UnsupportedModelError(
            f"{alone} needs all samples of the batch in one process and is not reduced over "
            "several ranks; use DDPNOpt or Feedback in their default mode, which are, or train in "
            "one process"
        )


def check_ranks(engine: Engine) -> None:
    """The same, and how the model is run, now and then; the same on all ranks.

    Raises:
        UnsupportedModelError: Named, with the way out.
    """
    company = engine.company
    if not company.ranks.several:
        return
    if company.due:
        check_parts(engine)
    if company.replica is None:
        engine.host.check_pass()
        if not company.reduces and not engine.host.sharded:
            raise UnsupportedModelError(NOT_REPLICATED)
        return
    if company.replica._join_config.enable:
        raise UnsupportedModelError(
            "DistributedDataParallel.join() lets ranks run out of batches, and those would not "
            "take part in the others' steps; give all ranks the same number of batches "
            "(DistributedSampler, drop_last=True)"
        )
    if company.due:
        _check_replica(engine, company.replica)


def check_reduced(step: Step) -> None:
    """The gradient of a sharded pass must be the ranks' mean.

    Nothing public says by which factor `fully_shard` reduces: one small parameter's gradient is
    made again by its layer's rule, and averaged here.

    Raises:
        UnsupportedModelError: It is not; the parameter is named.
    """
    layers = step.layers.values()
    parameters = [(layer, name, p) for layer in layers for name, p in layer.params.items()]
    if not parameters:
        return
    layer, name, p = min(parameters, key=lambda one: one[2].numel())
    made = step.ranks.total({name: layer.weighted(layer.plain_vectors())[name]})[name]
    made = made / step.ranks.size
    known = step.plain_gradient(name, p)
    size = max(float(made.norm()), 0.0 if known is None else float(known.norm()))
    if known is None or float((made - known).norm()) > FAR * size:
        raise UnsupportedModelError(
            f"the gradient of '{layer.name}.{name}' is not the mean of the ranks' gradients of "
            "this pass: leave set_gradient_divide_factor of the sharded modules as it is"
        )


def _check_replica(engine: Engine, ddp: DistributedDataParallel) -> None:
    """DistributedDataParallel must average what the optimizer steps on, over the same ranks."""
    inside = {id(p) for p in ddp.module.parameters()}
    for p, name in engine.names().items():
        if engine.trainable(p) and id(p) not in inside:
            raise UnsupportedModelError(
                f"'{name}' is outside the model's DistributedDataParallel, so its gradient is "
                "not reduced over the ranks; wrap the module that owns all parameters"
            )
    ranks_of = torch.distributed.get_process_group_ranks
    theirs, ours = ranks_of(ddp.process_group), ranks_of(engine.company.process_group)
    if theirs != ours:
        raise UnsupportedModelError(
            f"DistributedDataParallel averages over ranks {theirs}, the optimizer over {ours}: "
            "give process_group= the group that DistributedDataParallel has"
        )
