"""Rows of a reproduction of the paper as tables: its two, its ablations, its protocol beside a sound one, and costs.

Rows are those of `schemas.PAPER`, of one run. Published numbers have tables of their own. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hybridlab import limits, published, stats, tallies
from hybridlab.errors import StatisticsError
from hybridlab.firstcalls import FIRST
from hybridlab.judging import KEYS
from hybridlab.papersamples import by_length, generations, served_as
from hybridlab.report import LIMIT, NONE, Grid, number
from hybridlab.stats import Estimate

PARTS = {"cached": "KV cache", "recomputed": "whole sequence"}
ABLATIONS = (  # what is left out, part, ablated, base, and the published cell
    ("capture in the request", "capture", "capture=sync", "capture=async",
     ("ablations", "ttft increase", "without asynchronous graph regeneration")),
    ("no prefill graphs", "capture", "capture=never", "capture=async", None),
    ("dynamic path in PyTorch, replayed", "cached", "graph", "hybrid",
     ("ablations", "per-token latency increase", "dynamic path in plain Python")),
    ("dynamic path in PyTorch, launched", "cached", "eager", "jit", None),
)


def ttft(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """Table I: one line a prompt length, one column an arm: the median, its interval, and how graphs served it; with
    floors the limit."""
    own = rows[(rows["part"] == "ttft") & (rows["metric"] == "ttft")]
    cells = {(arm, tokens): found for arm, tokens, found in by_length(rows, "ttft", "median")}
    states = own.groupby(["arm", "tokens"])["state"].agg(lambda found: ", ".join(sorted(set(found) - {"none"})))
    arms = list(own["arm"].drop_duplicates())
    first = pd.DataFrame({"metric": "ttft", "prompt_tokens": sorted(set(own["tokens"]))})
    limit, column = _limits(first, floors)
    lines = [[str(tokens), *limit[place:place + len(column)],
              *(f"{_three(cells.get((arm, tokens)))}{_aside(states.get((arm, tokens), ''))}" for arm in _order(arms))]
             for place, tokens in enumerate(first["prompt_tokens"])]
    header = ["prompt tokens", *column, *(f"{arm}, ms" for arm in _order(arms))]
    return Grid(f"TTFT by prompt length · {caption}", header, lines,
                f"Medians of warm, interleaved requests with 95 % intervals, n = {_least(own)} or more a cell; hit: a "
                "graph of just this length, bucket: padded to one, miss: no graph."
                + f" {LIMIT.partition(';')[0]}." * len(column))


def _limits(wanted: pd.DataFrame, floors: pd.DataFrame | None) -> tuple[list[str], list[str]]:
    """The floor of each row as a cell, and the name of their column; both empty without floors."""
    if floors is None:
        return [], []
    return [NONE if pd.isna(ms) else number(ms) for ms in limits.of_rows(wanted, floors)], ["limit, ms"]


def p99(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """Table II: one line a generation length, a column an arm, with a KV cache and with the whole sequence recomputed;
    with floors the limit of the last gap with a KV cache."""
    columns = {(part, arm): f"{arm}, {name}, ms" for part, name in PARTS.items() for arm in _order(list(
        rows.loc[(rows["part"] == part) & (rows["metric"] == "gap"), "arm"].drop_duplicates()))}
    cells = {(part, arm, tokens): found for part in PARTS for arm, tokens, found in by_length(rows, part, "p99")}
    own = rows[rows["part"].isin(list(PARTS)) & (rows["metric"] == "gap")]
    new = generations(own) if len(own) else []
    begin = int((own["position"] - own["index"]).max()) if len(own) else 0
    last = pd.DataFrame({"metric": "itl", "prompt_tokens": begin, "position": [begin + tokens - 1 for tokens in new]})
    limit, column = _limits(last, floors)
    lines = [[str(tokens), *limit[place:place + len(column)],
              *(_three(cells.get((part, arm, tokens))) for part, arm in columns)] for place, tokens in enumerate(new)]
    return Grid(f"P99 per token by generation length · {caption}", ["new tokens", *column, *columns.values()], lines,
                f"From a prompt of 10 tokens; P99 of the gaps of the first so many new tokens, where there are "
                f"{stats.needed(0.99)} or more, with 95 % intervals over requests where these are enough and agree; "
                "whole sequence: computed again for every token."
                + f" {LIMIT.partition(';')[0]}; of the last token, with a KV cache." * len(column))


def by_position(rows: pd.DataFrame, part: str, together: int = 32) -> pd.DataFrame:
    """Median and p99 of gaps by position: arm, position (the middle of `together` of them), n, p50, p50_low, p50_high,
    and p99 (NaN where n does not allow one), in ms."""
    own = stats.unprofiled(rows)[(rows["part"] == part) & (rows["metric"] == "gap")]
    lines = []
    for (arm, place), cell in own.groupby(["arm", (own["index"] - 1) // together], sort=False):
        if len(cell) >= stats.needed(0.5):
            middle, tail = stats.at(cell, 0.5, "value"), stats.at(cell, 0.99, "value")
            lines.append({"arm": arm, "position": float(cell["position"].median()), "n": len(cell), "p50": middle.value,
                          "p50_low": middle.low, "p50_high": middle.high, "place": place,
                          "p99": tail.value if len(cell) >= stats.needed(0.99) else float("nan")})
    table = pd.DataFrame(lines, columns=["arm", "position", "n", "p50", "p50_low", "p50_high", "p99", "place"])
    return table.sort_values(["arm", "place"]).drop(columns="place").reset_index(drop=True)


def effects(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an ablation that the rows allow: what, n, mean and tail (Estimate of the relative increase of mean and
    p99, None where n does not allow one), and published (a fraction, None where none is)."""
    found, rows = [], stats.unprofiled(rows)
    for what, part, ablated, base, cell in ABLATIONS:
        own, other = (rows[(rows["part"] == part) & (rows["arm"] == arm) & rows["metric"].isin(["ttft", "gap"])]
                      for arm in (ablated, base))
        if len(own) and len(other):
            found.append({"what": what, "n": min(len(own), len(other)), "mean": _change(own, other, "mean"),
                          "tail": _change(own, other, "p99"), "published": published.value(cell) if cell else None,
                          "source": published.source(cell) if cell else ""})
    return pd.DataFrame(found, columns=["what", "n", "mean", "tail", "published", "source"], dtype=object)


def ablations(rows: pd.DataFrame, caption: str) -> Grid:
    """How much longer it takes without a part of the method; the published increase in a column of its own."""
    lines = [[line["what"], _percent(line["mean"]), _percent(line["tail"]),
              NONE if line["published"] is None else f"{line['published']:+.1%} ({line['source']})"]
             for line in effects(rows).to_dict("records")]
    return Grid(f"Ablations · {caption}", ["without", "mean", "p99", "published, elsewhere"], lines,
                "Increase of TTFT under a stream of new lengths, and of the gap between tokens with a KV cache, with "
                "95 % intervals; the published ones were measured on another machine, without intervals.")


def protocol(rows: pd.DataFrame, caption: str) -> Grid:
    """The published protocol beside the sound one: mean ± std of five first calls, P99 of repeats, and warm medians."""
    own = stats.unprofiled(rows)[rows["part"] == "protocol"]
    warm = {(arm, tokens): found for arm, tokens, found in by_length(rows, "ttft", "median")}
    lines = []
    for (system, tokens), cell in own.groupby(["arm", "tokens"], sort=False):
        arm, name = served_as(system, cell)
        first, more = (cell.loc[cell["metric"] == metric, "value"] for metric in ("first", "repeated"))
        sound = warm.get((arm, tokens))
        lines.append([f"{name}: {tokens} tokens", f"{number(first.mean())} ± {number(first.std())}",
                      number(float(np.quantile(more, 0.99))) if len(more) else NONE, _three(sound),
                      f"{first.mean() / sound.value:.2f}" if sound else NONE])
    count = own[own["metric"] == "repeated"].groupby(["arm", "tokens"]).size()
    return Grid(f"Protocols · {caption}", ["first calls of", f"mean of {FIRST}, ms",
                                           f"P99 of {int(count.max()) if len(count) else 0}, ms", "warm median, ms",
                                           "cold / warm"], lines,
                "Left, as published: a fresh process, no warm-up, lengths in ascending order, mean ± standard "
                "deviation, then repeated calls. Right: warm, interleaved, 95 % interval, same run and kernels.")


def costs(rows: pd.DataFrame, caption: str) -> Grid:
    """What a graph costs by its length: making it, what a replay saves, its bytes; and the rest of memory."""
    lines, rows = [], stats.unprofiled(rows)
    if (rows["part"] == "cost").any():
        for line in tallies.break_even(as_cache(rows)).to_dict("records"):
            lines.append([f"{line['setting']}: {line['prompt_tokens']} tokens", number(line["cost_ms"]),
                          number(line["jit_ms"]), number(line["replay_ms"]),
                          number(line["reuses"]) if np.isfinite(line["reuses"]) else "never",
                          f"{line['graph_bytes'] / 2**20:.2f}"])
    for line in rows[(rows["part"] == "memory") & (rows["metric"] != "clipped")].to_dict("records"):
        lines.append([line["metric"], NONE, NONE, NONE, NONE, f"{line['value']:.2f}"])
    return Grid(f"Memory and captures · {caption}", ["what", "made in, ms", "launched, ms", "replayed, ms",
                                                     "repaid after, replays", "MiB"], lines,
                "Medians; made: rehearsed, captured and instantiated; outputs kept: logits and KV cache of each graph "
                "kept alive, as in the public code.")


def processes(rows: pd.DataFrame, caption: str) -> Grid:
    """What a second process costs: a line a step, a column an arm of part "ipc"."""
    own = stats.unprofiled(rows)[rows["part"] == "ipc"]
    arms = sorted(own["arm"].drop_duplicates(), key=len)
    lines = [[step, *(_with_unit(cell[cell["arm"] == arm]) for arm in arms)]
             for step, cell in own.groupby("metric", sort=False)]
    return Grid(f"Two processes · {caption}", ["step", *arms], lines,
                "Medians over turns with 95 % intervals: the same request to an engine in this process and to one in a "
                "worker, by the asker's clock; gap: the median of a request's; hand-over: of a token's id to the "
                "client; round trip: of an empty message.")


def as_cache(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of part "cost" as those of a cache run, for `tallies` and `answers`."""
    own = rows[rows["part"] == "cost"]
    return own.rename(columns={"arm": "setting", "tokens": "prompt_tokens", "value": "ms", "bytes": "graph_bytes"})


def clipped(rows: pd.DataFrame) -> str:
    """Which lengths were left out, and why, in words; empty where none was."""
    own = rows[rows["metric"] == "clipped"]
    return "\n".join(f"Left out of part {part}: {', '.join(map(str, sorted(cell['tokens'])))} tokens, as "
                     f"{cell['reason'].iloc[0]}." for part, cell in own.groupby("part", sort=False))


def published_grid(name: str) -> Grid:
    """A published table by itself: one line a length or quantity, a column a system and edition, unknown empty."""
    cells = published.table(name)
    columns = cells[["system", "edition"]].drop_duplicates().itertuples(index=False)
    names = [(one.system, one.edition) for one in columns]
    lines = []
    for (quantity, tokens), own in cells.groupby(["quantity", "tokens"], sort=False, dropna=False):
        by = {(one["system"], one["edition"]): one for one in own.to_dict("records")}
        what = quantity if pd.isna(tokens) else str(tokens)
        lines.append([what, *(_cell(by.get(name)) for name in names)])
    sources = sorted({word for text in cells["source"] for word in text.split()[:1 if text.startswith("R ") else None]})
    header = ["tokens or quantity", *(f"{system} {edition}".strip() for system, edition in names)]
    return Grid(f"Published, not measured here · {name}", header, lines,
                f"Sources {', '.join(sources)}, cell by cell in data/paper/{name}.csv; empty cells are unknown.")


GRIDS: dict[str, Callable[..., Grid]] = {
    "paper-ttft": ttft, "paper-p99": p99, "paper-ablations": ablations, "paper-protocol": protocol,
    "paper-costs": costs, "paper-processes": processes}
LIMITED = ("paper-ttft", "paper-p99")  # tables of latencies that have a limit
NEEDS = {"paper-ttft": ("ttft",), "paper-p99": tuple(PARTS), "paper-ablations": ("capture", "cached"),
         "paper-protocol": ("protocol",), "paper-costs": ("cost", "memory"), "paper-processes": ("ipc",)}


def _change(own: pd.DataFrame, base: pd.DataFrame, statistic: str) -> Estimate | None:
    try:
        return stats.changed(own, base, statistic, ("round", "request") if (own["part"] == "capture").all() else KEYS)
    except StatisticsError:
        return None


def _order(arms: list[str]) -> list[str]:
    known = ["eager", "graph", "jit", "hybrid"]
    return sorted(arms, key=lambda arm: (known.index(arm.partition(" ")[0]), arm))


def _three(found: Estimate | None) -> str:
    if found is None:
        return NONE
    ends = f"[{number(found.low)}, {number(found.high)}]" if found.low <= found.high else "(no interval)"
    return f"{number(found.value)} {ends}"


def _with_unit(own: pd.DataFrame) -> str:
    found = stats.of(own, 0.5, "value")
    return f"{_three(found)} {own['unit'].iloc[0]}" if found else NONE


def _percent(found: Estimate | None) -> str:
    return NONE if found is None else f"{found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}]"


def _aside(text: str) -> str:
    return f" {text}" if text else ""


def _least(own: pd.DataFrame) -> int:
    return int(own.groupby(["arm", "tokens"]).size().min()) if len(own) else 0


def _cell(found: dict[Any, Any] | None) -> str:
    if found is None or np.isnan(found["value"]):
        return ""
    spread = "" if np.isnan(found["spread"]) else f" ± {found['spread']:g}"
    return f"{found['value']:g}{spread} {found['unit']} ({found['source'].split()[0]})"
