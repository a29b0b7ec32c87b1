"""Quantiles and ratios with their intervals; refuses what a sample is too small to say.

Intervals of independent values are exact (order statistics, binomial). Gaps of one request are alike, so that an
interval of gaps is one over requests: see `grouped`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from hybridlab import grouped
from hybridlab.errors import StatisticsError
from hybridlab.grouped import BATCH_VALUES, REDUCE, RESAMPLES, Floats, Groups

PAIR = ("round", "prompt_tokens", "index")  # what two arms of one run share


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


def quantile(sample: ArrayLike, q: float, confidence: float = 0.95, groups: Groups | None = None) -> Estimate:
    """Quantile `q` of the sample with its interval, in the unit of the sample: exact for independent values; with
    `groups`, the number of the group that each value belongs to, as `grouped.bounds` has it.

    Raises: StatisticsError when the sample is too small for the interval (naming the n needed), when groups are too few
    or differ too much for it, or values are not finite.
    """
    values = _finite(sample)
    least = needed(q, confidence)
    if len(values) < least:
        raise StatisticsError(f"quantile {q:g} of {len(values)} values has no interval",
                              f"a two-sided {confidence:.0%} interval needs n >= {least}",
                              "measure more repeats or ask for a quantile nearer to the median")
    if groups is None:
        interval = scipy_stats.quantile_test(values, p=q).confidence_interval(confidence)
        ends = (float(interval.low), float(interval.high))
    else:
        _require_groups(groups, confidence)
        ends = grouped.bounds(values, groups, q, confidence, least) or (math.nan, math.nan)
    if not all(map(math.isfinite, ends)):  # the count above is computed in floats; never show NaN
        raise StatisticsError(f"quantile {q:g} of {len(values)} values has no interval",
                              "" if groups is None else f"they are of {_count(groups)} requests that differ too much",
                              "measure more repeats")
    return Estimate(float(np.quantile(values, q)), *ends, len(values))


def of(rows: pd.DataFrame, q: float, column: str = "ms") -> Estimate | None:
    """`quantile` of a column of rows, the values of a request taken as a group; None where it has no interval."""
    try:
        return quantile(rows[column], q, groups=grouped.requests(rows))
    except StatisticsError:
        if not np.isfinite(rows[column].to_numpy(float)).all():
            raise
        return None


def at(rows: pd.DataFrame, q: float, column: str = "ms") -> Estimate:
    """`of`, with ends that are NaN where there is no interval."""
    return of(rows, q, column) or Estimate(float(rows[column].quantile(q)), math.nan, math.nan, len(rows))


def ratio(sample: ArrayLike, base: ArrayLike, confidence: float = 0.95, seed: int = 0, *, paired: bool = False,
          groups: Groups | None = None, base_groups: Groups | None = None) -> Estimate:
    """median(base) / median(sample): how many times faster than `base` the sample is, with a bootstrap interval.

    `paired` resamples both together, value by value: right when value i of both comes from the same round. The
    interval is the percentile bootstrap of 1999 resamples drawn from `seed`; with groups, those of `base` only where
    values are not paired, that of `grouped.compared`. n counts the sample. Raises: StatisticsError when either side is
    too small for an interval of its median, or a median is zero.
    """
    values, bases = _finite(sample), _finite(base)
    smaller, least = min(len(values), len(bases)), needed(0.5, confidence)
    if smaller < least:
        raise StatisticsError(f"a ratio of medians of {smaller} values has no interval",
                              f"a two-sided {confidence:.0%} interval needs n >= {least}", "measure more repeats")
    if min(values.min(), bases.min()) <= 0:
        raise StatisticsError("a ratio needs positive values", f"the smallest is {min(values.min(), bases.min()):g}")
    found = _between(values, bases, "median", lambda one, other: other / one, confidence, seed, paired,
                     (groups, base_groups))
    return Estimate(float(np.median(bases) / np.median(values)), *found, len(values))


def change(sample: ArrayLike, base: ArrayLike, statistic: str = "median", confidence: float = 0.95, seed: int = 0, *,
           paired: bool = False, groups: Groups | None = None, base_groups: Groups | None = None) -> Estimate:
    """statistic(sample) / statistic(base) - 1, of "mean", "median" or "p99", with a bootstrap interval as `ratio` has:
    0.1 where the sample is ten per cent larger. n counts the sample. Raises: StatisticsError as `ratio`, and for a p99
    of values of which either side's own has no interval."""
    values, bases = _finite(sample), _finite(base)
    smaller, least = min(len(values), len(bases)), needed(0.99 if statistic == "p99" else 0.5, confidence)
    if smaller < least:
        raise StatisticsError(f"a change of the {statistic} between {len(values)} and {len(bases)} values has no "
                              "interval", f"it needs n >= {least}", "measure more repeats")
    if statistic == "p99":
        for side, own in ((values, groups), (bases, groups if paired else base_groups)):
            quantile(side, 0.99, confidence, own)
    found = _between(values, bases, statistic, lambda one, other: one / other - 1, confidence, seed, paired,
                     (groups, base_groups))
    reduce = REDUCE[statistic]
    return Estimate(float(reduce(values) / reduce(bases) - 1), *found, len(values))


def _between(values: Floats, bases: Floats, statistic: str, combine: Any, confidence: float, seed: int, paired: bool,
             groups: tuple[Groups | None, Groups | None]) -> tuple[float, float]:
    """The interval of `combine` of the statistic of both samples."""
    if paired and len(values) != len(bases):
        raise StatisticsError("paired samples differ in length", f"{len(values)} and {len(bases)} values",
                              "pair the values by round, or pass paired=False")
    own, others = groups
    if own is not None or others is not None:
        own = np.arange(len(values)) if own is None else own
        others = None if paired else np.arange(len(bases)) if others is None else others
        for each in filter(lambda side: side is not None, (own, others)):
            _require_groups(each, confidence)
        return grouped.compared(values, bases, own, others, statistic, combine, confidence, seed)
    reduce = REDUCE[statistic]

    def found(one: Floats, other: Floats, axis: int = -1) -> Any:
        return combine(reduce(one, axis=axis), reduce(other, axis=axis))

    interval = scipy_stats.bootstrap((values, bases), found, paired=paired, vectorized=True, method="percentile",
                                     n_resamples=RESAMPLES, batch=max(1, BATCH_VALUES // max(len(values), len(bases))),
                                     confidence_level=confidence, rng=np.random.default_rng(seed)).confidence_interval
    return float(interval.low), float(interval.high)


def _require_groups(groups: Groups, confidence: float) -> None:
    if _count(groups) < (least := needed(0.5, confidence)):
        raise StatisticsError(f"values of {_count(groups)} requests have no interval",
                              f"it needs {least} requests or more", "measure more: the values of one are alike")


def _count(groups: Groups) -> int:
    return len(np.unique(groups))


def error(predicted: Any, measured: Any) -> Any:
    """How far a prediction is off, relative to what was measured: 0.1 where it is ten per cent too long."""
    return predicted / measured - 1


def summary(rows: pd.DataFrame, arms: Sequence[str] | None = None, base: str | None = "eager",
            which: Literal["both", "lengths", "pooled"] = "both") -> pd.DataFrame:
    """One line for each arm, metric and prompt length, and one for all lengths pooled (prompt_tokens "all"); `which`
    leaves out the one or the other.

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
        for length in [*(lengths if which != "pooled" else []), *(["all"] if which != "lengths" else [])]:
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
        line |= dict(zip(_names(name), _three(of(own, q)), strict=True))
    return line | dict(zip(("ratio_to_eager", "ratio_low", "ratio_high"), _three(against(own, base)), strict=True))


def against(own: pd.DataFrame, base: pd.DataFrame, like: Sequence[str] = PAIR) -> Estimate | None:
    """`ratio` of rows to those of a base, in pairs where each has its one like in the other, by the columns `like`
    (none: no pairs); the values of a request taken as a group. None where it has no interval."""
    counts = [len(side) if (groups := grouped.requests(side)) is None else _count(groups) for side in (own, base)]
    if min(counts) < needed(0.5):
        return None
    one, other, sides = _sides(own, base, like, "ms")
    return ratio(one, other, **sides)


def changed(own: pd.DataFrame, base: pd.DataFrame, statistic: str = "median", like: Sequence[str] = PAIR,
            column: str = "value") -> Estimate:
    """`change` of a column of rows against those of a base, paired as `against` does. Raises as `change`."""
    one, other, sides = _sides(own, base, like, column)
    return change(one, other, statistic, **sides)


def _sides(own: pd.DataFrame, base: pd.DataFrame, like: Sequence[str],
           column: str) -> tuple[pd.Series, pd.Series, dict[str, Any]]:
    """Both samples and how they belong together, as arguments of `ratio` and `change`."""
    groups, others = grouped.requests(own), grouped.requests(base)
    both = own.assign(group=groups).merge(base, on=list(like), suffixes=("", "_base")) if like else own.iloc[:0]
    if not len(both) == len(own) == len(base):
        return own[column], base[column], {"groups": groups, "base_groups": others}
    pairs = None if groups is None else both["group"].to_numpy(np.int64)
    return both[column], both[f"{column}_base"], {"paired": True, "groups": pairs}


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _three(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)


def _finite(sample: ArrayLike) -> Floats:
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
