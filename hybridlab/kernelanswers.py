"""What fused kernels, early launches and graphs buy, and where the rest goes, in words from the rows of one run.

Rows are those of `schemas.KERNELS`. Each function says so where these rows do not hold its answer. Never imports torch.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from hybridlab import kerneltables, stats
from hybridlab.report import interval, number
from hybridlab.stats import Estimate


def what_fusion_buys(rows: pd.DataFrame) -> str:
    """The step in fused kernels against stock PyTorch, both in a graph, and each operation by itself."""
    words = _steps(rows, "torch", "fused")
    if not words:
        return "What fusion buys is not in these rows: time the variants torch and kernel."
    found = kerneltables.table(rows)
    for line in found[(found["variant"] == "kernel") & found["ratio"].notna()].to_dict("records"):
        words.append(f"{_named(line['op'], line['context'])}: {interval(line, 'us')} µs, {interval(line, 'ratio')} "
                     "times as fast as torch")
    return _lines("One kernel an operation, instead of those of stock PyTorch, in one graph", words)


def what_pdl_buys(rows: pd.DataFrame) -> str:
    """The step, and each operation, whose kernels begin before the last one ends, against kernels that wait."""
    words = _steps(rows, "fused", "fused, pdl")
    if not words:
        return ("No kernel began early in these rows: this device cannot start a kernel early, or the variants that "
                "were asked for leave it out.")
    for op, context in kerneltables.table(rows)[["op", "context"]].drop_duplicates().itertuples(index=False):
        found = kerneltables.compared(rows, op, context, "kernel", "kernel, pdl")
        if found is not None:
            words.append(f"{_named(op, context)}: {_difference(found.saved, 1.0, 'µs')}")
    return _lines("Kernels that begin while the one before still runs, in one graph", words)


def what_the_graph_buys(rows: pd.DataFrame) -> str:
    """The step of fused kernels replayed as one graph, against the same launched one by one from Python."""
    early = "fused, pdl" in set(rows.loc[rows["metric"] == "step", "variant"])  # where it can, no graph is early too
    words = _steps(rows, "fused, no graph", "fused, pdl" if early else "fused")
    return (_lines("The same kernels, launched by one replay instead of one by one", words) if words else
            "What the graph buys is not in these rows: time the variant kernel.")


def where_the_time_goes(rows: pd.DataFrame) -> str:
    """The floor of the step, the share of the read rate that each variant reaches, and what each launch loses."""
    stats.one_run(rows)
    words = []
    for context, own in kerneltables.steps(rows).groupby("context", sort=True):
        least = own.iloc[0]
        words.append(f"{_named('', context)}: {number(least['bytes'] / 1e6)} MB at {number(least['read_gbs'])} GB/s "
                     f"take {number(least['floor_us'] / 1e3)} ms")
        words += [f"{line['variant']}: {_ms(line)}, {100 * line['share']:.0f} % of the read rate; "
                  f"{line['kernels']:,} launches lose {number(line['lost_us'])} µs each"
                  for line in own.to_dict("records")]
    return (_lines("A step must at least read its weights, and its rows of the cache, at the rate measured beside it",
                   words) if words else "There is no whole step in these rows: measure one.")


def in_short(rows: pd.DataFrame) -> str:
    """What was found at the longest context, a line for each thing that was timed."""
    last = rows[(rows["metric"] != "step") | (rows["context"] == rows["context"].max())]
    lines = (what(last).split("\n")[:2] for what in (what_fusion_buys, what_pdl_buys, what_the_graph_buys))
    return "\n".join([" ".join(map(str.strip, found)) for found in lines] + [where_the_time_goes(last)])


def _steps(rows: pd.DataFrame, base: str, variant: str) -> list[str]:
    """A line a context: both times with their launches, what `variant` saves, and how many times as fast it is."""
    stats.one_run(rows)
    words = []
    for context, own in kerneltables.steps(rows).groupby("context", sort=True):
        found = kerneltables.compared(rows, "step", int(context), base, variant)
        if found is not None:
            lines = {line["variant"]: line for line in own.to_dict("records")}
            times = f", {_interval(found.ratio)} times as fast" if found.ratio else ""
            both = ", ".join(f"{name} {_ms(lines[name])} ({lines[name]['kernels']:,} launches)"
                             for name in (base, variant))
            words.append(f"{_named('the step', context)}: {both}: {_difference(found.saved, 1e3, 'ms')}{times}")
    return words


def _difference(saved: Estimate, scale: float, unit: str) -> str:
    value, low, high = (end / scale for end in (saved.value, saved.low, saved.high))
    if low <= 0 <= high:
        return f"not told apart, {value:.3g} {unit} [{low:.3g}, {high:.3g}] less"
    if value < 0:
        return f"{_interval(Estimate(-value, -high, -low, saved.n))} {unit} more"
    return f"{_interval(Estimate(value, low, high, saved.n))} {unit} less"


def _interval(found: Estimate) -> str:
    return interval({"v": found.value, "v_low": found.low, "v_high": found.high}, "v")


def _ms(line: dict[str, Any]) -> str:
    return f"{interval(kerneltables.in_ms(line), 'ms')} ms"


def _named(op: str, context: int) -> str:
    return f"{op}{' ' if op else ''}at a context of {context:,}" if context else op


def _lines(headline: str, words: list[str]) -> str:
    """A headline, and what belongs to it a line each."""
    return "\n  ".join([f"{headline}:", *(f"{word}." for word in words)])
