# SPDX-License-Identifier: MIT
"""Input that must not be accepted, each with an error that names the place and the way out."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddpnopt.borrowed import Borrowed
from ddpnopt.decisions import all_finite
from ddpnopt.errors import NonFiniteError, TerminalError, UnsupportedModelError
from ddpnopt.gradients import gradient_norms
from ddpnopt.hyperparameters import Hyper, curvature_options, own_momentum
from ddpnopt.layers import MatrixRule
from ddpnopt.parameters import parameters
from ddpnopt.ranges import check_number, finite, share
from ddpnopt.sizes import norms
from ddpnopt.spoilt import check_finite
from ddpnopt.stages import Trajectory
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.engine import Engine


def check_model(model: nn.Module) -> None:
    """Refuse models that can't be recorded.

    Raises:
        TypeError: Not a module.
        ValueError: No parameters, or not yet initialised ones.
        UnsupportedModelError: Replicated by DataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"'{name}' is not initialised: run one forward pass first")
    if next(model.parameters(), None) is None:
        raise ValueError("DDPNOpt(model): the model has no parameters")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise UnsupportedModelError(f"'{name or 'model'}' is nn.DataParallel: not supported")


def check_group(group: Mapping[str, Any], owned: Container[Tensor]) -> None:
    """Check a parameter group's members and numbers.

    Args:
        group: The group.
        owned: The model's parameters.

    Raises:
        ValueError: A parameter is not the model's, or a number is out of range.
    """
    for place, p in enumerate(group["params"]):
        if not isinstance(p, Tensor):
            raise ValueError(
                f"params: member {place} of the group is of type {type(p).__name__}; give DDPNOpt "
                "the torch.nn.Module, or its parameters or parameter groups"
            )
        if p not in owned:
            raise ValueError(
                f"params: parameter {place} of the group (shape {tuple(p.shape)}) does not belong "
                "to the model; give DDPNOpt the module that owns all of them"
            )
    for option in ("lr", "weight_decay"):
        check_number("", option, group[option], finite, "must not be negative, and finite")
    momentum = group["momentum"]
    check_number("", "momentum", momentum, lambda n: share(float(n)), "must lie in [0, 1)")
    if group["momentum"] and own_momentum(group["curvature"]):
        name = curvature_options(group["curvature"])["name"]
        raise ValueError(
            f"momentum={group['momentum']} with curvature={name!r}, which "
            "has its own (betas[0]): use momentum=0"
        )


def check_backward(
    fresh: bool, trajectories: Sequence[Trajectory], recorder: Recorder | None
) -> None:
    """Refuse a step that has nothing to step on.

    Args:
        fresh: Some gradient is new since the last step (or there is nothing to optimise).
        trajectories: Passes whose gradients have arrived.
        recorder: The recorder, where feedback is on.

    Raises:
        RuntimeError: No backward pass, or none through a recorded forward pass.
    """
    if not fresh and not trajectories:
        raise RuntimeError(
            "step() without a backward pass since the last step: call loss.backward() first"
        )
    if recorder is not None and not trajectories and recorder.anatomy.layers():
        raise RuntimeError(
            "gradients arrived, but no forward pass of the model was recorded: was it called "
            "through torch.func, or not at all? Was the backward pass run with create_graph=True? "
            "Had torch.compile compiled it before the optimizer was made? Then give the optimizer "
            "the compiled module, or call torch.compiler.reset() after its construction. Else "
            "train with a plain backward pass, or use feedback=False (remove() of the open loop's "
            "handle)"
        )


def check_gradients(
    borrowed: Borrowed,
    trajectories: Sequence[Trajectory],
    names: Callable[[], dict[Tensor, str]],
    held: bool,
) -> Mapping[Tensor, float | Tensor]:
    """Refuse gradients that are not finite, by the layer where they appear first, or sparse ones.

    Args:
        borrowed: The borrowed optimizer, nothing stepped yet.
        trajectories: The passes.
        names: Paths of the parameters.
        held: Weight gradients are not computed, so the layers themselves are looked at.

    Returns:
        |p.grad| of every parameter that has a dense one.

    Raises:
        NonFiniteError: The layer or parameter is named, or lr is out of its range.
        UnsupportedModelError: A parameter has a sparse gradient and needs a dense one.
    """
    stepped = [p for p in borrowed.hyper if p.requires_grad]
    sizes, finite = gradient_norms(stepped)
    if held and finite:
        finite = _finite_held(trajectories, stepped)
    if not finite:
        place = first_nonfinite(trajectories, names)
        if place:
            raise NonFiniteError(
                f"the gradient at '{place}' is not finite (seen first there, going backwards from "
                "the loss); nothing was changed. Lower lr, or use nonfinite='skip'"
            )
    for p in stepped:
        hyper = borrowed.hyper[p]
        if not isinstance(hyper.lr, Tensor) and hyper.lr > torch.finfo(p.dtype).max:
            raise NonFiniteError(
                f"lr={hyper.lr} of '{names().get(p, 'a parameter')}' is out of the range of "
                f"{p.dtype}; nothing was changed. Lower lr, or keep the weights in float32"
            )
        if p.grad is not None and p.grad.is_sparse:
            _check_takes_sparse(borrowed, hyper, names().get(p, "a parameter"))
    return sizes


def _check_takes_sparse(borrowed: Borrowed, hyper: Hyper, name: str) -> None:
    """Refuse a sparse gradient where all entries are needed."""
    if borrowed.judges_sparse:
        what, otherwise = "trust" if hyper.curvature.relative else "", "leave trust out"
    else:
        what = "weight_decay" if hyper.weight_decay else ""
        if hyper.curvature.statistics == "gradient":
            what = f"curvature={hyper.curvature.name!r}"
        otherwise = (
            "put its parameters into a group of their own with curvature='identity' and "
            "weight_decay=0"
        )
    if what:
        raise UnsupportedModelError(
            f"'{name}' has a sparse gradient, which {what} can't use; make the layer with "
            f"sparse=False, or {otherwise}"
        )


def _finite_held(trajectories: Sequence[Trajectory], stepped: Sequence[Tensor]) -> bool:
    """Whether the layers' gradients are finite, where those of their weights don't tell.

    A bias's gradient, the sum of all of its layer's, does; it has been looked at.
    """
    told = {id(p) for p in stepped if p.grad is not None}
    seen = [
        s.G
        for t in trajectories
        for s in t.stages
        if s.G is not None
        and s.G.numel()
        and not (isinstance(s.rule, MatrixRule) and id(s.module._parameters.get("bias")) in told)
    ]
    return not seen or all_finite(norms(seen))


def check_update(borrowed: Borrowed, names: Callable[[], dict[Tensor, str]]) -> None:
    """Refuse new weights and optimizer states that are not finite: they would stay so.

    Raises:
        NonFiniteError: The parameter is named.
    """
    updated = borrowed.updated()
    if updated and not borrowed.sizes.finite(updated):
        bad = next((p for p in updated if not bool(p.isfinite().all())), None)
        if bad is not None:  # a norm may overflow where no entry does
            _check_begun(borrowed, names)
            raise NonFiniteError(
                f"the new weights of '{names().get(bad, 'a parameter')}' are not finite; nothing "
                "was changed. Lower lr, or use nonfinite='skip'"
            )
    statistics = {p: borrowed.numbers(p) for p in borrowed.updated()}
    kept = [t for tensors in statistics.values() for t in tensors]
    if not kept or borrowed.sizes.finite(kept):
        return
    for p, tensors in statistics.items():
        if not all(bool(t.isfinite().all()) for t in tensors):
            _check_begun(borrowed, names)
            raise NonFiniteError(
                f"the optimizer's statistics of '{names().get(p, 'a parameter')}' would not be "
                "finite (squares of inputs or gradients leave the range of its dtype); nothing was "
                "changed. Lower lr or scale the inputs, or use nonfinite='skip'"
            )


def _check_begun(borrowed: Borrowed, names: Callable[[], dict[Tensor, str]]) -> None:
    """Refuse states that were not finite when the step began."""
    known = names()
    check_finite((known.get(p, "a parameter"), borrowed.begun_with(p)) for p in borrowed.updated())


def usable(trajectory: Trajectory) -> bool:
    """Whether a pass can take part in feedback."""
    clean = trajectory.error is None and not trajectory.refusal
    return clean and trajectory.owned and trajectory.cost is not None


def output_intact(trajectory: Trajectory, terminal: object) -> bool:
    """Whether the output is still what the layer made; else its loss can't be known.

    Raises:
        TerminalError: It was overwritten, and the user has named a terminal cost.
    """
    z = trajectory.z
    if z is None or z.is_inference() or z._version == trajectory.z_version:
        return True
    if terminal != "auto":
        raise TerminalError(
            f"the output of '{trajectory.stages[-1].name}' was modified in place after the layer, "
            f"so terminal={terminal!r} does not describe it; modify a copy"
        )
    return False


def check_states(trajectories: Sequence[Trajectory], closed_loop: bool) -> None:
    """The recorded states and weights must be those of the pass.

    Raises:
        UnsupportedModelError: The layer is named.
    """
    for trajectory in trajectories:
        if not all(one.intact() for one in trajectory.crossings):
            raise UnsupportedModelError(
                "a tensor that is used in several places of the model was modified in place in "
                "between; modify a copy, or use feedback='open_loop'"
            )
        for stage in trajectory.executions:
            now = tuple(-1 if t.is_inference() else t._version for t in stage.inputs)
            if now != stage.versions:
                raise UnsupportedModelError(
                    f"the input of '{stage.name}' was modified in place after the layer used it; "
                    "modify a copy, or use feedback=False"
                )
            own = sum(p._version for p in parameters(stage.module))
            if closed_loop and own != stage.weights:
                raise UnsupportedModelError(
                    f"the weights of '{stage.name}' were changed between the forward pass and the "
                    "step (sharpness-aware or manual updates, or an earlier step on this pass that "
                    "failed), so the pass can't be compared with a second one; use "
                    "feedback='open_loop', or run the pass again"
                )


def takes_part(engine: Engine, trajectories: list[Trajectory]) -> bool:
    """Whether all passes of a step take part in feedback; raises where they must not be ignored."""
    if engine.options.feedback is False:
        return False
    check_usable(trajectories)
    for trajectory in trajectories:
        engine.notices.say_plain(trajectory, engine.names, engine.trainable, engine.needs_cost)
    if engine.needs_cost and any(t.cost is None for t in trajectories):
        engine.notices.say_without_cost(trajectories, engine.outputs.main.decision)
        return False
    return bool(trajectories)


def check_usable(trajectories: Sequence[Trajectory]) -> None:
    """Raise what has been found wrong with a pass.

    Raises:
        TerminalError: The terminal cost contradicts the output.
        UnsupportedModelError: No chain, or parts called from the loop (named).
    """
    parts = [f"'{s.name}'" for t in trajectories if not t.owned for s in t.stages if not s.plain]
    if parts:
        raise UnsupportedModelError(
            f"{', '.join(parts)} ran outside any call that contains all layers, so the pass can't "
            "be run again; call one module that owns them all, or use feedback=False"
        )
    for trajectory in trajectories:
        if trajectory.error is not None:
            raise trajectory.error
        if trajectory.refusal:
            raise UnsupportedModelError(trajectory.refusal)


def first_nonfinite(
    trajectories: Sequence[Trajectory], names: Callable[[], dict[Tensor, str]]
) -> str:
    """The first layer, from the output, whose gradient is not finite; else the parameter; or ''."""
    for trajectory in trajectories:
        for stage in reversed(trajectory.stages):
            if stage.G is not None and not bool(stage.G.isfinite().all()):
                return stage.name
    return _first(names().items())


def _first(named: Iterable[tuple[Tensor, str]]) -> str:
    for p, name in reversed(list(named)):
        grad = p.grad
        if grad is None:
            continue
        values = grad.coalesce().values() if grad.is_sparse else grad
        if not bool(values.isfinite().all()):
            return name
    return ""
