"""Rows about the kernels of a decode step, counted: medians, what one variant saves against another, the floor.

Rows are those of `schemas.KERNELS`. Never imports torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hybridlab import stats
from hybridlab.stats import Estimate

OPS = ("project qkv", "attend_next", "residual output", "swiglu", "residual down", "project head", "greedy", "attend")
VARIANTS = ("torch", "kernel", "kernel, pdl", "fused, no graph", "fused", "fused, pdl")  # of operations, then of steps
COLUMNS = ["op", "context", "variant", "rows", "depth", "kernels", "n", "us", "us_low", "us_high", "ratio", "ratio_low",
           "ratio_high", "bytes", "flops", "gbs", "read_gbs", "floor_us", "share"]


class Compared(NamedTuple):
    """Two variants of one thing: µs that the second saves (negative: costs), and how many times faster it is. The pairs
    are of one round each; `ratio` is None, and `saved` has no interval, where there are too few."""

    saved: Estimate
    ratio: Estimate | None


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an operation, context and variant, in the order of the step: see `kernelbench.table`."""
    return _table(rows, "op")


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a context and variant of the whole step: see `kernelbench.steps`."""
    found = _table(rows, "step")
    return found.assign(lost_us=(found["us"] - found["floor_us"]) / found["kernels"].astype(float))


def compared(rows: pd.DataFrame, op: str, context: int, base: str, variant: str) -> Compared | None:
    """What `variant` of an operation, or of op "step", saves against `base`, round by round; None where rows of one
    are missing."""
    own = stats.unprofiled(rows)[(rows["op"] == op) & (rows["context"] == context)].sort_values("order")
    before, after = (own.loc[own["variant"] == name, "us"].to_numpy(float) for name in (base, variant))
    if not len(before) or len(before) != len(after):
        return None
    if len(before) < stats.needed(0.5):
        return Compared(Estimate(float(np.median(before - after)), math.nan, math.nan, len(before)), None)
    return Compared(stats.quantile(before - after, 0.5), stats.ratio(after, before, paired=True))


def in_ms(line: dict[str, Any]) -> dict[str, Any]:
    """The time of a line, and the ends of its interval where it has one, in ms: ms, ms_low, ms_high."""
    return {f"ms{end}": None if line[f"us{end}"] is None else line[f"us{end}"] / 1e3 for end in ("", "_low", "_high")}


def _table(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    names = ["op", "context", "variant"]
    own = stats.unprofiled(rows)[rows["metric"] == metric]
    cells = dict(list(own.sort_values("order").groupby(names, sort=False)))
    reads = rows[rows["metric"] == "read"]
    ops, variants = ({name: at for at, name in enumerate(known)} for known in (OPS, VARIANTS))
    lines = []
    for op, context, variant in sorted(cells, key=lambda key: (ops.get(key[0], -1), key[1], variants[key[2]])):
        beside = reads[(reads["variant"] == op) & (reads["context"] == context)]
        cell = cells[op, context, variant]
        lines.append({"op": op, "context": context, "variant": variant, "rows": cell["rows"].iloc[0],
                      "depth": cell["depth"].iloc[0], "kernels": cell["kernels"].iloc[0]}
                     | _line(cell, cells.get((op, context, "torch")), beside))
    return pd.DataFrame(lines, columns=COLUMNS)


def _line(cell: pd.DataFrame, base: pd.DataFrame | None, reads: pd.DataFrame) -> dict[str, Any]:
    enough = len(cell) >= stats.needed(0.5)
    us = stats.quantile(cell["us"], 0.5) if enough else None
    ratio = None
    if enough and base is not None and len(base) == len(cell):  # the i-th of both are of one round
        ratio = stats.ratio(cell["us"], base["us"], paired=True)
    median, size = float(cell["us"].median()), int(cell["bytes"].iloc[0])
    read_gbs = float((reads["bytes"] / reads["us"]).median()) / 1e3
    floor = size / read_gbs / 1e3
    return {"n": len(cell), "us": median, "us_low": us and us.low, "us_high": us and us.high,
            "ratio": ratio and ratio.value, "ratio_low": ratio and ratio.low, "ratio_high": ratio and ratio.high,
            "bytes": size, "flops": int(cell["flops"].iloc[0]), "gbs": size / median / 1e3, "read_gbs": read_gbs,
            "floor_us": floor, "share": floor / median}
