"""Is a sample of latencies steady: does it drift over its order, and is it one population or two?

A median over a drift, or over two modes, is a number that no request ever saw. Never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from hybridlab.errors import StatisticsError

LEVEL = 0.01  # flagged below this p value, both tests
BLOCKS, BLOCK_LEAST = 20, 10  # blocks of a sample, and values that the median of a block needs
DRIFT_LEAST, MODES_LEAST = BLOCKS * BLOCK_LEAST, 100
FLOAT_NOISE = 1e-7  # ms; a difference below a tenth of a nanosecond comes from dividing, not from a clock

# Upper quantiles of sqrt(n) times the dip of n uniform values: SIMULATED samples of SIMULATED_N, numpy seed 0. For a
# smaller n the quantiles are a little smaller, so that the test is the more careful; for n = 20,000 they agree.
# (Hartigan & Hartigan 1985, section 5, choose the uniform law as the unimodal one that is hardest to tell.)
SIMULATED, SIMULATED_N = 4000, 2000
TAIL = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
DIPS = (0.1926, 0.3729, 0.4472, 0.4959, 0.5315, 0.5862, 0.6272, 0.6639, 0.7304)


@dataclass(frozen=True, slots=True)
class Drift:
    """A trend over the order of a sample; the slope, in ms per 1000 values, has the 99 % interval [low, high].

    `change` is what the slope adds up to from the first value to the last, relative to the median.
    """

    slope: float
    low: float
    high: float
    change: float
    p: float
    flagged: bool
    n: int
    words: str


@dataclass(frozen=True, slots=True)
class Modes:
    """Whether a sample has more than one mode. `p` is at most what it says where it is 0.001.

    `fast` and `slow` are the medians in ms of the two halves of the best split, `slow_share` the share of the slower
    half: they describe two modes where the test flags them, and only cut one in two where it does not.
    """

    dip: float
    p: float
    flagged: bool
    fast: float
    slow: float
    slow_share: float
    n: int
    words: str


def drift(ms: ArrayLike) -> Drift:
    """Tests values in the order in which they were measured for a trend, up or down.

    Kendall's tau (Mann 1945) and the slope of Theil (1950) and Sen (1968), over medians of 20 blocks of equal length:
    following values depend on each other, following blocks hardly do as long as the dependence is much shorter than a
    twentieth of the sample, and a rare slow value does not move the median of a block.
    Raises: StatisticsError for fewer than 200 values.
    """
    values = _values(ms, DRIFT_LEAST, "a trend")
    blocks = np.array_split(values, BLOCKS)
    medians = np.array([np.median(block) for block in blocks])
    ends = np.cumsum([len(block) for block in blocks])
    centres = (ends - np.array([len(block) for block in blocks]) / 2) / 1000
    p = float(scipy_stats.kendalltau(centres, medians).pvalue)
    p = 1.0 if np.isnan(p) else p  # tau of a constant is undefined, and a constant has no trend
    slope, _, low, high = (float(found) for found in scipy_stats.theilslopes(medians, centres, 1 - LEVEL))
    change = slope * len(values) / 1000 / float(np.median(values))
    seen = (f"The latency drifts by {100 * change:+.2g} % over the sample" if p < LEVEL else
            "No drift is seen over the sample")
    words = (f"{seen}: {slope:+.3g} ms per 1000 values, 99 % interval [{low:+.3g}, {high:+.3g}], p = {p:.2g}, "
             f"n = {len(values)}.")
    return Drift(slope, low, high, change, p, p < LEVEL, len(values), words)


def modes(ms: ArrayLike) -> Modes:
    """Tests for more than one mode by the dip (Hartigan & Hartigan 1985) of the logarithm of the values.

    The dip is the largest distance between the empirical distribution and the nearest unimodal one, a share of the
    values: a slow tail weighs by how many values it holds and not by how slow they are, so a mode of a few per cent
    is a tail. The p value is that of independent values; a sample that drifts in steps can look like two modes.
    Raises: StatisticsError for fewer than 100 values, or values that are not positive.
    """
    values = _values(ms, MODES_LEAST, "a number of modes")
    if values.min() <= 0:
        raise StatisticsError("a latency is not positive", f"the smallest is {values.min():g} ms")
    logs = np.sort(np.log(_unrounded(values)))
    depth = dip(logs)
    p = dip_p(depth, len(values))
    count, ordered = _cut(logs), np.sort(values)
    fast, slow = float(np.median(ordered[:count])), float(np.median(ordered[count:]))
    share = 1 - count / len(values)
    seen = (f"There is more than one mode: {100 * (1 - share):.0f} % about {fast:.3g} ms and {100 * share:.0f} % about "
            f"{slow:.3g} ms" if p < LEVEL else "One mode is enough to describe the sample")
    words = f"{seen}: dip {depth:.3g}, p {'=' if p > TAIL[-1] else '<='} {p:.2g}, n = {len(values)}."
    return Modes(depth, p, p < LEVEL, fast, slow, share, len(values), words)


def dip(ordered: NDArray[np.float64]) -> float:
    """The dip of an ascending sample, between 1 / 2n and 1 / 4 (Hartigan 1985, algorithm AS 217).

    Below the mode a unimodal distribution function is convex, above it concave. From both ends inward, the interval
    that holds the mode shrinks to where the convex minorant and the concave majorant are furthest apart, until that
    is no further than what the parts outside have shown already.
    """
    low, high, found = 0, len(ordered) - 1, 1.0
    while ordered[high] > ordered[low]:
        at, ranks = ordered[low:high + 1], np.arange(low, high + 1, dtype=float)
        under = low + _minorant(at)
        over = high - _minorant(-at[::-1])[::-1]
        convex, concave = np.interp(at, ordered[under], under), np.interp(at, ordered[over], over)
        knots = np.union1d(under, over)  # two piecewise linear functions are furthest apart at a knot of one
        gaps = concave[knots - low] - convex[knots - low] + 1
        widest = int(knots[np.argmax(gaps)])
        if gaps.max() <= found:
            break
        left = int(under[np.searchsorted(under, widest, side="right") - 1])
        right = int(over[np.searchsorted(over, widest, side="left")])
        below = (ranks - convex + 1)[:left - low + 1].max() if left > low else 0.0
        above = (concave - ranks + 1)[right - low:].max() if right < high else 0.0
        found = max(found, float(below), float(above))
        if (left, right) == (low, high):
            break
        low, high = left, right
    return found / (2 * len(ordered))


def dip_p(depth: float, n: int) -> float:
    """How often n uniform values dip as deep, interpolated in the logarithm of DIPS; never below 0.001."""
    scaled = depth * np.sqrt(n)
    return TAIL[-1] if scaled >= DIPS[-1] else float(np.exp(np.interp(scaled, DIPS, np.log(TAIL))))


def _minorant(at: NDArray[np.float64]) -> NDArray[np.int_]:
    """Indices of the knots of the greatest convex minorant of (at[i], i), by Andrew's monotone chain (1979)."""
    x, knots = at.tolist(), [0]
    for i in range(1, len(x)):
        while len(knots) > 1:
            a, b = knots[-2], knots[-1]
            if (b - a) * (x[i] - x[b]) < (i - b) * (x[b] - x[a]):
                break
            knots.pop()
        knots.append(i)
    return np.array(knots)


def _unrounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal values spread evenly over the tick of their clock, or each tick would be a mode; all the same stay so."""
    distinct = np.unique(values)
    gaps = np.diff(distinct)
    gaps = gaps[gaps > FLOAT_NOISE]
    if not len(gaps) or len(distinct) == len(values):
        return values
    half = min(float(gaps.min()), float(distinct[0])) / 2  # no value may reach zero
    return values + np.random.default_rng(0).uniform(-half, half, len(values))


def _cut(logs: NDArray[np.float64]) -> int:
    """How many values the lower half holds where two halves spread the least about their means (Fisher 1958).

    The hundredth at either end counts as if it stood at p1 or p99, or one slow value would be a half of its own.
    """
    at = np.clip(logs, *np.quantile(logs, [0.01, 0.99]))
    n, sums = np.arange(1, len(at)), np.cumsum(at)
    between = sums[:-1] ** 2 / n + (sums[-1] - sums[:-1]) ** 2 / (len(at) - n)
    return int(np.argmax(between)) + 1


def _values(ms: ArrayLike, least: int, what: str) -> NDArray[np.float64]:
    values = np.asarray(ms, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise StatisticsError("a sample is one-dimensional and finite", f"shape {values.shape}",
                              "a failed measurement must not enter a sample")
    if len(values) < least:
        raise StatisticsError(f"{len(values)} values do not show {what}", f"it needs n >= {least}",
                              "measure more repeats")
    return values
