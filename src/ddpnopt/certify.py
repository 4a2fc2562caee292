# SPDX-License-Identifier: MIT
"""Whether the general rule describes a module of unknown type: compared with autograd itself.

`layers.FALLBACK` runs a module's forward again, sample by sample. Randomness inside it, samples
that see each other, weights that are made elsewhere and code that torch.func can't follow would
make it wrong without a sign of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.dtensors import spread_out
from ddpnopt.inert import Probing, probe
from ddpnopt.linearise import cast_state
from ddpnopt.replay import preserved
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor


def doubt(stage: Stage, h: GradientEdge | None, x: GradientEdge | None, samples: int) -> str:
    """Why a stage's rule can't be trusted, or ''.

    Args:
        stage: An execution of a module that the general rule would serve.
        h: Edge of its output.
        x: Edge of its state, if it has a gradient.
        samples: Number of samples B.
    """
    if h is None or samples == 0:
        return ""
    kind = type(stage.module).__name__
    if any(map(spread_out, stage.module.parameters())):
        return f"{kind} has no rule, and its weights are spread over the ranks (fully_shard)"
    with Probing(), preserved(stage.module), torch.enable_grad():
        try:
            worst = _difference(stage, h, x, samples)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0][:100]
            return f"{kind} can't be differentiated sample by sample ({reason})"
    narrow = stage.x.dtype in (torch.float16, torch.bfloat16)
    if worst <= (0.1 if narrow else 1e-3):
        return ""
    return (
        f"{kind} run again, sample by sample, has another gradient: it is random, mixes samples, "
        "or makes its weights elsewhere"
    )


def _difference(stage: Stage, h: GradientEdge, x: GradientEdge | None, samples: int) -> float:
    """The largest relative difference between the rule's gradients and autograd's."""
    rule, module = stage.rule, stage.module
    assert rule is not None
    dtype = next(module.parameters()).dtype
    state = cast_state(stage.x, dtype).clone()  # the module may work in place on its input
    out = rule.function(module, state)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(out.shape, generator=generator).to(out)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    targets: list[Any] = [*named.values(), *([x] if x else [])]
    seed = V[0] if stage.unbatched else V
    theirs = probe(h, targets, seed)
    ours = rule.sample_gradients(module, state, V[None], samples)
    pairs = list(zip(theirs, [ours[name][0].sum(0) for name in named], strict=False))
    if x:
        pulled = rule.pull(module, state, V[None])[0]
        pairs.append((theirs[-1], pulled[0] if stage.unbatched else pulled))
    return max(_relative(a, b) for a, b in pairs)


def _relative(a: Tensor | None, b: Tensor) -> float:
    b = b.detach()
    if a is None:
        return float(bool(b.any()))
    scale = a.norm() + b.norm()
    return float((a.to(b.dtype) - b).norm() / scale) if bool(scale > 0) else 0.0
