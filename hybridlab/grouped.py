"""Intervals of values that come in groups: the gaps of one request are alike, so that requests are what repeats.

Counted as independent, 31 gaps of a request that fell into the slower of two modes are 31 witnesses of one event, and
an interval of the median holds the true one in four of ten runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats

RESAMPLES = 1999
BATCH_VALUES = 2_000_000  # values held at once while resampling, about 16 MB
REQUEST = ("process", "part", "setting", "arm", "round", "request")  # columns that tell requests apart, where they are

Floats: TypeAlias = NDArray[np.float64]
Groups: TypeAlias = NDArray[np.int64]


def _p99(values: Floats, axis: int = -1) -> Any:
    return np.quantile(values, 0.99, axis=axis)


def _nan_p99(values: Floats, axis: int = -1) -> Any:
    return np.nanquantile(values, 0.99, axis=axis)


REDUCE: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median, "p99": _p99}
PATCHY: dict[str, Callable[..., Any]] = {"mean": np.nanmean, "median": np.nanmedian, "p99": _nan_p99}  # NaN: no value


def requests(rows: pd.DataFrame) -> Groups | None:
    """The number of the request that each row belongs to; None where each has its own, or rows know of no requests."""
    if "request" not in rows or rows["request"].isna().any():
        return None
    columns = [name for name in REQUEST if name in rows]
    found = rows.groupby(columns, sort=False, dropna=False, observed=True).ngroup().to_numpy(np.int64)
    return None if len(np.unique(found)) == len(rows) else found


def bounds(values: Floats, groups: Groups, q: float, confidence: float, needed: int) -> tuple[float, float] | None:
    """The interval of quantile `q`, or None where so few groups, or groups so different, allow none.

    After Woodruff (1952, doi:10.1080/01621459.1952.10483443): the share of values up to the quantile varies from group
    to group; its standard error, times Student's t of one degree less than there are groups, is taken back to values
    through the sample itself. It is at least that of independent values. Where it reaches beyond the sample, all of the
    sample is the interval if there are `needed` groups: one value of each would say as much.
    """
    at, order = np.quantile(values, q), np.unique(groups, return_inverse=True)[1]
    count = int(order.max()) + 1
    between = [count * float(np.var(np.bincount(order, weights=beyond), ddof=1))
               for beyond in (values <= at, values < at)]  # which differ where many values are equal
    error = math.sqrt(max(*between, len(values) * q * (1 - q))) / len(values)
    reach = float(scipy_stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    if reach < min(q, 1 - q):
        return (float(np.quantile(values, q - reach, method="lower")),
                float(np.quantile(values, q + reach, method="higher")))
    return (float(values.min()), float(values.max())) if count >= needed else None


def compared(one: Floats, other: Floats, groups: Groups, others: Groups | None, reduce: str,
             combine: Callable[[Any, Any], Any], confidence: float, seed: int) -> tuple[float, float]:
    """A bootstrap interval of `combine` of what `reduce` ("mean", "median" or "p99") makes of both samples. Whole
    groups are drawn; with `others` None both samples have the same groups, which are drawn together.

    Percentiles lie further out than `confidence` says, after Hesterberg (2015, doi:10.1080/00031305.2015.1089789): with
    few groups a plain percentile interval is too narrow. Drawn 1999 times from `seed`.
    """
    rng = np.random.default_rng(seed)
    first, second = _table(one, groups), _table(other, groups if others is None else others)
    batch = max(1, BATCH_VALUES // max(first.size, second.size))
    found: list[Floats] = []
    for done in range(0, RESAMPLES, batch):
        picked = _picked(rng, first, min(batch, RESAMPLES - done))
        against = picked if others is None else _picked(rng, second, len(picked))
        found.append(combine(_reduced(reduce, first[picked]), _reduced(reduce, second[against])))
    count = min(len(first), len(second))
    reach = math.sqrt(count / (count - 1)) * scipy_stats.t.ppf(0.5 + confidence / 2, count - 1)
    below = float(scipy_stats.norm.cdf(-reach))
    low, high = np.quantile(np.concatenate(found), [below, 1 - below])
    return float(low), float(high)


def _picked(rng: np.random.Generator, table: Floats, times: int) -> Groups:
    return rng.integers(len(table), size=(times, len(table)))


def _table(values: Floats, groups: Groups) -> Floats:
    """A line a group, filled up with NaN to the longest."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(values[order], np.flatnonzero(np.diff(groups[order])) + 1)
    table = np.full((len(parts), max(map(len, parts))), np.nan)
    for line, part in zip(table, parts, strict=True):
        line[:len(part)] = part
    return table


def _reduced(name: str, drawn: Floats) -> Floats:
    """Of each draw, an array of groups and values, one number."""
    values = drawn.reshape(len(drawn), -1)
    return np.asarray((PATCHY if np.isnan(values).any() else REDUCE)[name](values, axis=-1))
