# SPDX-License-Identifier: MIT
"""Settings of Figs. 6 and 10: a deep sigmoid network, its loss, and the methods."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.reproduce.ablation_settings import Network
from ddpnopt.experiments.reproduce.mistakes import Misplaced
from ddpnopt.experiments.reproduce.outcome import Request
from ddpnopt.experiments.reproduce.schema import (
    Count,
    Name,
    OptimizerName,
    Options,
    Positive,
    Quick,
    Seed,
    SettingsError,
    Several,
    Strict,
    distinct_names,
    takes,
)

Claim = Literal["escapes", "stays"]


class Runs(Strict):
    """Seeds.

    Attributes:
        seeds: Seeds of the figure.
        first_seed: The first of them.
        choosing_seeds: Seeds on which each method's rate is chosen; none of the figure's.
        first_choosing_seed: The first of them.
        choosing_epochs: Epochs of these runs.
    """

    seeds: Count = 5
    first_seed: Seed = 0
    choosing_seeds: Count = 2
    first_choosing_seed: Seed = 1000
    choosing_epochs: Count


class Method(Strict):
    """A method of the figure.

    Attributes:
        name: Its name in tables and plots.
        optimizer: Registry name.
        options: Its options.
        lr: Learning rates; the one with the lowest mean training loss on the choosing seeds is
            taken.
        published: What the paper says of it: "escapes" from the plateau, or "stays"; None: nothing
            that our source has.
        ours: A variant of DDPNOpt; its update norm is compared with the largest baseline's.
    """

    name: Name
    optimizer: OptimizerName
    options: Options = {}
    lr: Several[Positive]
    published: Claim | None = None
    ours: bool = False

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        takes(self.optimizer, self.lr[0], self.options, "options")
        return self


class Vanishing(Strict):
    """Fig. 6 or 10.

    Attributes:
        network: What is trained on what.
        loss: "mmc" or "cross_entropy".
        escape: A run has escaped when its final training loss is below this share of the loss of
            the best constant output.
        update_ratio: Published lowest and highest ratio of DDPNOpt's update norm to the
            baselines'; None: none for this loss.
        runs: Seeds.
        quick: Sizes with `--quick`.
        method: The methods.
    """

    network: Network
    loss: Literal["mmc", "cross_entropy"]
    escape: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    update_ratio: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = None
    runs: Runs
    quick: Quick = Quick()
    method: Several[Method]

    @model_validator(mode="after")
    def _separate_seeds(self) -> Self:
        r = self.runs
        own = range(r.first_seed, r.first_seed + r.seeds)
        choosing = range(r.first_choosing_seed, r.first_choosing_seed + r.choosing_seeds)
        if set(own) & set(choosing):
            raise Misplaced(
                f"the choosing seeds {choosing[0]} to {choosing[-1]} overlap with the figure's "
                f"{own[0]} to {own[-1]}; allowed is first_choosing_seed = {own[-1] + 1} or more",
                *("runs", "first_choosing_seed"),
            )
        distinct_names("method", [method.name for method in self.method])
        if self.update_ratio is not None and self.update_ratio[0] > self.update_ratio[1]:
            raise Misplaced("the lower end comes first", "update_ratio")
        return self

    def config(
        self, request: Request, method: Method, lr: float, seed: int, epochs: int
    ) -> RunConfig:
        """One training."""
        return self.network.config(request, epochs).model_copy(
            update={
                "loss": self.loss,
                "record_updates": True,
                "optimizer": method.optimizer,
                "options": dict(method.options),
                "lr": lr,
                "seed": seed,
            }
        )


class Sizes(Strict):
    """What a request makes of the settings' numbers.

    Attributes:
        seeds: Seeds of the figure.
        choosing: Seeds of the search.
        epochs: Epochs of the figure.
        choosing_epochs: Epochs of the search.
    """

    seeds: tuple[int, ...]
    choosing: tuple[int, ...]
    epochs: int
    choosing_epochs: int


def sizes(settings: Vanishing, request: Request) -> Sizes:
    """Apply `--seeds`, `--epochs` and `--quick`.

    Raises:
        SettingsError: The seeds asked for reach the choosing seeds.
    """
    runs, quick = settings.runs, settings.quick
    number = request.seeds or (quick.seeds if request.quick else runs.seeds)
    choosing = quick.choosing_seeds if request.quick else runs.choosing_seeds
    epochs = request.epochs or (quick.epochs if request.quick else settings.network.epochs)
    own = range(runs.first_seed, runs.first_seed + number)
    chosen = range(runs.first_choosing_seed, runs.first_choosing_seed + choosing)
    if set(own) & set(chosen):
        raise SettingsError(
            f"--seeds {number}: the seeds {own[0]} to {own[-1]} overlap with the choosing seeds "
            f"{chosen[0]} to {chosen[-1]}; move runs.first_choosing_seed in the settings file"
        )
    return Sizes(
        seeds=tuple(own),
        choosing=tuple(chosen),
        epochs=epochs,
        choosing_epochs=min(runs.choosing_epochs, epochs),
    )
