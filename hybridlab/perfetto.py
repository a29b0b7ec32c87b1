"""Tables of events as a trace for Perfetto or chrome://tracing: a lane a host thread and a device stream, with arrows
from each launch to the work that it started. Never imports torch.

The format is the Trace Event Format in JSON; it counts in µs, and three decimals hold each nanosecond.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import events as tables
from hybridlab.errors import TraceError
from hybridlab.files import atomic_write

HOST, DEVICE = "thread", "stream"
ARGS = ("category", "payload", "correlation", "graph", "node")
Lane = tuple[str, int, int]  # HOST or DEVICE, its number, and how many lanes of that number lie above


def write(events: pd.DataFrame | Mapping[str, pd.DataFrame], path: str | Path) -> Path:
    """Writes the events, compressed where the name ends in .gz, in one step; returns the path.

    One table (see `events.tidy`) keeps its stamps. Several, by arm, become a process each, shifted to later so that
    their first decode tokens begin together, or their first tokens where one has no decode token.
    Raises: TraceError for no table, or for several of which one has no token.
    """
    path = Path(path)
    one = isinstance(events, pd.DataFrame)
    arms: Mapping[str, pd.DataFrame] = {"trace": events} if isinstance(events, pd.DataFrame) else events
    if not arms:
        raise TraceError("there is no trace to write", str(path), "record one")
    shifts = dict.fromkeys(arms, 0) if one else _shifts(arms)
    flows = count(1)
    found = [entry for pid, (arm, table) in enumerate(arms.items(), 1)
             for entry in _process(pid, arm, table, shifts[arm], flows)]
    text = json.dumps({"displayTimeUnit": "ns", "traceEvents": found}, allow_nan=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, gzip.compress(text.encode(), mtime=0) if path.name.endswith(".gz") else text)
    return path


def _shifts(arms: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """By how many ns each arm moves."""
    spans = {arm: tables.tokens(table) for arm, table in arms.items()}
    empty = [arm for arm, own in spans.items() if own.empty]
    if empty:
        raise TraceError(f"the trace of {empty[0]!r} has no token", "several traces are aligned where a token begins",
                         "write it alone, or record it with ranges")
    decode = {arm: own[own["category"] == "decode"] for arm, own in spans.items()}
    if not any(own.empty for own in decode.values()):
        spans = decode
    starts = {arm: int(own["start_ns"].iloc[0]) for arm, own in spans.items()}
    return {arm: max(starts.values()) - start for arm, start in starts.items()}


def _process(pid: int, arm: str, table: pd.DataFrame, shift: int, flows: Iterator[int]) -> Iterator[dict[str, Any]]:
    """One arm: names of its lanes, its events, and an arrow from each launch to the first work that it started."""
    rows = table.to_dict("records")
    lanes = _lanes(rows)
    order = {lane: tid for tid, lane in enumerate(sorted(set(lanes), key=lambda lane: (lane[0] == DEVICE, *lane[1:])),
                                                  1)}
    yield _named("process", pid, 0, name=arm)
    yield _named("process", pid, 0, sort_index=pid)
    for (kind, number, below), tid in order.items():
        where = "device" if kind == DEVICE else "host"
        yield _named("thread", pid, tid, name=f"{where} {kind} {number}{f' ({below + 1})' if below else ''}")
        yield _named("thread", pid, tid, sort_index=tid)
    calls: dict[int, dict[str, Any]] = {}
    for row, lane in zip(rows, lanes, strict=True):
        start = int(row["start_ns"]) + shift
        entry = {"ph": "X", "cat": row["kind"], "name": row["name"], "pid": pid, "tid": order[lane],
                 "ts": start / 1000, "dur": int(row["end_ns"] - row["start_ns"]) / 1000, "args": _args(row)}
        yield entry
        if row["kind"] == "launch" and pd.notna(row["correlation"]):
            calls.setdefault(int(row["correlation"]), entry)
        elif row["kind"] in tables.DEVICE and pd.notna(row["correlation"]):
            call = calls.pop(int(row["correlation"]), None)
            if call is not None:
                flow = {"cat": "launch", "name": "launch", "id": next(flows), "pid": pid}
                yield {**flow, "ph": "s", "tid": call["tid"], "ts": call["ts"]}
                yield {**flow, "ph": "f", "bp": "e", "tid": entry["tid"], "ts": entry["ts"]}


def _lanes(rows: list[dict[str, Any]]) -> list[Lane]:
    """The lane of each event. On one lane events are apart or nested, else Perfetto drops them: where two kernels of a
    stream run at once, the later one goes a lane further down."""
    open_ends: dict[Lane, list[int]] = {}
    found: list[Lane] = []
    for row in rows:
        kind = DEVICE if row["kind"] in tables.DEVICE else HOST
        number = int(row[kind]) if pd.notna(row[kind]) else 0
        for below in count():
            lane = (kind, number, below)
            ends = open_ends.setdefault(lane, [])
            while ends and ends[-1] <= row["start_ns"]:
                ends.pop()
            if not ends or (kind == HOST and row["end_ns"] <= ends[-1]):
                ends.append(row["end_ns"])
                found.append(lane)
                break
    return found


def _named(what: str, pid: int, tid: int, **value: Any) -> dict[str, Any]:
    key = next(iter(value))
    return {"ph": "M", "name": f"{what}_{key}", "pid": pid, "tid": tid, "args": value}


def _args(row: dict[str, Any]) -> dict[str, Any]:
    held = {name: row[name] for name in ARGS if pd.notna(row[name]) and row[name] != ""}
    return {name: value if isinstance(value, str) else int(value) for name, value in held.items()}
