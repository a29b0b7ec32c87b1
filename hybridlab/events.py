"""The table that every trace becomes, whoever recorded it, and which of its events belong to which token.

A row an event, columns COLUMNS: kind (KINDS), name, start_ns and end_ns since the first event, stream (of device work),
thread (of what the host did), correlation (a launch and the device work that it started share it), graph and node (of
device work, where the profiler names them), category and payload (of a range, see `ranges.span`). Kinds: kernel and
copy (memcpy, memset) on the device; launch (an API call that starts device work), sync (one that waits for it), range
and op (a PyTorch operation) on the host. Never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np
import pandas as pd

from hybridlab.errors import TraceError
from hybridlab.ranges import Category

KINDS = ("kernel", "copy", "launch", "sync", "range", "op")
DEVICE = ("kernel", "copy")
CATEGORIES: tuple[str, ...] = get_args(Category)
TOKEN = ("prefill", "decode")  # a range of these is one token
TYPES = {"kind": "str", "name": "str", "start_ns": "int64", "end_ns": "int64", "stream": "Int64", "thread": "Int64",
         "correlation": "Int64", "graph": "Int64", "node": "Int64", "category": "str", "payload": "Int64"}
COLUMNS = tuple(TYPES)
LIMIT = 2**62  # of every number: differences of two still fit 64 bits

_SUFFIX = re.compile(r"(_v\d+|_ptsz|_ptds)+$")
_LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch|Memcpy|Memset)")
_SYNC = re.compile(r"cu(da)?(Device|Stream|Event|Ctx|Thread)Synchronize")


def tidy(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of these events: COLUMNS with the dtypes of TYPES, by start (of two that start at once, the longer is
    first), stamps counted from the first start. What a row does not name is missing, or "".

    Raises: TraceError for an unknown kind, a value of a wrong type, a missing stamp, or an end before its start.
    """
    held = list(rows)
    frame = pd.DataFrame({name: _column(name, kind, [row.get(name) for row in held]) for name, kind in TYPES.items()})
    unknown = sorted(set(frame["kind"]) - set(KINDS))
    if unknown:
        raise TraceError(f"events of kind {unknown[0]!r}", f"known: {', '.join(KINDS)}")
    wrong = frame[frame["end_ns"] < frame["start_ns"]]
    if len(wrong):
        raise TraceError(f"{len(wrong)} of {len(frame)} events end before they start",
                         f"the first is {wrong['kind'].iloc[0]} {wrong['name'].iloc[0]!r}", "record the trace again")
    frame = frame.iloc[np.lexsort((-frame["end_ns"].to_numpy(), frame["start_ns"].to_numpy()))].reset_index(drop=True)
    if len(frame):
        first = int(frame["start_ns"].iloc[0])
        frame["start_ns"], frame["end_ns"] = frame["start_ns"] - first, frame["end_ns"] - first
    return frame


def tokens(events: pd.DataFrame) -> pd.DataFrame:
    """A row a token, by start, indexed by its number: token, category, position, start_ns, end_ns and thread of its
    range, which is the step as the host saw it. position is missing where the profiler lost the payload."""
    own = events[(events["kind"] == "range") & events["category"].isin(TOKEN)]
    own = own.sort_values("start_ns", kind="stable", ignore_index=True)
    own = own.assign(token=np.arange(len(own)), position=own["payload"])
    return own[["token", "category", "position", "start_ns", "end_ns", "thread"]]


def of_token(events: pd.DataFrame, token: int) -> pd.DataFrame:
    """The events of one token, its range included: what its thread began inside the range, and the device work that
    this launched, even where it ran after the range. Raises: TraceError where the trace has no such token."""
    spans = tokens(events)
    if token not in spans.index:
        raise TraceError(f"there is no token {token}", f"the trace has {len(spans)} tokens, counted from 0")
    held = holders(events, spans)
    return events[(held == token).fillna(False).to_numpy(bool)].reset_index(drop=True)


def holders(events: pd.DataFrame, spans: pd.DataFrame) -> pd.Series:
    """For each event the index of the innermost of `spans` (start_ns, end_ns, thread) that it belongs to, Int64.

    What the host did belongs to the span in which it started on the same thread, device work to that of its launch.
    """
    found = np.full(len(events), -1, dtype=np.int64)
    start, thread = events["start_ns"].to_numpy(), events["thread"]
    for name, own in spans.groupby("thread"):
        rows = np.flatnonzero((thread == name).fillna(False).to_numpy(bool))
        rows = rows[np.argsort(start[rows], kind="stable")]
        outer_first = own.sort_values(["start_ns", "end_ns"], ascending=[True, False], kind="stable")
        low = np.searchsorted(start[rows], outer_first["start_ns"], side="left")
        high = np.searchsorted(start[rows], outer_first["end_ns"], side="left")
        for label, begin, end in zip(outer_first.index, low, high, strict=True):
            found[rows[begin:end]] = label
    held = pd.Series(found, index=events.index, dtype="Int64").where(found >= 0)
    device = events["kind"].isin(DEVICE)
    launched = launches(events)["index"].map(held)
    held[device] = events.loc[device, "correlation"].map(launched).astype("Int64")
    return held


def launches(events: pd.DataFrame) -> pd.DataFrame:
    """The launch calls by their correlation: index (in `events`), name, start_ns and end_ns."""
    calls = events[(events["kind"] == "launch") & events["correlation"].notna()].drop_duplicates("correlation")
    return calls.reset_index().set_index("correlation")[["index", "name", "start_ns", "end_ns"]]


def call(name: str) -> tuple[str, str]:
    """The kind of an API call, "" for one that neither starts device work nor waits for it, and its name without the
    suffixes for versions."""
    name = _SUFFIX.sub("", name)
    return "launch" if _LAUNCH.match(name) else "sync" if _SYNC.match(name) else "", name


def category(name: str) -> str:
    """The category of a range, which is the first word of its name; "" for a word that is none."""
    first = name.partition(" ")[0]
    return first if first in CATEGORIES else ""


def one_device(devices: Iterable[object]) -> None:
    """Refuses work of several devices: gaps of one would hide behind the work of the other."""
    found = sorted({str(device) for device in devices if device is not None})
    if len(found) > 1:
        raise TraceError(f"the trace holds work of {len(found)} devices", ", ".join(found[:4]),
                         "record one device: set CUDA_VISIBLE_DEVICES")


def _column(name: str, kind: str, values: list[Any]) -> pd.Series:
    if kind == "str":
        values = ["" if value is None else value for value in values]
        wrong = [value for value in values if not isinstance(value, str)]
    else:
        wrong = [value for value in values if not (value is None and kind == "Int64") and not _is_number(value)]
    if wrong:
        raise TraceError(f"{name} of an event is {str(wrong[0])[:60]!r}", f"a {type(wrong[0]).__name__}",
                         "a text is wanted" if kind == "str" else "a whole number below 2**62 is wanted")
    return pd.Series(values, dtype=kind)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LIMIT
