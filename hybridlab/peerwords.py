"""Systems under one protocol as a table and in words. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from hybridlab import limits
from hybridlab.report import LIMIT, METRICS, NONE, POOLED, WORDS, Grid, interval, number

EQUAL, OURS = "equal to ours", "ours"  # how greedy tokens compare where nothing is to be said

Systems = Mapping[str, Mapping[str, Any]]


def grid(table: pd.DataFrame | None, rows: pd.DataFrame, floors: pd.DataFrame | None, systems: Systems,
         caption: str) -> Grid:
    """A line a system, all prompt lengths pooled: TTFT and ITL at p50 and p99, how many times as long as ours, with
    floors the least time that the machine allows and the share of it reached; the note says what is missing, and why.

    `table`: as `PeersResult.table`, None without rows.
    """
    ours = next(iter(systems), "ours")
    found = {} if table is None else {(line["arm"], line["metric"]): line for line in
                                      table[table["prompt_tokens"] == "all"].to_dict("records")}
    lines = [[name, *(text for metric in METRICS for text in _cells(found.get((name, metric)), ours, rows, floors))]
             for name in systems]
    more = [] if floors is None else ["limit, ms", "of limit"]
    header = ["system", *(f"{name}{word}" for metric in METRICS for name, words in (
        (f"{metric.upper()} ", ["p50, ms", "p99, ms"]), ("", ["× ours", *more])) for word in words)]
    note = (f"{POOLED}; × ours is how many times as long as {ours} in the same interleaved run, each system in a "
            "process of its own.")
    about = [*([] if floors is None else [f"{LIMIT}."]), *(_about(name, notes) for name, notes in systems.items())]
    return Grid(f"Peers · {caption}", header, lines, " ".join([note, *about]))


def reading(table: pd.DataFrame, systems: Systems, on_cpu: bool) -> str:
    """The comparison in words; `table` as `PeersResult.table`."""
    ours, said = next(iter(systems)), []
    for metric in reversed(METRICS):
        own = table[(table["metric"] == metric) & (table["prompt_tokens"] == "all")]
        parts = [f"{interval(line, 'slower')} times as long in {line['arm']}" for line in own.to_dict("records")
                 if line["arm"] != ours and line["slower"] is not None]
        if parts:
            said.append(f"The median {WORDS[metric]} of {ours} takes {_of(own, ours)}; it is {', '.join(parts)}.")
    if on_cpu:
        said.append("These are CPU timings: nothing here is replayed on a device, and ratios are not GPU ratios.")
    wrong = [_about(name, notes) for name, notes in systems.items() if notes["why"] or _tokens(notes)]
    return " ".join([*said, *wrong])


def _of(own: pd.DataFrame, name: str) -> str:
    line = own[own["arm"] == name].to_dict("records")
    return f"{interval(line[0], 'p50')} ms" if line else "no time"


def _cells(line: dict[str, Any] | None, ours: str, rows: pd.DataFrame, floors: pd.DataFrame | None) -> list[str]:
    """Of one system and metric; dashes where it has no rows."""
    if line is None:
        return [NONE] * (3 if floors is None else 5)
    found = [interval(line, "p50"), interval(line, "p99"), "1" if line["arm"] == ours else interval(line, "slower")]
    if floors is not None:
        own = rows[(rows["arm"] == line["arm"]) & (rows["metric"] == line["metric"])]
        least, share = limits.floor(own, floors), limits.share(own, floors)
        found += [NONE if least is None else number(least),
                  f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]" if share else NONE]
    return found


def _about(name: str, notes: Mapping[str, Any]) -> str:
    """A sentence on one system: what ran it, or why nothing did, its versions, and what is wrong with its tokens."""
    versions = ", ".join(f"{package} {number}" for package, number in (notes.get("versions") or {}).items() if number)
    return f"{name}: {'; '.join(filter(None, [notes['why'] or notes['reason'], versions, _tokens(notes)]))}."


def _tokens(notes: Mapping[str, Any]) -> str:
    """What a reader must know of its tokens; empty where they are ours."""
    tokens = notes.get("tokens", "")
    return f"tokens {tokens}" if notes["state"] == "measured" and tokens not in ("", OURS, EQUAL) else ""
