"""What happens beside a measurement: garbage collections, captures, evictions, clock changes, preemptions, and which
timed values each of them fell into.

All stamps are those of `time.perf_counter_ns`, in ns. Never imports torch.
"""

from __future__ import annotations

import gc
import resource
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from hybridlab.errors import MeasureError, StatisticsError, choose
from hybridlab.tokens import Happening

KINDS = ("garbage collection", "capture", "eviction", "clock change", "preemption")
UNEXPLAINED = "unexplained"
TAIL = 0.99


def during(ms: Sequence[float], ended_ns: Sequence[int], happenings: Iterable[Happening]) -> list[tuple[str, float]]:
    """What happened in each interval, given by its length and its end: the kinds that overlap it in the order of KINDS,
    with commas, and for how many ms exact ones do, two at once counted once.

    Raises: StatisticsError for a happening that ends before it starts.
    """
    ends = np.asarray(ended_ns, dtype=np.int64)
    starts = ends - np.rint(np.asarray(ms, dtype=float) * 1e6).astype(np.int64)
    first, last = (int(starts.min()), int(ends.max())) if len(ends) else (0, 0)
    found: dict[int, list[Happening]] = {}
    for one in happenings:
        if one.end_ns < one.start_ns:
            raise StatisticsError(f"a {one.kind} ends before it starts", f"from {one.start_ns} to {one.end_ns} ns",
                                  "take both stamps from time.perf_counter_ns")
        if one.start_ns < last and one.end_ns > first:  # most are over before the round, or between its requests
            for place in np.flatnonzero((starts < one.end_ns) & (ends > one.start_ns)).tolist():
                found.setdefault(place, []).append(one)
    nothing = ("", 0.0)
    return [_told(found[place], int(starts[place]), int(ends[place])) if place in found else nothing
            for place in range(len(ends))]


def _told(own: list[Happening], start: int, end: int) -> tuple[str, float]:
    kinds = {one.kind for one in own}
    spans = sorted((max(one.start_ns, start), min(one.end_ns, end)) for one in own if one.exact)
    return ", ".join(kind for kind in KINDS if kind in kinds), _union_ms(spans)


class Watch:
    """Records what happens in this process while it is entered: garbage collections, and preemptions of its thread.

    Garbage collections of any thread, because they hold up all of them, are timed from start to stop. `sample()` after
    each timed value asks the kernel how often it took the processor away since the call before. What other parts
    know of themselves (captures, evictions, clock changes) is added by `note`.
    """

    def __init__(self) -> None:
        self._found: list[Happening] = []
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
            self._found.append(Happening("preemption", self._last_ns, now, detail, False))
        self._last_ns, self._switches = now, switches
        return now

    def note(self, kind: str, start_ns: int, end_ns: int, detail: str = "") -> None:
        """Adds a happening of one of KINDS that was timed elsewhere."""
        self._found.append(Happening(choose("kind", kind, KINDS), start_ns, end_ns, detail, True))

    def happenings(self) -> list[Happening]:
        """What was recorded so far, by its start."""
        return sorted(self._found, key=lambda one: one.start_ns)

    def forget(self, before_ns: int) -> None:
        """Drops what was over before this stamp, so that a long run does not hold all that ever happened."""
        self._found = [one for one in self._found if one.end_ns >= before_ns]

    def replace(self, since_ns: int, happenings: Iterable[Happening]) -> None:
        """Takes what happened in another process, which was timed since this stamp, for what happened in this one.

        Raises: ConfigError for a kind that is none of KINDS.
        """
        theirs = [one._replace(kind=choose("kind", one.kind, KINDS)) for one in happenings]
        self._found = [one for one in self._found if one.end_ns <= since_ns] + theirs

    def _collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._began = time.perf_counter_ns()
        elif self._began is not None:  # None: the collection was under way when the watch was entered
            detail = f"generation {info['generation']}, {info['collected']} objects freed"
            self._found.append(Happening("garbage collection", self._began, time.perf_counter_ns(), detail, True))
            self._began = None


def _switches() -> int:
    """How often the kernel took the processor from this thread (getrusage(2), ru_nivcsw); elsewhere than Linux, from
    this process, which counts other threads too."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nivcsw


def _union_ms(spans: list[tuple[int, int]]) -> float:
    total, reached = 0, -(2**63)
    for start, end in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6
