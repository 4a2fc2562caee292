# SPDX-License-Identifier: MIT
"""What the recorded computation looks like: is it a chain, who owns which rows, who mixes samples.

All three are found from the autograd graph of the pass itself, not from the user's annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.autograd.graph import GradientEdge, Node

from ddpnopt.inert import edge_of
from ddpnopt.layout import ROWS, SECOND
from ddpnopt.parameters import leaf, parameters
from ddpnopt.returned import remade
from ddpnopt.routing import ROUTING
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.typing import Tensor

#: A stage's index and a dimension: 0 for its rows, 1 for the second of its state.
Place = tuple[int, int]

REENTRANT = "CheckpointFunctionBackward"
MIXED = "samples are mixed behind it"
FROZEN = "frozen"
BRANCHED = "branches run beside it, or past it"
SHARED = "its parameters are used more than once"
#: How the reason of a layer begins that mixes them itself.
MIXING = "it mixes the samples"


def mixes(stage: Stage) -> bool:
    """Whether a stage lies in front of a mixing of samples, or mixes them itself."""
    return stage.plain.startswith((MIXED, MIXING))


def boundary(
    trajectory: Trajectory,
    start: int,
    states: list[GradientEdge | None],
    narrow: Callable[[int], bool],
) -> int:
    """The stage at whose state samples are weighted once for all stages in front of it.

    Stages between ``start`` and it are marked.

    Args:
        trajectory: The pass, its stages marked.
        start: The first stage from which on samples are kept apart.
        states: Edges of the stages' states.
        narrow: Whether a stage's own state is all that crosses the cut in front of it.

    Returns:
        Its index; the number of stages for the output; 0 if nothing needs it.
    """
    if start == 0 or trajectory.samples < 1:
        return 0
    stages = trajectory.stages
    whole = stages[-1].rows % trajectory.samples == 0 and not trajectory.heads
    found = len(stages) if whole else 0
    for index in range(start, len(stages)):
        stage = stages[index]
        fits = not stage.plain and len(stage.inputs) == 1 and stage.layout == ROWS
        if fits and states[index] is not None and narrow(index):
            found = index
            break
    for stage in stages[: found or len(stages)]:
        stage.plain = stage.plain or BRANCHED
    return found


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
        #: What picks rows by indices, each with the stage that it lies in front of.
        self.routes: list[tuple[int, Node]] = []
        self._ahead: list[tuple[int, int]] = []
        #: Outputs that no later layer has used yet.
        self._ends: dict[int, Tensor] = {}
        #: Identities of layers' parameters that something else uses, too.
        self.elsewhere: set[int] = set()

    def enter(
        self,
        index: int,
        own: Sequence[nn.Parameter],
        inputs: Sequence[Tensor],
        out: Tensor,
        boundary: bool,
        opaque: bool = False,
    ) -> None:
        """Enter a stage, and note connections that lead past the layer before it.

        Walks the graph back from the stage's inputs to the output of the last layer that takes
        part in feedback. Whatever else lies between (frozen and plain modules, activations, their
        own branches) is one function of that output; a path to an earlier layer skips it.

        Args:
            index: Number of the stage.
            own: The layer's parameters.
            inputs: Its input tensors.
            out: Its output.
            boundary: The layer can take part in feedback.
            opaque: It may use other layers' parameters.
        """
        if opaque:
            self._look_inside(own, inputs, out)
        stack: list[Node | None] = [t.grad_fn for t in inputs]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._latest:
                self._ends.pop(self._outputs[node], None)
                continue
            source, variable = self._outputs.get(node), leaf(node)
            if source is not None:
                self._ends.pop(source, None)
            elif variable and (source := self._leaves.get(variable)) is not None:
                self.elsewhere.add(variable)
            elif variable in self._own:
                self._ahead.append((variable, index))
                continue
            if source is not None:
                self._skips.append((source, index))
                continue
            self._note(node, index)
            stack += [child for child, _ in node.next_functions]
        self.states.append(edge_of(inputs[0]) if inputs else None)
        self.edges.append(edge_of(out))
        if boundary:
            self._latest = set() if out.grad_fn is None else {out.grad_fn}
            self._outputs.update(dict.fromkeys(self._latest, index))
            self._leaves.update({id(p): index for p in own})
            self._ends[index] = out

    def _note(self, node: Node, index: int) -> None:
        """What a node in front of a stage says about the pass by its kind."""
        kind = node.name()
        if kind == REENTRANT:
            self._reentrant = index
        elif kind in ROUTING:
            self.routes.append((index, node))

    def _look_inside(
        self, own: Sequence[nn.Parameter], inputs: Sequence[Tensor], out: Tensor
    ) -> None:
        """Note other layers' parameters that a module of any kind is given, or knows of."""
        mine = {id(p) for p in own}
        leaves = {id(t) for t in inputs if t.grad_fn is None}
        seen: set[Node | None] = {None, *(t.grad_fn for t in inputs)}
        stack = [out.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves.add(leaf(node))
            stack += [child for child, _ in node.next_functions]
        self.elsewhere |= (leaves & self._own) - mine

    def heads(self) -> dict[int, Tensor]:
        """Layers before the last whose output no later one uses, and that output."""
        kept = [i for i in self._ends if i + 1 != len(self.edges) and self.edges[i] is not None]
        return {i: self._ends[i].detach() for i in kept}

    def behind(self, edge: GradientEdge) -> set[int]:
        """The layers that a recorded tensor is made from, at first hand."""
        return self._sources(edge.node)

    def returned(self, outputs: Sequence[Tensor], graphs: bool, logits: bool) -> Tensor | None:
        """An output that the loss sees, and that no layer has made; None for the last layer's.

        Args:
            outputs: What the model returns.
            graphs: It may be made from the last layer's and others' together.
            logits: The loss is of logits, or is still to be recognised.
        """
        made = self._latest | {edge.node for edge in self.edges[-1:] if edge is not None}
        if any(t.grad_fn in made for t in outputs):
            return None
        last = {self._outputs[node] for node in self._latest}
        for t in outputs if graphs else ():
            sources = self._sources(t.grad_fn)
            if t.dim() and t.is_floating_point() and last & sources and sources - last:
                return t
        return remade(outputs, made, logits)

    def _sources(self, node: Node | None) -> set[int]:
        stack = [node]
        seen: set[Node] = set()
        found: set[int] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = leaf(node)
            if node in self._outputs:
                found.add(self._outputs[node])
            elif variable in self._leaves:
                self.elsewhere.add(variable)
                found.add(self._leaves[variable])
            else:
                stack += [child for child, _ in node.next_functions]
        return found

    def hidden(self, trajectory: Trajectory) -> str:
        """Why layers may have run unseen, or ''."""
        if self._reentrant is None:
            return ""
        name = trajectory.stages[self._reentrant].name or "the output"
        return (
            f"'{name}' comes behind reentrant activation checkpointing, which hides the layers "
            "inside it; call checkpoint(..., use_reentrant=False)"
        )

    def refusal(self, trajectory: Trajectory) -> str:
        """Why the layers that take part in feedback are no chain, or ''."""
        stages = trajectory.stages if self._ahead else []
        # A parameter used before its layer runs: another pass of this model lies in front. (One
        # whose module never runs, as in attention, is used by a function: a plain parameter.)
        ran = {id(p) for s in stages if not s.plain for p in parameters(s.module)}
        loop = next((index for variable, index in self._ahead if variable in ran), None)
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

    @property
    def branched(self) -> bool:
        """Whether a connection leads past some layer."""
        return bool(self._skips)

    def narrow(self, index: int) -> bool:
        """Whether a stage's own state is all that crosses the cut in front of it."""
        return not any(source < index < target for source, target in self._skips)

    def depends(self, trajectory: Trajectory, edge: GradientEdge) -> bool:
        """Whether a tensor has been made by a layer in feedback."""
        stack, seen = [edge.node], {edge.node}
        while stack:
            node = stack.pop()
            source = self._outputs.get(node)
            if source is not None and not trajectory.stages[source].plain:
                return True
            for child, _ in node.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
        return False

    def mark(
        self,
        trajectory: Trajectory,
        shared: set[int],
        trainable: Callable[[Tensor], bool],
        graphs: bool,
    ) -> None:
        """Note the stages that can't take part in feedback, and why."""
        uses: dict[str, int] = {}
        for stage in trajectory.stages:
            uses[stage.name] = uses.get(stage.name, 0) + 1
        alone = self.elsewhere if graphs else self.elsewhere | shared
        for stage in trajectory.stages:
            own = parameters(stage.module)
            if not any(map(trainable, own)):
                stage.plain = FROZEN
            elif stage.rule is not None and (
                (not graphs and uses[stage.name] > 1) or not alone.isdisjoint(map(id, own))
            ):
                stage.plain = SHARED

    def candidates(self, trajectory: Trajectory) -> dict[int, Place]:
        """What may be the number of samples, by the output's rows; and where it was found."""
        stages = trajectory.stages
        last = stages[-1].rows
        found = {last: (len(stages) - 1, 0)}
        for index, stage in enumerate(stages):
            found.setdefault(stage.rows, (index, 0))
            if stage.x.dim() > 1 and stage.may_lie(SECOND):
                found.setdefault(stage.x.shape[1], (index, 1))
        return {n: found[n] for n in sorted(found) if n > 1 and last % n == 0}

    def front(self, trajectory: Trajectory, start: int, samples: int = 0) -> None:
        """Mark the stages in front of ``start`` as mixed, and find B from the others.

        B is the number of rows of the output, or of an active stage of which the output's are a
        multiple (positions folded into the batch), if ``samples`` does not say it: of the layers
        that begin the net, where there are such (of embeddings of tokens and of positions, which
        all samples may share, those with most rows), or of all.
        """
        assert trajectory.z is not None
        for stage in trajectory.stages[:start]:
            stage.plain = stage.plain or MIXED
        last = trajectory.stages[-1].rows
        if last == 0:
            for stage in trajectory.stages:
                stage.plain = stage.plain or "the batch is empty"
        active = list(zip(trajectory.stages, self.states, strict=True))
        widest = max((s.rows for s, state in active if state is None), default=0)
        active = [pair for pair in active if not pair[0].plain]
        first = [s.rows for s, state in active if state is None and s.rows == widest]
        # Rows may be routed to layers in between, in any number.
        rows = [n for n in first or [s.rows for s, _ in active] if n and last % n == 0]
        samples = trajectory.samples = samples or min([last, *rows])
        for stage in trajectory.stages:
            second = stage.x.dim() > 1 and stage.x.shape[1] == samples and stage.may_lie(SECOND)
            if not stage.plain and (stage.rows % samples or stage.x.shape[0] % samples):
                if not second:
                    stage.plain = f"its {stage.rows} rows are not a multiple of {samples} samples"
