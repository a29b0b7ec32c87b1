"""Quantiles and ratios with their intervals; refuses what a sample is too small to say.

Intervals are exact for independent samples (order statistics, binomial). Gaps of one request follow each other, so
their intervals are a lower bound of the real uncertainty; rounds are what repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from hybridlab.errors import StatisticsError

RESAMPLES = 1999
BATCH_VALUES = 2_000_000  # values held at once while resampling, about 16 MB
PAIR = ["round", "prompt_tokens", "index"]  # what two arms of one run share


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of `n` values with its two-sided interval [low, high]."""

    value: float
    low: float
    high: float
    n: int


def needed(q: float, confidence: float = 0.95) -> int:
    """The smallest sample for which a two-sided order-statistic interval of quantile `q` has both ends.

    Both extremes must lie outside the quantile with probability at least 1 - (1 - confidence) / 2 each:
    max(q, 1 - q) ** n <= (1 - confidence) / 2.
    """
    _check_fractions(q, confidence)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(q, 1 - q)))


def quantile(sample: ArrayLike, q: float, confidence: float = 0.95) -> Estimate:
    """Quantile `q` of the sample with its exact interval, in the unit of the sample.

    Raises: StatisticsError when the sample is too small for the interval (naming the n needed) or not finite.
    """
    values = _finite(sample)
    least = needed(q, confidence)
    if len(values) < least:
        raise StatisticsError(f"quantile {q:g} of {len(values)} values has no interval",
                              f"a two-sided {confidence:.0%} interval needs n >= {least}",
                              "measure more repeats or ask for a quantile nearer to the median")
    interval = scipy_stats.quantile_test(values, p=q).confidence_interval(confidence)
    low, high = float(interval.low), float(interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):  # the count above is computed in floats; never show NaN
        raise StatisticsError(f"quantile {q:g} of {len(values)} values has no interval", "", "measure more repeats")
    return Estimate(float(np.quantile(values, q)), low, high, len(values))


def ratio(sample: ArrayLike, base: ArrayLike, confidence: float = 0.95, seed: int = 0, *,
          paired: bool = False) -> Estimate:
    """median(base) / median(sample): how many times faster than `base` the sample is, with a bootstrap interval.

    `paired` resamples both together, value by value: right when value i of both comes from the same round.
    The interval is the percentile bootstrap of 1999 resamples drawn from `seed`. n counts the sample.
    Raises: StatisticsError when either side is too small for an interval of its median, or a median is zero.
    """
    values, bases = _finite(sample), _finite(base)
    smaller, least = min(len(values), len(bases)), needed(0.5, confidence)
    if smaller < least:
        raise StatisticsError(f"a ratio of medians of {smaller} values has no interval",
                              f"a two-sided {confidence:.0%} interval needs n >= {least}", "measure more repeats")
    if paired and len(values) != len(bases):
        raise StatisticsError("paired samples differ in length", f"{len(values)} and {len(bases)} values",
                              "pair the values by round, or pass paired=False")
    if values.min() <= 0:
        raise StatisticsError("a ratio needs positive values", f"the smallest is {values.min():g}")
    found = scipy_stats.bootstrap((values, bases), _median_ratio, paired=paired, vectorized=True, method="percentile",
                                  n_resamples=RESAMPLES, batch=max(1, BATCH_VALUES // max(len(values), len(bases))),
                                  confidence_level=confidence, rng=np.random.default_rng(seed))
    interval = found.confidence_interval
    return Estimate(float(_median_ratio(values, bases)), float(interval.low), float(interval.high), len(values))


def change(sample: ArrayLike, base: ArrayLike, statistic: str = "median", confidence: float = 0.95, seed: int = 0, *,
           paired: bool = False) -> Estimate:
    """statistic(sample) / statistic(base) - 1, of "mean", "median" or "p99", with a bootstrap interval as `ratio` has:
    0.1 where the sample is ten per cent larger. n counts the sample. Raises: StatisticsError as `ratio`, and for a p99
    of fewer values than its own interval would need."""
    values, bases = _finite(sample), _finite(base)
    reduce = {"mean": np.mean, "median": np.median, "p99": _p99}[statistic]
    smaller, least = min(len(values), len(bases)), needed(0.99 if statistic == "p99" else 0.5, confidence)
    if smaller < least:
        raise StatisticsError(f"a change of the {statistic} between {len(values)} and {len(bases)} values has no "
                              "interval", f"it needs n >= {least}", "measure more repeats")
    if paired and len(values) != len(bases):
        raise StatisticsError("paired samples differ in length", f"{len(values)} and {len(bases)} values",
                              "pair the values by round, or pass paired=False")

    def relative(one: NDArray[np.float64], other: NDArray[np.float64], axis: int = -1) -> Any:
        return reduce(one, axis=axis) / reduce(other, axis=axis) - 1

    found = scipy_stats.bootstrap((values, bases), relative, paired=paired, vectorized=True, method="percentile",
                                  n_resamples=RESAMPLES, batch=max(1, BATCH_VALUES // max(len(values), len(bases))),
                                  confidence_level=confidence, rng=np.random.default_rng(seed)).confidence_interval
    return Estimate(float(relative(values, bases)), float(found.low), float(found.high), len(values))


def _p99(values: NDArray[np.float64], axis: int = -1) -> Any:
    return np.quantile(values, 0.99, axis=axis)


def error(predicted: Any, measured: Any) -> Any:
    """How far a prediction is off, relative to what was measured: 0.1 where it is ten per cent too long."""
    return predicted / measured - 1


def summary(rows: pd.DataFrame, arms: Sequence[str] | None = None, base: str | None = "eager") -> pd.DataFrame:
    """One line for each arm, metric and prompt length, and one for all lengths pooled (prompt_tokens "all").

    Columns: arm, prompt_tokens, metric, n, p50, p50_low, p50_high, p99, p99_low, p99_high (ms), ratio_to_eager,
    ratio_low, ratio_high. A cell that n does not support is None. `arms` orders the lines (default: by name);
    `base` names the arm that ratios are taken against, None for no ratios, which is much faster.
    Raises: StatisticsError when the rows come from more than one run, because arms are compared within a run only.
    """
    one_run(rows)
    lines: list[dict[str, Any]] = []
    for metric in sorted(rows["metric"].unique(), reverse=True):  # ttft before itl
        of_metric = rows[rows["metric"] == metric]
        lengths: list[Any] = sorted(int(length) for length in of_metric["prompt_tokens"].unique())
        for length in [*lengths, "all"]:
            cell = of_metric if length == "all" else of_metric[of_metric["prompt_tokens"] == length]
            for arm in (arms if arms is not None else sorted(cell["arm"].unique())):
                own = cell[cell["arm"] == arm]
                if len(own):
                    lines.append({"arm": arm, "prompt_tokens": length, "metric": metric}
                                 | _line(own, cell[cell["arm"] == base]))
    columns = ["arm", "prompt_tokens", "metric", "n", *_names("p50"), *_names("p99"),
               "ratio_to_eager", "ratio_low", "ratio_high"]
    frame = pd.DataFrame(lines, columns=columns, dtype=object)  # object keeps None apart from a number
    return frame.astype({"n": "int64"})


def one_run(rows: pd.DataFrame) -> None:
    """Refuses rows of several runs or none, as machines, versions and load differ between runs, and rows that
    `unprofiled` refuses."""
    runs = sorted(str(name) for name in unprofiled(rows)["run_id"].unique())
    if len(runs) != 1:
        raise StatisticsError(f"the rows come from {len(runs)} runs", ", ".join(runs[:3]),
                              "summarise one run at a time; arms are comparable within one interleaved run")


def unprofiled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, as they are. Raises: StatisticsError where some were taken while a profiler listened."""
    listened = rows["profiled"].fillna(False).astype(bool) if "profiled" in rows else None
    if listened is not None and listened.any():
        runs = ", ".join(map(str, rows.loc[listened, "run_id"].unique()[:3])) if "run_id" in rows else ""
        raise StatisticsError(f"{int(listened.sum())} of {len(rows)} rows were taken while a profiler listened",
                              f"{f'run {runs}: ' if runs else ''}it adds to each of them",
                              "measure without one; a trace explains latencies and is none")
    return rows


def _line(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    line: dict[str, Any] = {"n": len(own)}
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        estimate = quantile(own["ms"], q) if len(own) >= needed(q) else None
        line |= dict(zip(_names(name), _three(estimate), strict=True))
    both = own.merge(base, on=PAIR, suffixes=("", "_base"))
    enough = min(len(own), len(base)) >= needed(0.5)
    if not enough:
        against = None
    elif len(both) == len(own) == len(base):
        against = ratio(both["ms"], both["ms_base"], paired=True)
    else:
        against = ratio(own["ms"], base["ms"])
    return line | dict(zip(("ratio_to_eager", "ratio_low", "ratio_high"), _three(against), strict=True))


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _three(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)


def _median_ratio(values: NDArray[np.float64], bases: NDArray[np.float64], axis: int = -1) -> Any:
    return np.median(bases, axis=axis) / np.median(values, axis=axis)


def _finite(sample: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(sample, dtype=np.float64)
    if values.ndim != 1:
        raise StatisticsError("a sample is one-dimensional", f"shape {values.shape}")
    if not np.isfinite(values).all():
        raise StatisticsError(f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite", "",
                              "a failed measurement must not enter a sample")
    return values


def _check_fractions(q: float, confidence: float) -> None:
    for name, value in (("q", q), ("confidence", confidence)):
        if not 0 < value < 1:
            raise StatisticsError(f"{name} is {value}", "it must lie between 0 and 1")
