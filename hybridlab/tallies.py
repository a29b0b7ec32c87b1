"""Rows of a cache run, counted: what became of each request, and what each captured graph cost and saves.

Rows are those of `schemas.CACHE`. Never imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from hybridlab import stats
from hybridlab.errors import StatisticsError

ASK = {"stream": "measure one: compare settings in it", "cost": "set cost_lengths, for example [16, 64, 256]",
       "disturb": "set disturb, for example ['thread']"}
HAPPENED = ["captures", "evictions", "failures"]
OUTCOMES = ("replayed (hit)", "captured, then replayed", "run by JIT (miss)", "run eagerly (miss)")


def part(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one part of one run. Raises `StatisticsError` for several runs, or for a part that is not there."""
    stats.one_run(rows)
    own = rows[rows["part"] == name]
    if own.empty:
        raise StatisticsError(f"there are no rows of part {name!r}", f"{len(rows)} rows", ASK[name])
    return own


def settings(rows: pd.DataFrame) -> list[str]:
    """The settings in the rows, by name, numbers in them by size, whatever they are compared with first."""
    first = ("default", "quiet", "capture=never", "shared")
    return sorted({str(name) for name in rows["setting"]}, key=lambda name: (
        first.index(name) if name in first else len(first), [int(word) if word.isdecimal() else word
                                                             for word in re.split(r"(\d+)", name)]))


def throughput(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a setting of a stream: passes, and the tokens a second of a pass: median (tokens_per_s), least, most.

    Inside the clock: first tokens, gaps, and from a last token until the runtime is free again, one request after the
    other. Outside: pauses, building the runtime, settling after the last request. Raises as `part`.
    """
    own = part(rows, "stream")
    own = own[own["request"].notna()]
    tokens = own[own["metric"].isin(["ttft", "itl"])].groupby(["setting", "round"]).size()
    rates = (tokens / (own.groupby(["setting", "round"])["ms"].sum() / 1e3)).groupby("setting")
    table = pd.DataFrame({"passes": rates.size(), "tokens_per_s": rates.median(), "least": rates.min(),
                          "most": rates.max()})
    return table.loc[settings(own)].reset_index(names="setting")


def throughput_words(rows: pd.DataFrame) -> str:
    """`throughput` in one sentence."""
    lines = [f"{line['setting']} {line['tokens_per_s']:.3g}" for line in throughput(rows).to_dict("records")]
    return f"Tokens a second, captures and waits included: {', '.join(lines)}."


def requests(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a request of a stream, in order.

    Columns: round, setting, request, prompt_tokens, bucket, ms (its TTFT), path, reason, hit (replayed, and nothing was
    captured for it first), outcome, captures, evictions and failures until the runtime was free again, and graphs and
    graph_bytes held then.
    """
    own = part(rows, "stream")
    own = own[own["request"].notna()]
    keys = ["setting", "round", "request"]
    happened = own.groupby(keys)[HAPPENED].sum()
    held = own.assign(last=own["index"].where(own["index"] >= 0, math.inf)).sort_values("last").groupby(keys)
    first = own[own["metric"] == "ttft"].set_index(keys)[["prompt_tokens", "bucket", "ms", "path", "reason", "misses"]]
    table = first.join(happened).join(held[["graphs", "graph_bytes"]].last()).reset_index().sort_values(keys)
    table["request"] = table["request"].astype(int)
    table["hit"] = (table["path"] == "graph") & (table["misses"] == 0)
    table["outcome"] = np.select(
        [table["hit"], table["path"] == "graph", table["path"] == "jit"], OUTCOMES[:3], OUTCOMES[3])
    return table.reset_index(drop=True)


def break_even(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a setting and prompt length whose capture was timed: how many reuses repay it.

    cost_ms (rehearsal, capture and instantiation), jit_ms, replay_ms and graph_bytes (of the one graph) are medians of
    n captures. reuses is the median of cost / (jit - replay), each from the times of one capture: infinite where a
    replay saves nothing; low and high are its 95 % interval, missing where n is too small or a capture saves nothing.
    """
    found = []
    own = part(rows, "cost")
    for name in settings(own):
        for length, cell in own[own["setting"] == name].groupby("prompt_tokens"):
            times = cell.pivot_table(index="round", columns="metric", values="ms", aggfunc="median").dropna()
            cost = times[["rehearse", "capture", "instantiate"]].sum(axis=1)
            saved = times["jit"] - times["replay"]
            each = (cost / saved).where(saved > 0, math.inf)
            sure = stats.quantile(each, 0.5) if len(each) >= stats.needed(0.5) and np.isfinite(each).all() else None
            found.append({"setting": name, "prompt_tokens": int(length), "cost_ms": cost.median(),
                          "jit_ms": times["jit"].median(), "replay_ms": times["replay"].median(),
                          "reuses": float(each.median()), "low": sure.low if sure else math.nan,
                          "high": sure.high if sure else math.nan, "n": len(each),
                          "graph_bytes": float(cell.groupby("round")["graph_bytes"].max().median())})
    return pd.DataFrame(found)


def cut_short(rows: pd.DataFrame, wanted: Mapping[str, int]) -> list[str]:
    """A sentence a part of which fewer rounds were measured than `wanted`, which says how many that were to be."""
    done = {name: own.groupby("setting")["round"].nunique().min() for name, own in rows.groupby("part")}
    return [f"budget_s ended part {name} after {done[name]} of {count} rounds: its intervals are wide or missing."
            for name, count in wanted.items() if done.get(name, count) < count]


def passes(table: pd.DataFrame) -> str:
    """How many passes of its trace a setting was served, in words."""
    most = int(table.groupby("setting")["round"].nunique().max())
    return f"{most} passes" if most > 1 else "1 pass"


def sizes(table: pd.DataFrame, what: str, counts: pd.Series | None = None) -> str:
    """Smallest and largest sample of a setting, in words."""
    counts = table.groupby("setting").size() if counts is None else counts
    least, most = int(counts.min()), int(counts.max())
    return f"n = {least:,}{f' to {most:,}' if most != least else ''} {what}"


def binary(most: float) -> tuple[float, str]:
    """The unit in which so many bytes are a short number, and its size."""
    power = min(3, max(0, int(math.log2(max(float(most), 1.0)) // 10)))
    return 1024.0**power, ("B", "KiB", "MiB", "GiB")[power]
