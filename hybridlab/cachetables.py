"""Rows of a request stream as a table and in words, a line a setting. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from hybridlab import limits, stats
from hybridlab.report import LIMIT, Grid, interval, number, share
from hybridlab.stats import Estimate


def grid(lines: Sequence[dict[str, Any]], caption: str) -> Grid:
    """The lines as text, for a terminal, the README and its check; with floors also the limit and the share reached."""
    limited = any("ttft_limit" in line for line in lines)
    more = ["limit, ms", "of limit"] * limited
    header = ["setting", "TTFT mean, ms", "TTFT p50, ms", "TTFT p99, ms", *more, "hit rate", "ITL p50, ms", *more,
              "tokens/s", "after, ms", "captures", "capturing, ms", "held at most"]
    rows = [[line["setting"], interval(line, "ttft_mean"), interval(line, "ttft_p50"), interval(line, "ttft_p99"),
             *[interval(line, "ttft_limit"), share(line, "ttft_")] * limited, f"{100 * line['hit_rate']:.1f} %",
             interval(line, "itl_p50"), *[interval(line, "itl_limit"), share(line, "itl_")] * limited,
             number(line["tokens_per_s"]), number(line["after_mean"]), _captures(line), number(line["capture_ms"]),
             f"{line['peak_graphs']}, {number(line['peak_graph_bytes'] / 2**20)} MiB"] for line in lines]
    return Grid(f"Graph cache · {caption}", header, rows,
                "Each pass begins with a cold cache; 95 % intervals, of a mean over passes, of gaps over requests; hit "
                "rate: first tokens whose graph was there; tokens/s: the median of passes, captures and waits "
                "included; after: from a last token until the runtime is free; captures and the time of capturing are "
                f"of one pass; p99 only where it has one, from n = {stats.needed(0.99)} on."
                + f" {LIMIT}; medians over the rows, each with its own floor." * limited)


def of_setting(own: pd.DataFrame, floors: pd.DataFrame | None) -> dict[str, Any]:
    """What `cachelab.CacheResult.table` says of the stream rows of one setting."""
    first, gaps, passes = own[own["metric"] == "ttft"], own[own["metric"] == "itl"], own.groupby("round")
    average, low, high = mean(first)
    line: dict[str, Any] = {"requests": len(first), "ttft_mean": average, "ttft_mean_low": low, "ttft_mean_high": high}
    for metric, rows in (("ttft", first), ("itl", gaps)):
        for name, q in ((f"{metric}_p50", 0.5), (f"{metric}_p99", 0.99)):
            line |= _three(name, stats.of(rows, q))
        placed = own[own["metric"] == metric].assign(position=own["prompt_tokens"] + own["index"])
        line |= {f"{metric}_{name}": value for name, value in limits.cells(placed, floors).items()}
    line |= {"hit_rate": float(((first["path"] == "graph") & (first["misses"] == 0)).mean()),
             "after_mean": float(own.loc[own["metric"] == "after", "ms"].mean())}
    line |= {name: float(passes[name].sum().mean()) for name in ("captures", "evictions", "failures", "capture_ms")}
    return line | {f"peak_{name}": int(own[name].max()) for name in ("graphs", "graph_bytes")}


def _three(name: str, found: Estimate | None) -> dict[str, float | None]:
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def mean(first: pd.DataFrame) -> tuple[float, float | None, float | None]:
    """The mean of all first tokens with its interval over passes."""
    means, average = first.groupby("round")["ms"].mean().to_numpy(), float(first["ms"].mean())
    if len(means) < 3:  # of two, the interval says nothing: twelve times their distance
        return average, None, None
    half = float(scipy_stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return average, average - half, average + half


def words(line: dict[str, Any]) -> str:
    """One line of the table as a sentence."""
    first = (f"With {line['setting']} a first token took {interval(line, 'ttft_mean')} ms on average, and for "
             f"{100 * line['hit_rate']:.1f} % of them the graph was there")
    happened = []
    if line["captures"]:
        happened.append(f"one pass captured {line['captures']:.3g} graphs in {number(line['capture_ms'])} ms")
    if line["evictions"]:
        happened.append(f"evicted {line['evictions']:.3g}")
    if line["failures"]:
        happened.append(f"failed to capture {line['failures']:.3g}")
    if happened:
        happened.append(f"and held {number(line['peak_graph_bytes'] / 2**20)} MiB at most")
    return f"{first}{'; ' if happened else ''}{', '.join(happened)}."


def _captures(line: dict[str, Any]) -> str:
    kinds = (("evictions", "evicted"), ("failures", "failed"))
    return ", ".join([f"{line['captures']:.3g}", *(f"{line[name]:.3g} {word}" for name, word in kinds if line[name])])
