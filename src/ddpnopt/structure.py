# SPDX-License-Identifier: MIT
"""What the recorded computation looks like: is it a chain, who owns which rows, who mixes samples.

All three are found from the autograd graph of the pass itself, not from the user's annotations.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ddpnopt.inert import probe
from ddpnopt.layers import rule_for
from ddpnopt.parameters import parameters
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.typing import Tensor

REENTRANT = "CheckpointFunctionBackward"
MIXED = "samples are mixed behind it"
FROZEN = "frozen"
BRANCHED = "branches run beside it, or past it"
#: How the reason of a layer begins that mixes them itself.
MIXING = "it mixes the samples"


def mixes(stage: Stage) -> bool:
    """Whether a stage lies in front of a mixing of samples, or mixes them itself."""
    return stage.plain.startswith((MIXED, MIXING))


def boundary(trajectory: Trajectory, start: int, states: list[GradientEdge | None]) -> int:
    """The stage at whose state samples are weighted once for all stages in front of it.

    Args:
        trajectory: The pass, its stages marked.
        start: The first stage from which on samples are kept apart.
        states: Edges of the stages' states.

    Returns:
        Its index; the number of stages for the output; 0 if nothing needs it.
    """
    if start == 0 or trajectory.samples < 1:
        return 0
    for index in range(start, len(trajectory.stages)):
        stage = trajectory.stages[index]
        if not stage.plain and len(stage.inputs) == 1 and states[index] is not None:
            return index
    whole = trajectory.stages[-1].rows % trajectory.samples == 0
    return len(trajectory.stages) if whole else 0


class Anatomy:
    """A model's parametrised modules: which are layers, which share parameters, who owns them all.

    Args:
        model: The network.
        trainable: Whether a parameter belongs to the optimizer.

    Attributes:
        hooked: Parametrised modules without parametrised children, by path.
        containers: The modules above them (and the model itself), by path.
        shared: Identities of parameters that several modules hold.
        own: Identities of the layers' parameters.
    """

    def __init__(self, model: nn.Module, trainable: Callable[[Tensor], bool]) -> None:
        self.model, self.trainable = model, trainable
        self.hooked: dict[str, nn.Module] = {}
        self.containers: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            own = any(p is not None for p in module._parameters.values())
            inner = any(True for m in module.children() for _ in m.parameters())
            if hasattr(module, "parametrizations"):  # computes its weights: one layer as a whole
                inside, own, inner = (*inside, f"{name}." if name else ""), True, False
            if own and not inner:
                self.hooked[name] = module
            if inner or module is model:
                self.containers[name] = module
        self.modules = list(model.modules())
        self._inside: dict[int, list[nn.Module]] = {id(model): self.modules}
        self.shared: set[int] = set()
        self.own: set[int] = set()
        self._owners: set[int] = set()
        self._state: tuple[tuple[int, bool], ...] = ()

    def outdated(self) -> bool:
        """Whether modules have been added, removed or replaced."""
        now = list(self.model.modules())
        return len(now) != len(self.modules) or any(map(operator.is_not, now, self.modules))

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The modules of a container, as of the last look."""
        if id(module) not in self._inside:
            self._inside[id(module)] = list(module.modules())
        return self._inside[id(module)]

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module has a rule and a parameter to optimise, now."""
        return rule_for(module) is not None and any(map(self.trainable, parameters(module)))

    def layers(self) -> dict[str, nn.Module]:
        """All such modules."""
        return {name: module for name, module in self.hooked.items() if self.is_layer(module)}

    def receiving(self, weight_gradients: bool) -> list[Tensor]:
        """Parameters that a backward pass gives gradients to.

        Args:
            weight_gradients: Whether the layers' weights are among them.
        """
        own = {id(p): p for m in self.modules for p in m._parameters.values() if p is not None}
        used: list[Tensor] = [p for p in own.values() if self.trainable(p)]
        if weight_gradients:
            return used
        held = {id(w) for m in self.layers().values() if (w := held_weight(m)) is not None}
        held -= self.shared
        return [p for p in used if id(p) not in held]

    def refresh(self) -> None:
        """Look at the parameters again: some may be frozen, or swapped for others."""
        state = tuple(
            (id(p), p.requires_grad) for module in self.hooked.values() for p in parameters(module)
        )
        if state != self._state:
            uses = Counter(identity for identity, _ in state)
            self.shared = {identity for identity, n in uses.items() if n > 1}
            layers = self.layers().values()
            self.own = {id(p) for m in layers for p in parameters(m)}
            wanted = {id(m) for m in layers}
            self._owners = {id(m) for m in self.modules if wanted <= {id(c) for c in m.modules()}}
            self._state = state

    def owns_all(self, module: nn.Module) -> bool:
        """Whether a module contains every layer, as of the last `refresh`."""
        return id(module) in self._owners


def held_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight whose gradient the layer's rule makes unnecessary, if there is one."""
    rule = rule_for(module)
    return module._parameters.get("weight") if rule is not None and rule.holds_weight else None


class Ledger:
    """Nodes and edges of the stages while a forward pass runs; dropped when it ends.

    Args:
        own: Identities of all layers' parameters.
    """

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self.edges: list[GradientEdge | None] = []
        self.states: list[GradientEdge | None] = []
        self._latest: set[Node] = set()
        self._outputs: dict[Node, int] = {}
        self._leaves: dict[int, int] = {}
        self._skips: list[tuple[int, int]] = []
        self._reentrant: int | None = None
        self._ahead: list[tuple[int, int]] = []

    def enter(
        self,
        index: int,
        own: Sequence[nn.Parameter],
        inputs: list[Tensor],
        outputs: list[Tensor],
        boundary: bool,
    ) -> None:
        """Enter a stage, and note connections that lead past the layer before it.

        Walks the graph back from the stage's inputs to the output of the last layer that takes
        part in feedback. Whatever else lies between (frozen and plain modules, activations, their
        own branches) is one function of that output; a path to an earlier layer skips it.

        Args:
            index: Number of the stage.
            own: The layer's parameters.
            inputs: Its input tensors.
            outputs: Its output tensors.
            boundary: The layer can take part in feedback.
        """
        stack: list[Node | None] = [t.grad_fn for t in inputs]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen or node in self._latest:
                continue
            seen.add(node)
            source = self._outputs.get(node)
            leaf = id(getattr(node, "variable", None))
            if source is None:
                source = self._leaves.get(leaf)
            if source is None and leaf in self._own:
                self._ahead.append((leaf, index))
                continue
            if source is not None:
                self._skips.append((source, index))
                continue
            if node.name() == REENTRANT:
                self._reentrant = index
            stack += [child for child, _ in node.next_functions]
        out, x = outputs[0], (inputs or outputs)[0]
        self.edges.append(get_gradient_edge(out) if out.requires_grad else None)
        self.states.append(get_gradient_edge(x) if inputs and x.requires_grad else None)
        if boundary:
            self._latest = {t.grad_fn for t in outputs if t.grad_fn is not None}
            self._outputs.update({node: index for node in self._latest})
            self._leaves.update({id(p): index for p in own})

    def hidden(self, trajectory: Trajectory) -> str:
        """Why layers may have run unseen, or ''."""
        if self._reentrant is None:
            return ""
        return (
            f"'{trajectory.stages[self._reentrant].name}' comes behind reentrant activation "
            "checkpointing, which hides the layers inside it; call "
            "checkpoint(..., use_reentrant=False)"
        )

    def refusal(self, trajectory: Trajectory) -> str:
        """Why the layers that take part in feedback are no chain, or ''."""
        stages = trajectory.stages
        # A parameter used before its layer runs: another pass of this model lies in front. (One
        # whose module never runs, as in attention, is used by a function: a plain parameter.)
        ran = {id(p) for s in stages if not s.plain for p in parameters(s.module)}
        loop = next((index for leaf, index in self._ahead if leaf in ran), None)
        if loop is not None:
            return (
                f"the input of '{stages[loop].name}' was made with the model's own layers "
                "(a model applied to its own output): feedback is for chains; train this model "
                "with feedback=False"
            )
        return ""

    def rejoined(self, trajectory: Trajectory, start: int) -> int:
        """The first stage from which on the layers run one after another.

        Args:
            trajectory: The pass, its stages marked.
            start: Stages in front of this one are no chain for another reason.
        """
        stages, before = trajectory.stages, -1
        while before != start:
            before = start
            for source, target in self._skips:
                past = range(max(source + 1, start), target)
                if any(not stages[index].plain for index in past):
                    start = max(start, target)
        for stage in stages[:start]:
            stage.plain = stage.plain or BRANCHED
        return start

    def mark(
        self, trajectory: Trajectory, shared: set[int], trainable: Callable[[Tensor], bool]
    ) -> None:
        """Note the stages that can't take part in feedback, and why."""
        uses: dict[str, int] = {}
        for stage in trajectory.stages:
            uses[stage.name] = uses.get(stage.name, 0) + 1
        for stage in trajectory.stages:
            own = parameters(stage.module)
            if not any(trainable(p) for p in own):
                stage.plain = FROZEN
            elif stage.rule is not None and (
                uses[stage.name] > 1 or any(id(p) in shared for p in own)
            ):
                stage.plain = "its parameters are used more than once"

    def front(self, trajectory: Trajectory, start: int) -> None:
        """Mark the stages in front of ``start`` as mixed, and find B from the others.

        B is the number of rows of the output, or of an active stage of which the output's are a
        multiple (positions folded into the batch). Of layers that begin a branch (embeddings of
        tokens and of positions, which all samples may share) those with most rows count.
        """
        assert trajectory.z is not None
        for stage in trajectory.stages[:start]:
            stage.plain = stage.plain or MIXED
        last = trajectory.stages[-1].rows
        if last == 0:
            for stage in trajectory.stages:
                stage.plain = stage.plain or "the batch is empty"
        pairs = list(zip(trajectory.stages, self.states, strict=True))
        widest = max((s.rows for s, state in pairs if state is None), default=0)
        own = [s.rows for s, state in pairs if not s.plain and (state or s.rows == widest)]
        rows = [n for n in own if n and last % n == 0]
        samples = trajectory.samples = min([last, *rows])
        for stage in trajectory.stages:
            if not stage.plain and (stage.rows % samples or stage.x.shape[0] % samples):
                stage.plain = f"its {stage.rows} rows are not a multiple of {samples} samples"


def mixing_start(
    trajectory: Trajectory, edges: list[GradientEdge | None], turn: int = 0
) -> tuple[int, bool]:
    """The first stage from which on no layer mixes samples on the way to the output.

    One sample is perturbed at the output, in the adjoint direction: one backward pass with a
    seed on its rows alone shows at every stage whether the gradient stays in that sample's rows.
    Both mixing (BatchNorm) and another ownership of rows (time-major folding) show up.

    Args:
        trajectory: The pass.
        edges: Gradient edges of its stages' outputs.
        turn: Which sample to perturb: the middle one, the first, the last, ...

    Returns:
        The index of the first unmixed stage, and whether the finding is conclusive (a zero
        gradient, as behind a layer that starts at zero, shows nothing).
    """
    samples, z = trajectory.samples, trajectory.z
    assert z is not None and edges[-1] is not None
    indices = [i for i, s in enumerate(trajectory.stages) if not s.plain and edges[i] is not None]
    if samples <= 1 or not indices:
        return 0, False
    chosen = (samples // 2, 0, samples - 1)[turn] if turn < 3 else turn * 7919 % samples
    rows = z.shape[0] // samples
    seed = torch.zeros_like(z)
    generator = torch.Generator().manual_seed(0)
    part = slice(chosen * rows, (chosen + 1) * rows)
    seed[part] = torch.randn(seed[part].shape, generator=generator).to(seed)
    gradients = probe(edges[-1], [edges[i] for i in indices], seed)
    start, conclusive = 0, True
    for index, gradient in zip(indices, gradients, strict=True):
        if gradient is None or not bool(gradient.any()) or not bool(gradient.isfinite().all()):
            conclusive = False
            continue
        per_sample = gradient.reshape(samples, -1).ne(0).any(1)
        per_sample[chosen] = False
        if bool(per_sample.any()):
            start = index + 1
    return start, conclusive
