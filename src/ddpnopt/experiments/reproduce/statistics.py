# SPDX-License-Identifier: MIT
"""Means over seeds, paired differences with bootstrap intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

#: Confidence level of all intervals.
LEVEL = 0.95
#: Resamples of a bootstrap; its generator always starts at the same seed.
RESAMPLES = 10_000

#: How intervals and verdicts are made: printed under every table that has them.
METHOD = (
    f"**Intervals** are {100 * LEVEL:.0f} % bootstrap intervals of the mean paired difference (one "
    "seed is one split, one initialisation and one order of samples, the same for both "
    "optimizers): "
    f"percentiles of {RESAMPLES:,} resamples, widened about the mean by t/z sqrt(n/(n-1)) since a "
    "plain percentile interval of few seeds is too narrow (at 10 seeds by a factor of 1.22). A "
    "difference is **significant** where its interval leaves out 0. Of 20 cells without any true "
    "difference one is significant by chance; the verdicts are not corrected for that."
)
DIVERGED = (
    "**Diverged runs**: a loss that is not finite is left out of the mean loss and of the paired "
    "difference (column `diverged` counts them, `worst` is then infinite); their accuracy counts "
    "as it is. Where every run of a twin diverged and the baseline's did not, the verdict is "
    "`diverged`, which counts against the twin."
)

NOT_RUN = "not run"
#: No seed on which both are finite: all runs of the first diverged, those of both, or those of the
#: reference (at least where the first has a number).
LOST, BOTH_LOST, REFERENCE_LOST = "diverged", "both diverged", "baseline diverged"
SAME, OPPOSITE, NEITHER = "same sign", "opposite sign", "no difference"
SIGNIFICANT, INSIGNIFICANT = "significant", "not significant"


@dataclass(frozen=True)
class Summary:
    """Seeds of one cell.

    Attributes:
        mean: Mean over the finite values; NaN where there is none.
        sd: Standard deviation (n - 1); NaN below two values.
        seeds: Number of runs.
        worst: Worst value: for a loss infinite where a run's is not finite, for an accuracy the
            lowest finite one.
        diverged: Number of values that are not finite.
    """

    mean: float
    sd: float
    seeds: int
    worst: float
    diverged: int


def summarise(values: Sequence[float], higher_is_better: bool) -> Summary:
    """Summarise one value per seed.

    Args:
        values: The seeds' values; infinite or NaN where a run diverged.
        higher_is_better: An accuracy; False: a loss.

    Returns:
        Mean, spread, worst seed.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    lost = len(array) - len(finite)
    if len(array) == 0:
        return Summary(math.nan, math.nan, 0, math.nan, 0)
    worst = math.nan
    if lost and not higher_is_better:
        worst = math.inf
    elif len(finite):
        worst = float(finite.min() if higher_is_better else finite.max())
    mean = float(finite.mean()) if len(finite) else math.nan
    sd = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    return Summary(mean, sd, len(array), worst, lost)


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        mean: Mean of the seeds' differences; NaN without pairs.
        low: Lower end of its interval; NaN below two pairs.
        high: Upper end.
        pairs: Number of seeds with both values finite.
        sd: Standard deviation of the seeds' differences (n - 1); NaN below two pairs.
        least: Smallest difference.
        most: Largest one.
        without: Why there are no pairs, where there are none.
    """

    mean: float
    low: float
    high: float
    pairs: int
    sd: float = math.nan
    least: float = math.nan
    most: float = math.nan
    without: str = NOT_RUN

    @property
    def significant(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0.0 or self.high < 0.0


#: No pairs at all.
NOTHING = Difference(math.nan, math.nan, math.nan, 0)


def interval(differences: Array) -> tuple[float, float]:
    """Bootstrap interval of a mean.

    Args:
        differences: One finite number per seed, shape (n,).

    Returns:
        Lower and upper end; NaN below two numbers.
    """
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    mean = float(differences.mean())
    if np.ptp(differences) == 0.0:
        return mean, mean
    generator = np.random.default_rng(0)
    means = differences[generator.integers(0, n, size=(RESAMPLES, n))].mean(axis=1)
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    # Hesterberg (2015, section 4.1): the percentile interval lacks t against z and n - 1 against n.
    wider = stats.t.ppf(1 - tail, n - 1) / stats.norm.ppf(1 - tail) * math.sqrt(n / (n - 1))
    return mean + wider * (float(low) - mean), mean + wider * (float(high) - mean)


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two optimizers on the same seeds.

    Args:
        values: One number per seed.
        reference: The other's, subtracted; same seeds, same order.

    Returns:
        Mean difference and interval over the seeds where both are finite.
    """
    both = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        differences = both[0] - both[1]
    differences = differences[np.isfinite(differences)]
    if len(differences) == 0:
        return replace(NOTHING, without=_without(*both))
    low, high = interval(differences)
    sd = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    ends = float(differences.min()), float(differences.max())
    return Difference(float(differences.mean()), low, high, len(differences), sd, *ends)


def _without(values: Array, reference: Array) -> str:
    """Why no seed has two finite numbers."""
    if len(values) == 0:
        return NOT_RUN
    if np.isfinite(values).any():
        return REFERENCE_LOST
    return LOST if np.isfinite(reference).any() else BOTH_LOST


def verdict(published: float, difference: Difference) -> str:
    """Judge a measured difference by the published one.

    Args:
        published: Published difference, the same way round; NaN: none is published.
        difference: The measured one.

    Returns:
        "same sign, significant", "same sign, not significant", "opposite sign, significant",
        "opposite sign, not significant"; "no difference, not significant" where the measured (or
        the published) difference is exactly 0; without a published one, "significant" or "not
        significant"; without pairs `difference.without`: "diverged" and the like, or "not run".
    """
    if difference.pairs == 0:
        return difference.without
    weight = SIGNIFICANT if difference.significant else INSIGNIFICANT
    if math.isnan(published):
        return weight
    product = math.copysign(1.0, published) * difference.mean
    if published == 0.0 or difference.mean == 0.0:
        return f"{NEITHER}, {weight}"
    return f"{SAME if product > 0 else OPPOSITE}, {weight}"


@dataclass(frozen=True)
class Count:
    """Verdicts of many cells, counted.

    Attributes:
        cells: Cells with a verdict.
        same: Cells with the published sign.
        same_significant: Those of them that are significant.
        against: Cells with the opposite sign, significantly, and those whose runs all diverged
            where the baseline's did not.
        missing: Cells without runs.
    """

    cells: int
    same: int
    same_significant: int
    against: int
    missing: int

    @property
    def agree(self) -> int:
        """Cells with the published sign, or without a significant difference."""
        return self.cells - self.against


def count(verdicts: Sequence[str]) -> Count:
    """Count verdicts.

    Args:
        verdicts: Texts of `verdict`.

    Returns:
        The counts.
    """
    judged = [v for v in verdicts if v != NOT_RUN]
    same = [v for v in judged if v.startswith(SAME)]
    opposite = [v for v in judged if v.startswith(OPPOSITE) and v.endswith(f", {SIGNIFICANT}")]
    return Count(
        cells=len(judged),
        same=len(same),
        same_significant=sum(v.endswith(f", {SIGNIFICANT}") for v in same),
        against=len(opposite) + judged.count(LOST),
        missing=len(verdicts) - len(judged),
    )
