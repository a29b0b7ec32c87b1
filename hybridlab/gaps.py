"""Where the time of a token goes, from a table of events: launches, gaps on the device, waits and Python.

Tables are those of `events.tidy`. Times are µs where a column ends in us, ns where it ends in ns. Device work is
kernels and copies; the device is busy while any runs, on whatever stream. Never imports torch.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hybridlab import events as tables

LATE, INSIDE, DEVICE, UNKNOWN = "launch", "in graph", "device", "unknown"
CAUSES = (LATE, INSIDE, DEVICE, UNKNOWN)
OUTSIDE = "outside"  # what no range holds


def busy(events: pd.DataFrame) -> int:
    """How long the device worked, ns: the union of its work, time that two streams share counted once."""
    return _union_ns(_work(events))


def overlap_ns(events: pd.DataFrame) -> int:
    """How much longer the device's work is one by one than as a union, ns: what concurrent streams saved."""
    own = _work(events)
    return int((own["end_ns"] - own["start_ns"]).sum()) - _union_ns(own)


def gaps(events: pd.DataFrame) -> pd.DataFrame:
    """A row a gap, in which no stream worked between two pieces of device work: start_ns, end_ns, us, before and after
    (names of the work that ended and that began), cause.

    cause: "in graph" where the same launch, which is a graph's, started both; "launch" where the call that started the
    next work began after the previous had ended, so that the host was late; "device" where it began in time; "unknown"
    where the trace does not hold the call.
    """
    own = _work(events).sort_values("start_ns", kind="stable", ignore_index=True)
    start, end = own["start_ns"].to_numpy(), own["end_ns"].to_numpy()
    reached = np.maximum.accumulate(end)
    last = np.maximum.accumulate(np.where(end == reached, np.arange(len(own)), 0))  # whose end that is
    after = np.flatnonzero(start[1:] > reached[:-1]) + 1
    before = last[after - 1]
    correlation = own["correlation"].astype("Int64")
    called = correlation.map(tables.launches(events)["start_ns"]).astype("Int64").iloc[after].reset_index(drop=True)
    one = (correlation.iloc[after].reset_index(drop=True) == correlation.iloc[before].reset_index(drop=True))
    idle_from, idle_to = reached[after - 1], start[after]
    cause = np.select([one.fillna(False).to_numpy(bool), called.isna().to_numpy(bool),
                       (called > idle_from).fillna(False).to_numpy(bool)], [INSIDE, UNKNOWN, LATE], DEVICE)
    return pd.DataFrame({"start_ns": idle_from, "end_ns": idle_to, "us": (idle_to - idle_from) / 1e3,
                         "before": own["name"].to_numpy()[before], "after": own["name"].to_numpy()[after],
                         "cause": cause})


def by_token(events: pd.DataFrame) -> pd.DataFrame:
    """A row a token: token, category, position, and what belongs to it, see `events.of_token`.

    host_us: its range on the host; launches: calls that start device work; graph_launches: those of them that launch
    a graph; kernels; device_us: from the first to the last of its work on the device; busy_us and idle_us: the parts of
    that in which its work ran and in which none did; overlap_us: what streams did at once; launch_us and sync_us: the
    host in calls that launch and that wait; ops_us: in PyTorch's operations, nested ones counted once; python_us: the
    rest of host_us without launch and sync calls, in a trace without a GPU without operations.
    """
    spans = tables.tokens(events)
    held = tables.holders(events, spans)
    on_cpu = not events["kind"].isin((*tables.DEVICE, "launch")).any()
    groups = dict(iter(events.groupby(held.to_numpy("float64", na_value=-1.0))))
    rows = []
    for span in spans.itertuples():
        own = groups.get(float(span.token), events.iloc[:0])
        rows.append({"token": span.token, "category": span.category, "position": span.position}
                    | _token(own, int(span.start_ns), int(span.end_ns), on_cpu))
    columns = ["token", "category", "position", "host_us", "launches", "graph_launches", "kernels", "device_us",
               "busy_us", "idle_us", "overlap_us", "launch_us", "sync_us", "python_us", "ops_us"]
    types = {name: "float64" if name.endswith("_us") else "int64" for name in columns[3:]}
    types |= {"token": "int64", "category": "str", "position": "Int64"}
    return pd.DataFrame(rows, columns=columns).astype(types)


def by_kernel(events: pd.DataFrame) -> pd.DataFrame:
    """A row a name of device work, the longest first: name, count, us (all of them together), share (of the time that
    the device was busy; they add up to more than 1 where streams overlap). In a trace without a GPU operations are the
    work, each without those inside it."""
    own, ops = _work(events), events[events["kind"] == "op"]
    own, ns = (own, own["end_ns"] - own["start_ns"]) if len(own) else (ops, _alone_ns(ops))
    lengths = ns.groupby(own["name"].to_numpy()).agg(["size", "sum"])
    table = pd.DataFrame({"name": lengths.index, "count": lengths["size"].to_numpy(),
                          "us": lengths["sum"].to_numpy() / 1e3})
    table["share"] = table["us"] / (_union_ns(own) / 1e3)
    return table.sort_values(["us", "name"], ascending=[False, True], ignore_index=True)


def by_range(events: pd.DataFrame) -> pd.DataFrame:
    """A row a category of range, the longest on the host first: range, count, host_us (without the ranges inside, so
    that the rows add up), kernels and device_us (lengths of the device work added) of launches that have such a range
    as their innermost. "outside", without a host_us, is what was launched in none."""
    spans = events[events["kind"] == "range"]
    return _by(events, spans, spans["category"].where(spans["category"] != "", spans["name"]))


def by_segment(events: pd.DataFrame) -> pd.DataFrame:
    """`by_range` of a graph in pieces, a row a segment: segment (its number; even and odd ones take turns between what
    a graph holds and what stays outside), count, host_us, kernels and device_us. Empty where graphs are whole."""
    spans = events[(events["kind"] == "range") & (events["category"] == "segment")]
    table = _by(events, spans, spans["payload"])
    table = table[table["range"] != OUTSIDE].rename(columns={"range": "segment"})
    return table.astype({"segment": "int64"}).sort_values("segment", ignore_index=True)


def _by(events: pd.DataFrame, spans: pd.DataFrame, names: pd.Series) -> pd.DataFrame:
    """What the ranges of each name hold, innermost."""
    held = tables.holders(events, spans)
    own = _work(events)
    where = held[own.index].map(names).astype(object)
    work = pd.DataFrame({"range": where.where(where.notna(), OUTSIDE), "kernels": own["kind"] == "kernel",
                         "device_us": (own["end_ns"] - own["start_ns"]) / 1e3})
    host = pd.DataFrame({"range": names.astype(object), "count": 1, "host_us": _alone_ns(spans) / 1e3})
    table = host.groupby("range").sum().join(work.groupby("range").sum(), how="outer").rename_axis("range")
    types = {"count": "int64", "host_us": "float64", "kernels": "int64", "device_us": "float64"}
    table = table[list(types)].astype("float64").fillna({"count": 0, "kernels": 0, "device_us": 0}).astype(types)
    return table.sort_values("host_us", ascending=False, kind="stable").reset_index()


def launch_delay(events: pd.DataFrame) -> pd.DataFrame:
    """A row a kernel whose launch is in the trace, by its start: name, call (its launch), start_ns, us from the start
    of the call to that of the kernel. Kernels of a graph share a call, so the later one comes in it, the more."""
    own = events[(events["kind"] == "kernel") & events["correlation"].notna()]
    found = own.merge(tables.launches(events), left_on="correlation", right_index=True, suffixes=("", "_call"))
    found = found.sort_values("start_ns", kind="stable", ignore_index=True)
    return pd.DataFrame({"name": found["name"], "call": found["name_call"], "start_ns": found["start_ns"],
                         "us": (found["start_ns"] - found["start_ns_call"]) / 1e3})


def launches_per_token(events: pd.DataFrame) -> dict[str, float]:
    """Medians over the decode tokens: launches, graph_launches, kernels. NaN where there is no such token."""
    table = by_token(events)
    decode = table[table["category"] == "decode"]
    return {name: float(decode[name].median()) for name in ("launches", "graph_launches", "kernels")}


def _token(own: pd.DataFrame, start: int, end: int, on_cpu: bool) -> dict[str, float]:
    work, kind = _work(own), own["kind"]
    launches = own[kind == "launch"]
    span = int(work["end_ns"].max() - work["start_ns"].min()) if len(work) else 0
    at_work, together = _union_ns(work), int((work["end_ns"] - work["start_ns"]).sum())
    host = own.assign(end_ns=own["end_ns"].clip(upper=end))  # a call that outlasts the range, by rounding of clocks
    spent = {name: _union_ns(host[kind.isin(kinds)]) for name, kinds in (
        ("launch", ["launch"]), ("sync", ["sync"]), ("calls", ["launch", "sync"]), ("ops", ["op"]))}
    return {"host_us": (end - start) / 1e3, "launches": len(launches),
            "graph_launches": int(launches["name"].str.contains("GraphLaunch").sum()),
            "kernels": int((kind == "kernel").sum()), "device_us": span / 1e3, "busy_us": at_work / 1e3,
            "idle_us": (span - at_work) / 1e3, "overlap_us": (together - at_work) / 1e3,
            "launch_us": spent["launch"] / 1e3, "sync_us": spent["sync"] / 1e3,
            "python_us": (end - start - spent["ops" if on_cpu else "calls"]) / 1e3, "ops_us": spent["ops"] / 1e3}


def _work(events: pd.DataFrame) -> pd.DataFrame:
    return events[events["kind"].isin(tables.DEVICE)]


def _union_ns(spans: pd.DataFrame) -> int:
    if spans.empty:
        return 0
    order = np.argsort(spans["start_ns"].to_numpy(), kind="stable")
    start, end = spans["start_ns"].to_numpy()[order], spans["end_ns"].to_numpy()[order]
    reached = np.maximum.accumulate(end)
    before = np.concatenate([start[:1], reached[:-1]])
    return int(np.clip(end - np.maximum(start, before), 0, None).sum())


def _alone_ns(spans: pd.DataFrame) -> pd.Series:
    """The length of each range less those directly inside it on its thread."""
    alone = (spans["end_ns"] - spans["start_ns"]).copy()
    for _, own in spans.groupby("thread"):
        outer: list[tuple[object, int]] = []
        for label, start, end in own.sort_values(["start_ns", "end_ns"], ascending=[True, False])[
                ["start_ns", "end_ns"]].itertuples():
            while outer and outer[-1][1] <= start:
                outer.pop()
            if outer:
                alone[outer[-1][0]] -= min(end, outer[-1][1]) - start
            outer.append((label, end))
    return alone
