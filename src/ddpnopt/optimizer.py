# SPDX-License-Identifier: MIT
"""DDPNOpt as a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, overload

import torch
from torch import nn

from ddpnopt.bellman import linearise
from ddpnopt.borrowed import Borrowed, curvature_options, norms
from ddpnopt.checks import (
    check_group,
    check_model,
    first_nonfinite,
    refuse_distributed,
    verify_chain,
)
from ddpnopt.curvature import CURVATURES, Curvature
from ddpnopt.errors import DDPNOptWarning, NonFiniteError, TerminalError, UnsupportedModelError
from ddpnopt.gradients import Consumed, Fingerprint, dense_gradients
from ddpnopt.options import Options, value_from
from ddpnopt.recognition import MSE, Recogniser, Terminal
from ddpnopt.report import StepReport
from ddpnopt.rollout import rollout
from ddpnopt.step import Settings, Step
from ddpnopt.trajectory import Link, Recorder, Trajectory
from ddpnopt.typing import Tensor
from ddpnopt.value import ValueFunction

FORMAT_VERSION = 1


class DDPNOpt(torch.optim.Optimizer):
    """Differential Dynamic Programming Neural Optimizer.

    Borrows the curvature M of a known optimizer, runs Bellman's recursion backwards through the
    layers, and updates the weights in one extra forward pass with layer-wise feedback policies
    (Liu, Chen and Theodorou, ICLR 2021). Used as any optimizer of torch: the loop is unchanged.

    Args:
        model: The network; its layers must run one after another.
        lr: Learning rate eta.
        curvature: "identity" (SGD), "rmsprop", or an object with its options.
        value: "moreau", "gauss_newton", "low_rank", "dense", or an object with its options.
        terminal: The loss: "auto" recognises cross-entropy and logistic losses from the output
            and its gradient; else "cross_entropy", "nll", "mse", "bce_with_logits", or a callable
            output z (B, C) -> factor S (B, C, r) of the loss's Hessian by z, S S^T, per sample.
        feedback: True: closed loop; "open_loop": coefficients without a second forward pass,
            written to ``p.grad`` by ``backward``; False: exactly the borrowed optimizer.
        momentum: As in the borrowed optimizer.
        weight_decay: Coupled, as in the borrowed optimizer.
        weight_gradients: False: the layers' plain weight gradients are never computed; the step
            is cheaper, and ``clip_grad_norm_`` sees only biases.
        gram: Gram products of convolutions: "exact", "sketch" (unbiased estimate by random
            filters), "auto" (exact).
        nonfinite: "raise" or "skip" a step whose numbers are not finite; nothing is changed.
        params: Parameters or parameter groups of the model, where not all are to be optimised or
            their options differ; a group may name its own ``curvature``.

    Raises:
        ValueError: An option is out of range or unknown, or a parameter is not the model's.
        UnsupportedModelError: The model can't be handled (named).

    Examples:
        >>> opt = DDPNOpt(model, lr=0.1)
        >>> opt.zero_grad(); criterion(model(x), y).backward(); opt.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        curvature: str | Curvature = "identity",
        value: str | ValueFunction = "moreau",
        terminal: Terminal | MSE = "auto",
        feedback: bool | str = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weight_gradients: bool = True,
        gram: str = "auto",
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
    ) -> None:
        check_model(model)
        refuse_distributed()
        self.model = model
        self.options = Options(
            value_from(value), terminal, feedback, weight_gradients, gram, nonfinite
        )
        self._members: set[int] = set()
        self.last_step: StepReport | None = None
        self.diagnose = False
        self.skipped = 0
        self._rescale = 1.0
        self._running: dict[str, float] = {}
        self._carried: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._base: dict[Tensor, Tensor] = {}
        self._open_report: StepReport | None = None
        self._verified: set[tuple[Any, ...]] = set()
        self._said: set[str] = set()
        self._sketch = torch.Generator().manual_seed(0)
        self._recogniser = Recogniser(terminal)
        self._fingerprint, self._consumed = Fingerprint(), Consumed()
        self._recorder: Recorder | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "curvature": curvature_options(curvature),
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        self._attach()

    # Set-up ---------------------------------------------------------------------------------

    def _attach(self) -> None:
        squares = any(
            CURVATURES[(c := dict(g["curvature"])).pop("name")](**c).statistics == "squares"
            for g in self.param_groups
        )
        if self.options.feedback is False and not squares:
            return
        gradient = self.options.value.linearization == "gradient"
        feedback = self.options.feedback is not False
        self._recorder = Recorder(
            self.model,
            self._trainable,
            self._refresh,
            closed_loop=self.options.closed_loop,
            state_gradients=self.options.closed_loop and gradient,
            links=feedback and not gradient,
            weight_gradients=self.options.weight_gradients or not feedback,
            at_output=self._at_output,
            backward_started=self._backward_started,
            backward_ended=self._backward_ended,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with their own options.

        Raises:
            ValueError: A parameter is not the model's, or an option is out of range.
        """
        if not isinstance(param_group, dict):
            raise TypeError("a parameter group must be a dict")
        group = {**self.defaults, **param_group}
        given = param_group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        group["curvature"] = curvature_options(group["curvature"])
        check_group(group, self._names())
        super().add_param_group(group)
        self._refresh()

    def _refresh(self) -> None:
        """Parameters are looked up anew for each pass and step: FSDP and others swap them."""
        self._members = {id(p) for p in self._parameters()}

    def _trainable(self, p: Tensor) -> bool:
        return p.requires_grad and id(p) in self._members

    def detach(self) -> None:
        """Remove every hook from the model; the optimizer takes plain steps from then on."""
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None

    def __enter__(self) -> Self:
        """As a context manager: detaches at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self.detach()

    # Backward pass --------------------------------------------------------------------------

    def _at_output(self, trajectory: Trajectory, link: Link | None) -> None:
        """The output's gradient has arrived: which loss was it, and what has to be linearised."""
        last = trajectory.stages[-1]
        if self.options.feedback is False or trajectory.z is None or last.G is None:
            return
        trajectory.cost = None
        with torch.no_grad():
            if not bool(last.G.isfinite().all()):
                return  # GradScaler probes with overflows: the last decision stands
            axis = last.rule.feature_axis if last.rule is not None else -1
            try:
                cost = self._recogniser(trajectory.z, last.G, axis, trajectory.samples)
            except TerminalError as error:
                trajectory.error = error
                return
        trajectory.cost = cost
        if cost is not None and trajectory.active:
            linearise(trajectory, link, cost, self.options.value)

    def _backward_started(self) -> None:
        """Keep what p.grad holds already, so that this pass's own gradient can be told from it."""
        if self.options.feedback == "open_loop" and self.options.weight_gradients:
            self._base = {
                p: p.grad.clone() for p in self._parameters() if p.grad is not None
            }
            if not any(bool(g.any()) for g in self._base.values()):
                self._base, self._carried = {}, {}

    @torch.no_grad()
    def _backward_ended(self, trajectories: list[Trajectory]) -> None:
        """In open loop: write the re-weighted gradients to p.grad."""
        if self.options.feedback == "open_loop" and self.options.weight_gradients:
            usable = [t for t in trajectories if not self._unusable(t)]
            if usable and len(usable) == len(trajectories):
                self._open_loop(usable)
        self._base = {}
        self._fingerprint.take(self._parameters())

    def _open_loop(self, trajectories: list[Trajectory]) -> None:
        step = self._new_step(trajectories, self._rescale, 1.0)
        step.build()
        step.recurse()
        corrections = {
            p: correction
            for layer in step.layers.values()
            for p, correction in step.corrections(layer, None).items()
        }
        for p, correction in corrections.items():
            assert p.grad is not None
            p.grad.add_(correction)
            if step.borrowed.hyper[p].curvature.statistics != "none":
                before, extra = self._carried.get(p, (None, None))
                total = correction if before is None else before + correction
                statistic = step.extra.get(p)
                if extra is not None:
                    statistic = extra if statistic is None else extra + statistic
                self._carried[p] = (total, statistic)
        self._open_report = self._report(step, trajectories, "open_loop")

    # Step -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the recorded passes.

        Args:
            closure: Standard closure that computes the loss and calls ``backward``.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: No backward pass since the last step.
            NonFiniteError: A gradient or a new weight is not finite (``nonfinite="raise"``).
            UnsupportedModelError: The recorded passes can't be handled (named).
            TerminalError: The terminal cost given contradicts the output.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_distributed()
        self._refresh()
        trajectories = list(self._recorder.completed) if self._recorder is not None else []
        device = next(iter(self._parameters())).device.type
        try:
            with torch.autocast(device, enabled=False):
                self._take_step(trajectories)
        except NonFiniteError:
            if self.options.nonfinite == "raise":
                raise
            self.skipped += 1
            depth = self.options.depth
            self.last_step = StepReport(depth, "none", plain=(), skipped=self.skipped)
        finally:
            if self._recorder is not None:
                self._recorder.completed.clear()
        self._consumed.mark(self._parameters())
        self._fingerprint.clear()
        self._carried, self._open_report = {}, None
        return loss

    def _take_step(self, trajectories: list[Trajectory]) -> None:
        self._check_backward(trajectories)
        rescale = self._fingerprint.rescaling()
        self._check_finite(trajectories)
        usable = self._usable(trajectories)
        if rescale != 1.0 and not self.options.weight_gradients and usable:
            self._say(
                "p.grad was rescaled with weight_gradients=False: the weights' steps get the same "
                "factor, but clip_grad_norm_ has seen the norm of the biases alone. To clip, use "
                "weight_gradients=True"
            )
        step = self._new_step(trajectories, rescale, rescale)
        running = dict(self._running)
        sketch = self._sketch.get_state()
        open_loop = self.options.feedback == "open_loop" and self.options.weight_gradients
        try:
            if usable and not open_loop:
                step.build()
            self._plain_updates(step, rescale)
            if step.layers:
                step.recurse()
                self._apply(step, trajectories)
            self._check_weights(step.borrowed)
        except BaseException:
            step.borrowed.rollback()
            self._running, _ = running, self._sketch.set_state(sketch)
            raise
        step.borrowed.commit(self.state)
        self._rescale = rescale
        depth = self.options.depth if usable and (step.layers or open_loop) else "off"
        report = self._open_report if usable and open_loop else None
        self.last_step = report or self._report(step, trajectories, depth, rescale)

    def _apply(self, step: Step, trajectories: list[Trajectory]) -> None:
        if self.options.closed_loop:
            for trajectory in trajectories:
                if trajectory.key not in self._verified:
                    verify_chain(trajectory)
                    self._verified.add(trajectory.key)
            assert self._recorder is not None
            rollout(self._recorder, trajectories, step.layers, step.apply)
        else:
            for layer in step.layers.values():
                step.apply(layer, None)

    def _new_step(
        self, trajectories: list[Trajectory], rescale: float, correction_scale: float
    ) -> Step:
        settings = Settings(
            self.options.value,
            rescale,
            correction_scale,
            self.options.weight_gradients,
            self._sketch if self.options.gram == "sketch" else None,
            self.diagnose,
        )
        borrowed = Borrowed(self.param_groups, self.state)
        return Step(
            trajectories, borrowed, settings, self._trainable, self._running, self._base
        )

    def _plain_updates(self, step: Step, rescale: float) -> None:
        """The borrowed optimizer's step for every parameter outside the feedback.

        They come first: a plain layer between two others shows them its new weights in the rollout.
        """
        records = step.plain_layers()
        in_feedback = {p for layer in step.layers.values() for p in layer.params.values()}
        for p in self._parameters():
            if p in in_feedback or not p.requires_grad:
                continue
            gradient = p.grad
            if gradient is None and p in records:
                gradient = records[p].gradient(rescale)
            if gradient is None:
                continue
            squares = records[p].squares(rescale) if p in records else None
            correction, extra = self._carried.get(p, (None, None))
            plain = gradient if correction is None else gradient - rescale * correction
            fed = plain if extra is None else plain + rescale * extra
            moment = step.borrowed.moment(p, fed, squares)
            follow = self.options.value.statistics == "plain" and correction is not None
            step.borrowed.step(p, gradient, moment, plain if follow else None)

    def _check_backward(self, trajectories: list[Trajectory]) -> None:
        parameters = [p for p in self._parameters() if p.requires_grad]
        if not parameters:
            return
        fresh = self._consumed.fresh(parameters)
        if not fresh and not trajectories:
            raise RuntimeError(
                "step() without a backward pass since the last step: call loss.backward() first"
            )
        recording = self._recorder is not None and self.options.feedback is not False
        if recording and not trajectories and self._recorder.layers():  # type: ignore[union-attr]
            raise RuntimeError(
                "gradients arrived, but no forward pass of the model was recorded: was it called "
                "through torch.compile, torch.func, or not at all? Train the uncompiled module, or "
                "use feedback=False"
            )

    def _check_finite(self, trajectories: list[Trajectory]) -> None:
        gradients = dense_gradients(self._parameters())
        held = not self.options.weight_gradients
        if gradients and not bool(norms(gradients).isfinite().all()) or held:
            place = first_nonfinite(trajectories, self._names())
            if place:
                raise NonFiniteError(
                    f"the gradient at '{place}' is not finite (seen first there, going backwards "
                    "from the loss); nothing was changed. Lower lr, or use nonfinite='skip'"
                )

    def _check_weights(self, borrowed: Borrowed) -> None:
        updated = borrowed.updated()
        if updated and not bool(norms(updated).isfinite().all()):
            bad = next(p for p in updated if not bool(p.isfinite().all()))
            raise NonFiniteError(
                f"the new weights of '{self._names().get(bad, 'a parameter')}' are not finite; "
                "nothing was changed. Lower lr, or use nonfinite='skip'"
            )

    @staticmethod
    def _unusable(trajectory: Trajectory) -> bool:
        return (
            trajectory.error is not None
            or bool(trajectory.refusal)
            or not trajectory.owned
            or trajectory.cost is None
        )

    def _usable(self, trajectories: list[Trajectory]) -> bool:
        """Whether all passes take part in feedback; raises where they must not be ignored."""
        if self.options.feedback is False:
            return False
        for trajectory in trajectories:
            if trajectory.error is not None:
                raise trajectory.error
            if trajectory.refusal:
                raise UnsupportedModelError(trajectory.refusal)
        parts = [
            f"'{s.name}'" for t in trajectories if not t.owned for s in t.stages if not s.plain
        ]
        if parts:
            raise UnsupportedModelError(
                f"{', '.join(parts)} ran outside any call that contains all layers, so the pass "
                "can't be run again; call one module that owns them all, or use feedback=False"
            )
        for trajectory in trajectories:
            self._say_plain(trajectory)
        if any(t.cost is None for t in trajectories):
            if self._recogniser.decision == "unrecognised":
                self._say(
                    "the loss was not recognised from the output's gradient, so the steps are the "
                    "borrowed optimizer's, without feedback. Name it: terminal='cross_entropy', "
                    "'mse', 'bce_with_logits', or a callable output -> factor of its Hessian"
                )
            return False
        return bool(trajectories)

    def _say_plain(self, trajectory: Trajectory) -> None:
        reasons: dict[str, list[str]] = {}
        for stage in trajectory.stages:
            if stage.plain and stage.plain != "frozen":
                reasons.setdefault(stage.plain, []).append(f"'{stage.name}'")
        for reason, names in reasons.items():
            self._say(
                f"{', '.join(names)} take the borrowed optimizer's plain step, without feedback: "
                f"{reason}"
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, DDPNOptWarning, stacklevel=4)

    def _report(
        self, step: Step, trajectories: list[Trajectory], depth: str, rescale: float = 1.0
    ) -> StepReport:
        plain = {s.name: s.plain for t in trajectories for s in t.stages if s.plain}
        costs = [t.cost.name for t in trajectories if t.cost is not None]
        terminal = costs[0] if costs else "unrecognised"
        return StepReport(
            depth,
            "none" if self.options.feedback is False else terminal,
            sum(t.samples for t in trajectories),
            rescale,
            tuple(step.reports),
            tuple(plain.items()),
            self.skipped,
        )

    def _names(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters()}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # State ----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the recorded passes whose gradients they were."""
        super().zero_grad(set_to_none)
        self._carried = {}
        if self._recorder is not None:
            self._recorder.completed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: readable with ``weights_only=True``, resumes to the bit."""
        state = super().state_dict()
        state["ddpnopt"] = {
            "version": FORMAT_VERSION,
            "options": self.options.plain_values(),
            "rescale": self._rescale,
            "coupling": dict(self._running),
            "recogniser": self._recogniser.state_dict(),
            "sketch": self._sketch.get_state(),
            "skipped": self.skipped,
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state; value function and depth stay those of the constructor.

        Raises:
            ValueError: The state is another optimizer's, or of a newer format.
        """
        own = state_dict.get("ddpnopt")
        if own is None or own.get("version") != FORMAT_VERSION:
            found = "no 'ddpnopt' entry" if own is None else f"format {own.get('version')}"
            raise ValueError(
                f"load_state_dict: {found}; expected the state_dict of a DDPNOpt, "
                f"format {FORMAT_VERSION}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "ddpnopt"})
        self._rescale, self.skipped = own["rescale"], own["skipped"]
        self._running.clear()
        self._running.update(own["coupling"])
        self._recogniser.load_state_dict(own["recogniser"])
        self._sketch.set_state(own["sketch"].cpu())
        self._refresh()
