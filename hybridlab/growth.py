"""Does anything grow: slopes of memory, files, threads and latency over the rows of a soak, with confidence.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from hybridlab.errors import StatisticsError
from hybridlab.stats import unprofiled

BLOCKS, LEAST = 24, 96  # blocks whose medians are looked at, and rows that they need
PARTS, FEWEST = 8, 32   # the same of one worker's life; shorter lives are left out
SETTLING = 0.1          # of the rows: caches fill, allocators find their size
LIFE = ", in a worker's life"
MIB = 2**20


class Quantity(NamedTuple):
    """What is watched: its column, its words, its unit, and by how much it may grow over a soak, in units or relative
    to its first median."""

    column: str
    words: str
    unit: float
    limit: float
    relative: bool


WATCHED = (
    Quantity("rss_bytes", "host memory, MiB", MIB, 0.02, True),
    Quantity("gpu_bytes", "GPU memory, MiB", MIB, 0.01, True),
    Quantity("files", "open files", 1, 1.0, False),
    Quantity("threads", "threads", 1, 1.0, False),
    Quantity("itl_ms", "gap between tokens, ms", 1, 0.03, True),
)


class Slope(NamedTuple):
    """Units an hour with a 95 % interval, and what they add up to over the `n` rows; first and last are medians of the
    first and last block."""

    per_hour: float
    low: float
    high: float
    growth: float
    first: float
    last: float
    n: int

    def grows(self, quantity: Quantity) -> bool:
        """Whether it surely grows (the interval is above 0), and by more than it may."""
        most = quantity.limit * (self.first if quantity.relative else 1)
        return self.low > 0 and self.growth > most


def slope(at_s: ArrayLike, values: ArrayLike) -> Slope:
    """The slope over medians of blocks of equal length, after the first tenth of the rows: one slow request, or one
    that found a worker being started, moves no median.

    Raises: StatisticsError for too few rows.
    """
    hours, medians, n = _blocks(at_s, values, BLOCKS)
    if n < LEAST:
        raise StatisticsError(f"{n} rows do not show whether anything grows", f"it needs n >= {LEAST}", "soak longer")
    return _found([(hours, medians)], n)


def within(at_s: pd.Series, values: pd.Series, life: pd.Series) -> Slope | None:
    """The slope inside the lives of workers: what a kill gives back grows in each of them and over none of them. What
    it adds up to is counted over the longest life, first and last are of that one. None if every life is short."""
    lives = [_blocks(at_s[own.index], own, PARTS) for _, own in values.groupby(life.astype(int))]
    kept = sorted((one for one in lives if one[2] >= FEWEST), key=lambda one: one[0][0] - one[0][-1])
    return _found([(hours, medians) for hours, medians, _ in kept], sum(n for *_, n in kept)) if kept else None


def _blocks(at_s: ArrayLike, values: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Medians of hours and values in `count` blocks, and of how many rows."""
    at, found = np.asarray(at_s, dtype=float), np.asarray(values, dtype=float)
    at, found = at[int(SETTLING * len(at)):], found[int(SETTLING * len(found)):]
    if len(found) < count:
        return np.zeros(count), np.zeros(count), len(found)
    return (np.array([np.median(block) for block in np.array_split(at, count)]) / 3600,
            np.array([np.median(block) for block in np.array_split(found, count)]), len(found))


def _found(groups: Sequence[tuple[np.ndarray, np.ndarray]], n: int) -> Slope:
    """The median of the slopes between any two blocks of one group, with the interval from Kendall's test: of Theil
    (1950) and Sen (1968), and over several groups of Hirsch, Slack and Smith (1982)."""
    pairs, variance = list[np.ndarray](), 0.0
    for hours, medians in groups:
        first, second = np.triu_indices(len(hours), 1)
        pairs.append((medians[second] - medians[first]) / (hours[second] - hours[first]))
        variance += len(hours) * (len(hours) - 1) * (2 * len(hours) + 5) / 18
    ordered = np.sort(np.concatenate(pairs))
    reach = float(scipy_stats.norm.ppf(0.975)) * variance**0.5
    low = ordered[max(round((len(ordered) - reach) / 2) - 1, 0)]
    high = ordered[min(round((len(ordered) + reach) / 2), len(ordered) - 1)]
    (hours, medians), per_hour = groups[0], float(np.median(ordered))
    return Slope(per_hour, float(low), float(high), per_hour * float(hours[-1] - hours[0]), float(medians[0]),
                 float(medians[-1]), n)


def slopes(rows: pd.DataFrame) -> dict[Quantity, Slope]:
    """The slope of each quantity that the rows of a soak hold, in its unit, over the soak; and where a worker was
    replaced, in the lives of the workers too. Gaps are those of requests whose worker was left alone."""
    found, rows = {}, unprofiled(rows)
    for quantity in WATCHED:
        own = rows[rows[quantity.column].notna()]
        if quantity.column == "itl_ms":
            own = own[own["event"] == ""]
        if not len(own):
            continue
        values = own[quantity.column].astype(float) / quantity.unit
        found[quantity] = slope(own["at_s"], values)
        if own["life"].nunique() > 1 and (inside := within(own["at_s"], values, own["life"])) is not None:
            found[quantity._replace(words=quantity.words + LIFE)] = inside
    return found
