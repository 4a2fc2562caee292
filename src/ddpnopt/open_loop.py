# SPDX-License-Identifier: MIT
"""Robust gradients for an optimizer that is left as it is: one line after its construction."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from ddpnopt.checks import check_backward, check_gradients, check_model
from ddpnopt.company import Company
from ddpnopt.dtensors import local
from ddpnopt.engine import Engine
from ddpnopt.errors import DDPNOptWarning, UnsupportedModelError
from ddpnopt.feedback import gains_of, set_gains
from ddpnopt.formats import FORMAT_VERSION, upgraded
from ddpnopt.gradients import dense_gradients
from ddpnopt.inner import Reader, reader_of
from ddpnopt.narrowed import Inner
from ddpnopt.options import Options, value_from
from ddpnopt.recognition import Terminal
from ddpnopt.report import StepReport
from ddpnopt.separable import (
    MAXIMIZED,
    WEIGHTED,
    check_optimizer,
    check_unweighted,
    maximizing,
)
from ddpnopt.shards import guest_of
from ddpnopt.spread import check_parts
from ddpnopt.terminal import MMC, MSE
from ddpnopt.undoing import insist
from ddpnopt.updates import Update
from ddpnopt.value import ValueFunction
from ddpnopt.wrapped import Wrapped

#: The prepared updates, r, and whether p.grad is re-weighted.
_Pending = tuple[Wrapped, list[Update], float, bool]
#: An optimizer, held weakly, its reader, and the gains that were seen.
_Known = tuple["weakref.ref[torch.optim.Optimizer]", Reader, dict[torch.Tensor, torch.Tensor]]


def open_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    value: str | ValueFunction = "moreau",
    terminal: Terminal | MSE | MMC = "auto",
    gram: str = "auto",
) -> OpenLoop:
    """Make ``p.grad`` robust: every sample's gradient is weighted layer by layer in ``backward``.

    Nothing else changes: the loop, the optimizer's class, schedulers, clipping. The optimizer is
    only read (its learning rate, momentum and second moment say how far its step will go), but that
    a second moment is fed with the larger of the plain and the re-weighted gradient.

    Args:
        model: The network that the optimizer trains.
        optimizer: Any `torch.optim.Optimizer`, or several that share the parameters out.
        value: "moreau", "gauss_newton", "low_rank", "dense", or an object with its options.
        terminal: The loss, as for `DDPNOpt`.
        gram: Gram products of convolutions: "exact", "sketch", "auto" (exact).

    Returns:
        A handle that lives as long as the optimizer does: ``remove()`` takes everything off, as
        does the end of a ``with`` block; ``last_step`` is the record of the last step.

    Raises:
        TypeError: Not an optimizer.
        ValueError: A parameter is not the model's, or belongs to two optimizers.
        UnsupportedModelError: The model or the optimizer can't be handled (named). With several
            ranks of torch.distributed the model has to be a DistributedDataParallel or sharded by
            fully_shard.

    Examples:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = open_loop(model, optimizer)
    """
    return OpenLoop(model, optimizer, value, terminal, gram)


class OpenLoop:
    """What `open_loop` returns."""

    #: The optimizer makes its own step.
    trust: bool | float = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        value: str | ValueFunction,
        terminal: Terminal | MSE | MMC,
        gram: str,
    ) -> None:
        check_model(model)
        company = Company(reduces=False)
        given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        check_optimizer(given, model)
        check_unweighted(given)
        self.last_step: StepReport | None = None
        depth: bool | str = "open_loop"
        if maximizing(given):
            warnings.warn(MAXIMIZED, DDPNOptWarning, stacklevel=3)
            depth = False
        self.options = Options(value_from(value), terminal, depth, True, gram, "raise")
        self._known: list[_Known] = [(weakref.ref(one), reader_of(one), {}) for one in given]
        self._stepped: set[int] = set()
        self.engine = Engine(model, self.options, guest_of(self, model), company)
        self._pending: dict[int, _Pending | None] = {}
        # The optimizer holds the handle, through its hooks; the handle holds it weakly.
        self._handles = [one.register_step_pre_hook(self._before) for one in given]
        self._handles += [one.register_step_post_hook(self._after) for one in given]
        WEIGHTED.update(given)

    @property
    def inners(self) -> tuple[Inner, ...]:
        """The optimizers, as far as they are alive, with what is known about them."""
        return tuple(
            Inner(one, reader, gains)
            for ref, reader, gains in self._known
            if (one := ref()) is not None
        )

    def _inner(self, optimizer: torch.optim.Optimizer) -> Inner:
        return next(inner for inner in self.inners if inner.optimizer is optimizer)

    def remove(self) -> None:
        """Take everything off: from the next backward pass on ``p.grad`` is the plain gradient."""
        self.engine.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for inner in self.inners:
            WEIGHTED.discard(inner.optimizer)

    def __enter__(self) -> Self:
        """As a context manager: removed at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove."""
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, to resume to the bit; the optimizer's own state is not in it."""
        gains = [gains_of(one) for one in self.inners]
        return {"version": FORMAT_VERSION, "gains": gains, **self.engine.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: The state is another's, or of a newer format.
        """
        # The first releases' handles did not say their format.
        given = {"version": 1, **state_dict}
        own = upgraded(given, {"gains": None, **self.engine.state_dict()}, "handle of open_loop")
        for inner, gains in zip(self.inners, own["gains"], strict=True):
            set_gains(inner, gains)
        self.engine.load_state_dict(own)

    # Around the optimizer's step ----------------------------------------------------------------

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """The gradients are there: prepare the second moments for what has been done to them."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (optimizer, lambda: loss), {}
        if self.options.feedback is not False and maximizing([optimizer]):
            raise UnsupportedModelError(
                "open_loop: a parameter group has maximize=True since; call remove() of the handle"
            )
        # GradScaler leaves it to a fused kernel to unscale, or to skip the step.
        overflow, scale = (getattr(optimizer, k, None) for k in ("found_inf", "grad_scale"))
        if overflow is not None and float(overflow) > 0:
            self._pending[id(optimizer)] = None
        else:
            self._prepare(self._inner(optimizer), 1.0 if scale is None else 1 / float(scale))
        return args, kwargs

    def _prepare(self, inner: Inner, unscale: float) -> None:
        engine = self.engine
        engine.refresh()
        trajectories = list(engine.recorder.arrivals.completed) if engine.recorder else []
        if not trajectories:
            check_parts(engine)  # sharded since?
        seen = engine.open_report is not None  # another optimizer has stepped on this pass
        if not (trajectories or seen or self._stepped) and engine.consumed.fresh(
            [p for p, grad in dense_gradients(engine.parameters()).items() if local(grad).any()]
        ):
            check_backward(True, trajectories, engine.recorder)
        active = engine.usable(trajectories) if trajectories else seen
        rescale = engine.fingerprint.rescaling() * unscale
        wrapped = Wrapped([inner], engine.copies)
        check_gradients(wrapped, trajectories, engine.names, held=False)
        plain_statistics = self.options.value.statistics == "plain"
        updates = []
        for p, scaled in dense_gradients(wrapped.hyper).items():
            grad = scaled if unscale == 1.0 else scaled * unscale
            correction, _ = engine.carried.get(p, (None, None))
            if correction is not None:
                plain = grad - rescale * correction
                updates.append(Update(p, grad, plain=plain, follows=plain_statistics))
            elif inner.reader.rescales:
                updates.append(Update(p, grad))
        try:
            wrapped.keep(inner, updates)
            wrapped.prepare(inner, updates)
            self._pending[id(inner.optimizer)] = wrapped, updates, rescale, active
        except BaseException:  # the optimizer does not step
            insist(wrapped.rollback)
            raise
        for update in updates:
            engine.carried.pop(update.p, None)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The step has been taken."""
        inner, engine = self._inner(optimizer), self.engine
        pending = self._pending.pop(id(optimizer))
        wrapped, updates, rescale, active = pending or (None, [], engine.rescale, False)
        if wrapped is None:
            engine.skipped += 1
        else:
            wrapped.settle(inner, updates)
            wrapped.commit({})
        engine.rescale = rescale
        if active and engine.open_report is not None:
            self.last_step = replace(engine.open_report, rescale=rescale)
        else:
            decision, skipped = engine.outputs.main.decision, engine.skipped
            self.last_step = StepReport("off", decision, rescale=rescale, skipped=skipped)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._known):
            self._stepped.clear()
            engine.finish()
        else:  # another optimizer's step may be still to come
            engine.forget_passes()
