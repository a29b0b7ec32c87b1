"""Why the slowest values are slow: each one beside what happened while it was measured.

All stamps are those of `time.perf_counter_ns`, in ns. Never imports torch.
"""

from __future__ import annotations

import gc
import resource
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hybridlab import stats
from hybridlab.errors import MeasureError, StatisticsError, choose

KINDS = ("garbage collection", "capture", "eviction", "clock change", "preemption")
UNEXPLAINED = "unexplained"
HAPPENINGS = ["kind", "start_ns", "end_ns", "detail", "exact"]
TAIL = 0.99


def attribute(samples: pd.DataFrame, happenings: pd.DataFrame) -> pd.DataFrame:
    """A row a sample that is slower than the p99, slowest first, with the happenings that overlap it.

    `samples` has start_ns and end_ns, or ms and end_ns; where all three are there, ms is what counts as the latency.
    `happenings` has kind, start_ns, end_ns, detail and optionally exact: False where something took place at some
    time between the stamps, and not all along.
    Columns: sample (its index), ms, excess_ms (over the median), cause (the kinds that overlap, the longest overlap
    first, or "unexplained"), detail, overlap_ms (with any of them, time that two share counted once), share (the part
    of excess_ms that the overlap can explain at most, 0 to 1) and exact_share (the same by exact happenings alone).
    An overlap is no proof: `by_kind` says how often ordinary samples overlap the same kind.
    Raises: StatisticsError when the sample is too small for a p99, or a stamp is missing or out of order.
    """
    spans, known = _spans(samples), _known(happenings)
    slow, median = _slow(spans), float(spans["ms"].median())
    found = [_attributed(row, known, median)
             for row in spans[slow].sort_values("ms", ascending=False, kind="stable").itertuples()]
    return pd.DataFrame(found, columns=["sample", "ms", "excess_ms", "cause", "detail", "overlap_ms", "share",
                                        "exact_share"])


def by_kind(samples: pd.DataFrame, happenings: pd.DataFrame) -> pd.DataFrame:
    """A row a kind that happened: the share of slow samples (beyond the p99) and of the others that it overlaps.

    Columns: kind, times, slow, others. A kind that overlaps the others as often as the slow ones explains nothing.
    """
    spans, known = _spans(samples), _known(happenings)
    slow = _slow(spans)
    found = []
    for kind, own in known.groupby("kind", sort=True):
        hit = _overlapped(spans, own)
        found.append({"kind": kind, "times": len(own), "slow": float(hit[slow].mean()) if slow.any() else np.nan,
                      "others": float(hit[~slow].mean())})
    return pd.DataFrame(found, columns=["kind", "times", "slow", "others"])


def during(samples: pd.DataFrame, happenings: pd.DataFrame) -> pd.DataFrame:
    """What happened in each sample: happened, the kinds that overlap it in the order of KINDS, with commas, and
    happened_ms, the time that exact ones overlap it, two at once counted once.

    `samples` has ms and end_ns, `happenings` the columns of HAPPENINGS. Quick where little happened, as each round of a
    protocol asks. Raises: StatisticsError for a stamp that is missing or out of order.
    """
    _require(samples, ["ms", "end_ns"], "samples")
    known = _known(happenings) if len(happenings) else happenings
    ends = samples["end_ns"].to_numpy(np.int64)
    starts = ends - np.rint(samples["ms"].to_numpy(float) * 1e6).astype(np.int64)
    kinds: dict[int, set[str]] = {}
    exact: dict[int, list[tuple[int, int]]] = {}
    for kind, begun, over, _, timed in known[HAPPENINGS].itertuples(index=False):
        for place in np.flatnonzero((starts < over) & (ends > begun)).tolist():
            kinds.setdefault(place, set()).add(kind)
            if timed:
                exact.setdefault(place, []).append((max(begun, int(starts[place])), min(over, int(ends[place]))))
    words, ms = [""] * len(ends), [0.0] * len(ends)
    for place, found in kinds.items():
        words[place] = ", ".join(kind for kind in KINDS if kind in found)
    for place, spans in exact.items():
        ms[place] = _union_ms(spans)
    return pd.DataFrame({"happened": words, "happened_ms": ms}, index=samples.index)


class Watch:
    """Records what happens in this process while it is entered: garbage collections, and preemptions of its thread.

    Garbage collections of any thread, because they hold up all of them, are timed from start to stop. `sample()` after
    each timed value asks the kernel how often it took the processor away since the call before. What other parts
    know of themselves (captures, evictions, clock changes) is added by `note`.
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, int, int, str, bool]] = []
        self._began: int | None = None
        self._last_ns = self._switches = self._thread = 0

    def __enter__(self) -> Watch:
        if self._collection in gc.callbacks:
            raise MeasureError("this watch is entered already", "", "make a second one")
        self._thread, self._began = threading.get_ident(), None
        self._switches, self._last_ns = _switches(), time.perf_counter_ns()
        gc.callbacks.append(self._collection)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        gc.callbacks.remove(self._collection)

    def sample(self) -> int:
        """Ends an interval that began with the call before, and answers its end in ns.

        A preemption between this stamp and the count, less than a microsecond later, is laid to this interval.
        Raises: MeasureError in another thread than the one that entered, whose preemptions are not these.
        """
        if threading.get_ident() != self._thread:
            raise MeasureError("a watch counts the preemptions of one thread", "sample() was called in another",
                               "enter the watch in the thread that it watches")
        now, switches = time.perf_counter_ns(), _switches()
        if switches > self._switches:
            detail = f"involuntary context switches: {switches - self._switches}"
            self._found.append(("preemption", self._last_ns, now, detail, False))
        self._last_ns, self._switches = now, switches
        return now

    def note(self, kind: str, start_ns: int, end_ns: int, detail: str = "") -> None:
        """Adds a happening of one of KINDS that was timed elsewhere."""
        self._found.append((choose("kind", kind, KINDS), start_ns, end_ns, detail, True))

    def happenings(self) -> pd.DataFrame:
        """What was recorded so far, by its start, with the columns that `attribute` takes."""
        frame = pd.DataFrame(list(self._found), columns=HAPPENINGS)
        types = {"start_ns": "int64", "end_ns": "int64", "exact": bool}
        return frame.astype(types).sort_values("start_ns", kind="stable", ignore_index=True)

    def forget(self, before_ns: int) -> None:
        """Drops what was over before this stamp, so that a long run does not hold all that ever happened."""
        self._found = [found for found in self._found if found[2] >= before_ns]

    def _collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._began = time.perf_counter_ns()
        elif self._began is not None:  # None: the collection was under way when the watch was entered
            detail = f"generation {info['generation']}, {info['collected']} objects freed"
            self._found.append(("garbage collection", self._began, time.perf_counter_ns(), detail, True))
            self._began = None


def _switches() -> int:
    """How often the kernel took the processor from this thread (getrusage(2), ru_nivcsw); elsewhere than Linux, from
    this process, which counts other threads too."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nivcsw


def _attributed(row: Any, known: pd.DataFrame, median: float) -> dict[str, Any]:
    start, end, excess = int(row.start_ns), int(row.end_ns), float(row.ms) - median
    own = known[(known["start_ns"] < end) & (known["end_ns"] > start)]
    begins, ends = own["start_ns"].clip(lower=start), own["end_ns"].clip(upper=end)
    own = own.assign(start_ns=begins, end_ns=ends, ns=ends - begins)
    kinds = own.groupby("kind")["ns"].sum().sort_values(ascending=False, kind="stable")
    overlap, timed = _covered_ms(own), _covered_ms(own[own["exact"]])
    return {"sample": row.Index, "ms": float(row.ms), "excess_ms": excess,
            "cause": ", ".join(kinds.index) or UNEXPLAINED,
            "detail": "; ".join(own.sort_values("start_ns")["detail"].astype(str)), "overlap_ms": overlap,
            "share": min(1.0, overlap / excess), "exact_share": min(1.0, timed / excess)}


def _covered_ms(spans: pd.DataFrame) -> float:
    """The length of the union of the spans, in ms: two happenings at once delay a token once."""
    return _union_ms(list(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True)))


def _union_ms(spans: list[tuple[int, int]]) -> float:
    total, reached = 0, -(2**63)
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def _overlapped(spans: pd.DataFrame, own: pd.DataFrame) -> NDArray[np.bool_]:
    """Which spans overlap a happening: as many as start before the end of a span, less those over before its start."""
    begun = np.searchsorted(np.sort(own["start_ns"].to_numpy()), spans["end_ns"].to_numpy(), side="left")
    over = np.searchsorted(np.sort(own["end_ns"].to_numpy()), spans["start_ns"].to_numpy(), side="right")
    return np.asarray(begun > over)


def _slow(spans: pd.DataFrame) -> NDArray[np.bool_]:
    return np.asarray(spans["ms"] > stats.quantile(spans["ms"], TAIL).value)


def _spans(samples: pd.DataFrame) -> pd.DataFrame:
    """start_ns, end_ns and ms of each sample; what is missing follows from the other two."""
    _require(samples, ["end_ns"], "samples")
    if "start_ns" in samples:
        start = samples["start_ns"]
    else:
        _require(samples, ["ms"], "samples")
        start = samples["end_ns"] - (samples["ms"] * 1e6).round().astype("int64")
    ms = samples["ms"] if "ms" in samples else (samples["end_ns"] - start) / 1e6
    return _ordered(pd.DataFrame({"start_ns": start, "end_ns": samples["end_ns"], "ms": ms}), "sample")


def _known(happenings: pd.DataFrame) -> pd.DataFrame:
    _require(happenings, HAPPENINGS[:4], "happenings")
    exact = happenings["exact"].astype(bool) if "exact" in happenings else True
    return _ordered(happenings.assign(exact=exact), "happening")


def _require(frame: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise StatisticsError(f"{name} have no column {', '.join(missing)}", f"they have {', '.join(map(str, frame))}")


def _ordered(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    wrong = int((~(frame["end_ns"] >= frame["start_ns"])).sum())  # also where a stamp is missing
    if wrong:
        raise StatisticsError(f"{wrong} of {len(frame)} {name}s end before they start, or have no stamp", "",
                              "take both stamps from time.perf_counter_ns")
    return frame
