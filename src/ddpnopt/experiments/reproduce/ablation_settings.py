# SPDX-License-Identifier: MIT
"""What the settings files of Tables 6-10 and Fig. 4 contain."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ddpnopt.curvature import CURVATURES
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import OPTIMIZERS, OptionValue
from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.reproduce.mistakes import Misplaced
from ddpnopt.experiments.reproduce.outcome import Request
from ddpnopt.experiments.reproduce.schema import (
    ArchitectureName,
    Count,
    DatasetName,
    InitialisationName,
    OptimizerName,
    Options,
    Positive,
    Quick,
    ScaleName,
    Seed,
    SettingsError,
    Several,
    Strict,
    distinct_names,
    takes,
)

CurvatureName = Annotated[str, AfterValidator(lambda n: lookup(CURVATURES, n, "curvature") and n)]
Contender = tuple[str, dict[str, OptionValue]]


class Network(Strict):
    """What is trained on what; one for a whole table.

    Attributes:
        dataset: Data set.
        architecture: Network, see `ddpnopt.experiments.models.ARCHITECTURE_HELP`.
        initialisation: Weights at the start.
        scale: Scaling of the inputs.
        test_share: Share of the samples held out.
        batch: Samples per step.
        epochs: Passes over the training part.
        train_samples: Training samples to draw; all if not given.
    """

    dataset: DatasetName
    architecture: ArchitectureName
    initialisation: InitialisationName = "torch"
    scale: ScaleName = "standard"
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    batch: Count
    epochs: Count
    train_samples: Count | None = None

    def config(self, request: Request, epochs: int) -> RunConfig:
        """The part of a configuration that all runs of the table share."""
        return RunConfig(
            dataset=self.dataset,
            architecture=self.architecture,
            initialisation=self.initialisation,
            scale=self.scale,
            test_share=self.test_share,
            batch=self.batch,
            epochs=epochs,
            train_samples=self.train_samples,
            data=request.data,
        )


class Runs(Strict):
    """Seeds and what is reported of a run.

    Attributes:
        seeds: Seeds of the table.
        first_seed: The first of them; the others follow.
        choosing_seeds: Seeds on which clipping thresholds are chosen; none of the table's.
        first_choosing_seed: The first of them.
        loss_measure: "train", the loss over the whole training part after the last epoch, or
            "running", the mean of the losses that the last epoch's steps saw.
    """

    seeds: Count = 10
    first_seed: Seed = 0
    choosing_seeds: Count = 3
    first_choosing_seed: Seed = 1000
    loss_measure: Literal["train", "running"] = "train"


class Block(Strict):
    """A borrowed optimizer, its twins and their rates.

    Attributes:
        baseline: The borrowed optimizer.
        curvature: DDPNOpt's curvature M, the one that the baseline uses.
        lr: Learning rates, a row each.
        eps_vxx: Tikhonov term of the paper's algorithm, a column each (V carries 1/batch).
        clip: Thresholds of `clip_grad_norm_` to choose from.
        options: Options of the baseline, and of the curvature of all twins.
        paper_options: Further options of the paper's algorithm.
    """

    baseline: OptimizerName
    curvature: CurvatureName
    lr: Several[Positive]
    eps_vxx: Several[Annotated[float, Field(ge=0.0)]]
    clip: Several[Positive]
    options: Options = {}
    paper_options: Options = {}

    @model_validator(mode="after")
    def _options_exist(self) -> Block:
        for name, options in (self.baseline_run, self.defaults):
            takes(name, self.lr[0], options, *(["options"] if self.options else []))
        name, options = self.paper(self.eps_vxx[0])
        takes(name, self.lr[0], options, *(["paper_options"] if self.paper_options else []))
        return self

    @property
    def label(self) -> str:
        """Name of the borrowed optimizer for readers."""
        return OPTIMIZERS[self.baseline].label

    @property
    def baseline_run(self) -> Contender:
        """The borrowed optimizer."""
        return self.baseline, dict(self.options)

    def paper(self, eps_vxx: float) -> Contender:
        """The paper's algorithm: dense value function, eq. 5, Tikhonov term."""
        dense: dict[str, OptionValue] = {
            "value": "dense",
            "value.backup": "riccati",
            "value.regularization": eps_vxx,
        }
        return "ddpnopt", {**dense, **self._borrowed, **self.paper_options}

    @property
    def defaults(self) -> Contender:
        """The library's default value function around the same curvature."""
        return "ddpnopt", self._borrowed

    def clipped(self, threshold: float) -> Contender:
        """The borrowed optimizer behind `clip_grad_norm_`."""
        return self.baseline, {**self.options, "grad_clip": threshold}

    @property
    def _borrowed(self) -> dict[str, OptionValue]:
        own = {f"curvature.{k}": v for k, v in self.options.items()}
        # Named: where every output is saturated the loss can't be told from its gradient, and the
        # twin would quietly become its baseline.
        named = {"curvature": self.curvature, "terminal": "cross_entropy"}
        return {**named, **own}


class AblationSettings(Strict):
    """A settings file of Tables 6-10.

    Attributes:
        network: What is trained on what.
        runs: Seeds and what is reported.
        quick: Sizes with `--quick`.
        block: Borrowed optimizers.
    """

    network: Network
    runs: Runs = Runs()
    quick: Quick = Quick()
    block: Annotated[tuple[Block, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _separate_seeds(self) -> AblationSettings:
        try:
            self.seeds_of(self.runs.seeds, self.runs.choosing_seeds)
        except SettingsError as error:
            raise Misplaced(str(error), "runs", "first_choosing_seed") from error
        # Thresholds and rows are told apart by the baseline.
        distinct_names("block", [b.baseline for b in self.block], "baseline")
        return self

    def seeds_of(self, seeds: int, choosing: int) -> tuple[range, range]:
        """The table's seeds and the choosing ones.

        Raises:
            SettingsError: They overlap.
        """
        own = range(self.runs.first_seed, self.runs.first_seed + seeds)
        first = self.runs.first_choosing_seed
        chosen = range(first, first + choosing)
        if set(own) & set(chosen):
            raise SettingsError(
                f"the choosing seeds {first} to {chosen[-1]} overlap with the table's seeds "
                f"{own[0]} to {own[-1]}; allowed is first_choosing_seed = {own[-1] + 1} or more"
            )
        return own, chosen


class CurvesBlock(Block):
    """A block of Fig. 4: also the rate whose training curves are drawn.

    Attributes:
        curve_lr: One of `lr`.
        curve_eps_vxx: One of `eps_vxx`.
    """

    curve_lr: Positive
    curve_eps_vxx: Annotated[float, Field(ge=0.0)]

    @model_validator(mode="after")
    def _listed(self) -> CurvesBlock:
        for name, value, values in (
            ("curve_lr", self.curve_lr, self.lr),
            ("curve_eps_vxx", self.curve_eps_vxx, self.eps_vxx),
        ):
            if not any(math.isclose(value, v) for v in values):
                listed = ", ".join(f"{v:g}" for v in values)
                raise Misplaced(f"{value:g} is not in the list: allowed is one of {listed}", name)
        return self


class Fig4Settings(AblationSettings):
    """The settings file of Fig. 4."""

    block: Annotated[tuple[CurvesBlock, ...], Field(strict=False, min_length=1)]
