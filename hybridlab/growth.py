"""Does anything grow: slopes of memory, files, threads and latency over the rows of a soak, with confidence.

Never imports torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from hybridlab.errors import StatisticsError
from hybridlab.stats import unprofiled

BLOCKS, LEAST = 24, 96  # blocks whose medians are looked at, and rows that they need
SETTLING = 0.1          # of the rows: caches fill, allocators find their size
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
    """The slope of Theil (1950) and Sen (1968) over medians of blocks of equal length, after the first tenth of the
    rows: one slow request, or one that found a worker being started, moves no median.

    Raises: StatisticsError for too few rows.
    """
    at, found = np.asarray(at_s, dtype=float), np.asarray(values, dtype=float)
    at, found = at[int(SETTLING * len(at)):], found[int(SETTLING * len(found)):]
    if len(found) < LEAST:
        raise StatisticsError(f"{len(found)} rows do not show whether anything grows", f"it needs n >= {LEAST}",
                              "soak longer")
    hours = np.array([np.median(block) for block in np.array_split(at, BLOCKS)]) / 3600
    medians = np.array([np.median(block) for block in np.array_split(found, BLOCKS)])
    per_hour, _, low, high = (float(value) for value in scipy_stats.theilslopes(medians, hours, 0.95))
    return Slope(per_hour, low, high, per_hour * float(hours[-1] - hours[0]), float(medians[0]), float(medians[-1]),
                 len(found))


def slopes(rows: pd.DataFrame) -> dict[Quantity, Slope]:
    """The slope of each quantity that the rows of a soak hold, in its unit. Gaps are those of requests whose worker was
    left alone."""
    found, rows = {}, unprofiled(rows)
    for quantity in WATCHED:
        own = rows[rows[quantity.column].notna()]
        if quantity.column == "itl_ms":
            own = own[own["event"] == ""]
        if len(own):
            found[quantity] = slope(own["at_s"], own[quantity.column].astype(float) / quantity.unit)
    return found
