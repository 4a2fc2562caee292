# SPDX-License-Identifier: MIT
"""What feedback a model gets, layer by layer, and what a step costs: run this first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpnopt.arguments import tensors_of
from ddpnopt.checks import check_model
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import Probing
from ddpnopt.ledger import FROZEN
from ddpnopt.linearise import cast_state
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.replay import preserved
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.testing import Operations
from ddpnopt.typing import Tensor

HEADINGS = (
    *("layer", "type", "rule", "treatment", "parameters", "extra MFLOP", "extra KiB"),
    *("state made by", "joined behind it", "why"),
)


@dataclass(frozen=True)
class Row:
    """One execution of a layer, or parameters that belong to none.

    Attributes:
        name: Module or parameter path.
        type: Its class.
        rule: The layer rule; "autograd" for the general one, "-" for none.
        treatment: "feedback" (layer-wise), "weighted" (one weight a sample, set behind it), "plain"
            (the borrowed optimizer's step) or "refused".
        reason: Why it is not "feedback"; empty if it is.
        parameters: Number of scalars.
        flops: Operations that a closed-loop step adds for this layer's own policy: the Gram product
            and the re-weighted weight gradient (the added passes are the model's: `pass_flops`).
        memory: Extra bytes kept until the step: the gradients at its state and its output.
        state: After which layers the tensors were made that cross the cut in front of it; one for
            a chain, and "?" where something crosses that can't be followed (the policy there is the
            open loop's).
        joins: Those whose tensors are used behind it, before the next layer: by a sum, a product, a
            concatenation.
    """

    name: str
    type: str
    rule: str
    treatment: str
    reason: str
    parameters: int
    flops: int = 0
    memory: int = 0
    state: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """A model's layers in execution order.

    Attributes:
        rows: One for each.
        samples: Number of samples B that was found in the batch.
        boundary: Where samples are weighted once for everything in front; empty for nowhere.
        refusal: Why a step would be refused; empty if it would not.
        sgd_flops: Operations of a step of plain SGD (forward and backward pass).
        pass_flops: Operations of the passes that feedback adds: the second forward pass, and the
            second backward pass through what is weighted.
    """

    rows: tuple[Row, ...]
    samples: int
    boundary: str
    refusal: str
    sgd_flops: int
    pass_flops: int

    @property
    def flops(self) -> int:
        """Extra operations of a closed-loop step."""
        return self.pass_flops + sum(row.flops for row in self.rows)

    @property
    def ratio(self) -> float:
        """Operations of a closed-loop step over plain SGD's."""
        return 1 + self.flops / self.sgd_flops if self.sgd_flops else 1.0

    @property
    def memory(self) -> int:
        """Extra bytes kept until the step."""
        return sum(row.memory for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text, a tuple for each row (columns: `HEADINGS`)."""
        return [
            (
                row.name,
                row.type,
                row.rule,
                row.treatment,
                f"{row.parameters:,}",
                f"{row.flops / 1e6:.3f}",
                f"{row.memory / 1024:.1f}",
                " + ".join(row.state),
                " + ".join(row.joins),
                row.reason,
            )
            for row in self.rows
        ]

    def summary(self) -> str:
        """What the table amounts to."""
        if self.refusal:
            return f"refused: {self.refusal}"
        parts = [
            f"{self.samples} samples; closed-loop step: {self.ratio:.2f} times the operations of "
            f"SGD, {self.memory / 1024:.1f} KiB more memory"
        ]
        if self.boundary:
            parts.append(f"samples are weighted once at {self.boundary} for all in front of it")
        return "\n".join(parts)

    def __str__(self) -> str:
        """The table and its summary."""
        lines = [HEADINGS, *self.cells()]
        widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
        text = [
            "  ".join(
                cell.rjust(width) if k in (4, 5, 6) else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, "", self.summary()])


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Run a model once and say what feedback each of its layers would get.

    Nothing is changed: weights, gradients, buffers, generators and hooks are as before. Operations
    are those of matrix products and convolutions (two for each multiply-accumulate), as
    `torch.utils.flop_counter` counts them; memory is that of the default value function.

    Args:
        model: The network, in the mode in which it is trained.
        *inputs: A batch, as the model is called.
        **kwargs: Further arguments of the call.

    Returns:
        The table; ``print`` it.

    Raises:
        TypeError: Not a module.
        ValueError: The model has no parameters.
        UnsupportedModelError: It can't be recorded (named), or ran no layer.

    Examples:
        >>> print(explain(model, x))
    """
    check_model(model)
    with preserved(model), torch.enable_grad(), DDPNOpt(model, lr=0.0) as opt:
        recorder = opt.engine.recorder
        assert recorder is not None
        output = model(*inputs, **kwargs)
        trajectory = recorder.latest
        if trajectory is None:
            raise UnsupportedModelError(
                "no trainable layer ran, or none of its outputs has a gradient"
            )
        rows = [*_stages(trajectory), *_unseen(model, trajectory)]
        del output
        at, stages = trajectory.boundary, trajectory.stages
    place = ""
    if at:
        place = f"the input of '{stages[at].name}'" if at < len(stages) else "the output"
    forward, backward = _count(model, inputs, kwargs)
    shared = 0
    if any(row.treatment in ("feedback", "weighted") for row in rows):
        shared = forward  # the second forward pass
        if at:  # the front's second backward pass: what is not the layers' behind it
            shared += max(0, backward - sum(2 * _forward_flops(s) for s in stages[at:]))
    return Explanation(
        tuple(rows), trajectory.samples, place, _refusal(trajectory), forward + backward, shared
    )


def _count(model: nn.Module, inputs: Any, kwargs: Any) -> tuple[int, int]:
    """Operations of a forward and of a backward pass, as autograd makes them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with Probing(), preserved(model), torch.enable_grad():
        with Operations() as counter:
            output = model(*inputs, **kwargs)
        forward = counter.total
        ends = [t for t in tensors_of(output) if t.requires_grad]
        with Operations() as counter:
            seeds = [torch.ones_like(t) for t in ends]
            torch.autograd.grad(ends, trained, seeds, allow_unused=True)
    return forward, int(counter.total)


def _refusal(trajectory: Trajectory) -> str:
    if trajectory.refusal:
        return trajectory.refusal
    return "" if trajectory.owned else "its layers ran outside any call that contains all of them"


def _stages(trajectory: Trajectory) -> Iterator[Row]:
    refused = _refusal(trajectory)
    counted: set[int] = set()
    for index, stage in enumerate(trajectory.stages):
        module, rule = stage.module, stage.rule
        if not stage.name and isinstance(module, nn.Identity):
            continue  # an output that is made behind the last layer
        treatment, reason = "feedback", ""
        if refused:
            treatment, reason = "refused", refused
        elif stage.plain:
            weighted = index < trajectory.boundary and stage.plain != FROZEN
            treatment, reason = "weighted" if weighted else "plain", stage.plain
        flops = memory = 0
        if treatment == "feedback":
            flops = _policy_flops(stage, trajectory.samples)
            memory = _bytes(stage, index > 0)
        own = [p for p in module.parameters() if id(p) not in counted]  # shared ones count once
        counted.update(id(p) for p in own)
        kind = "autograd" if rule is not None and rule.general else type(rule).__name__
        yield Row(
            stage.name or "(model)",
            type(module).__name__,
            kind if rule is not None else "-",
            treatment,
            reason,
            sum(p.numel() for p in own),
            flops,
            memory,
            *_cut(trajectory, index),
        )


def _cut(trajectory: Trajectory, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What crosses the cut in front of a stage, and what joins behind it, by their makers."""
    stages, stage = trajectory.stages, trajectory.stages[index]
    if trajectory.path is None:
        before = [s.name for s in stages[:index] if not s.plain]
        return tuple(before[-1:]), ()
    names = {s.time: s.name or "(model)" for s in reversed(stages)}
    state: dict[str, None] = {}
    joins: dict[str, None] = {}
    for one in trajectory.crossings:
        maker = names.get(one.born, "(input)")
        if one.at(stage.time):
            state[maker] = None
        if one.used == stage.time and one.beside:
            joins[maker] = None
    if any(span.at(stage.time) for span in trajectory.blind):
        state["?"] = None
    return tuple(state), tuple(joins)


def _unseen(model: nn.Module, trajectory: Trajectory) -> Iterator[Row]:
    """Parameters of no layer that ran."""
    ran = {id(p) for stage in trajectory.stages for p in stage.module.parameters()}
    for name, p in model.named_parameters():
        if id(p) in ran:
            continue
        weighted = bool(trajectory.boundary) and p.requires_grad
        treatment = "weighted" if weighted else "plain"
        reason = "used by no layer that ran" if p.requires_grad else FROZEN
        yield Row(name, type(p).__name__, "-", treatment, reason, p.numel())


def _output(stage: Stage) -> Tensor | None:
    if stage.rule is None:
        return None
    x = cast_state(stage.x, next(stage.module.parameters()).dtype)
    with Probing(), preserved(stage.module), torch.no_grad():
        return stage.rule.function(stage.module, x)


def _forward_flops(stage: Stage) -> int:
    with Operations() as counter:
        _output(stage)
    return int(counter.total)


def _policy_flops(stage: Stage, samples: int) -> int:
    """The Gram product of one column, and the weight gradient of re-weighted samples."""
    h = _output(stage)
    assert h is not None and stage.rule is not None
    x = cast_state(stage.x, h.dtype)
    named = [name for name, _ in stage.module.named_parameters()]
    with Operations() as counter, torch.no_grad():
        stage.rule.lengths(stage.module, x, h, dict.fromkeys(named, 1.0), samples)
        stage.rule.gradient(stage.module, x, h)
    return int(counter.total)


def _bytes(stage: Stage, has_state: bool) -> int:
    h = _output(stage)
    assert h is not None
    state = stage.x.numel() * stage.x.element_size() if has_state else 0
    return state + h.numel() * h.element_size()
