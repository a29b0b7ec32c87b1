"""Requests that decode while a graph is captured again and again behind them, in each way there is."""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hybridlab.behind import PATIENCE_S, AfterRequest, Cooperative, OnThread
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed, ConfigError, HybridlabError, RunError, choose
from hybridlab.graphs import Graph
from hybridlab.lowered import LoweredExecutor
from hybridlab.measure import quiet_collector

if TYPE_CHECKING:
    from hybridlab.runtime import Runtime
from hybridlab.tokens import Step

Row = dict[str, Any]
HAPPENED = ("hits", "misses", "captures", "evictions", "failures", "capture_ms")  # in an interval
HELD = ("graphs", "graph_bytes")                                                  # at its end


class Way(NamedTuple):
    """One way to capture behind decoding."""

    behind: type[AfterRequest] = AfterRequest
    mode: str | None = None  # of a CUDA capture; None: as the way has it
    flush: bool = False      # before it: synchronise, collect garbage, empty the allocator's cache
    cuda: bool = False       # no other device has it


WAYS = {
    "quiet": Way(),    # nothing is captured: the reference
    "request": Way(),  # once the request is over
    "sync": Way(),     # on the owner's thread between two tokens
    "thread": Way(OnThread),
    "cooperative": Way(Cooperative),
    "thread relaxed": Way(OnThread, "relaxed", cuda=True),
    "thread global": Way(OnThread, "global", cuda=True),
    "thread flush": Way(OnThread, flush=True, cuda=True),  # as `torch.cuda.graph()` does on entry
}


def require_ways(ways: Sequence[str], device: torch.device) -> None:
    """Raise `ConfigError` for the name of no way, and for one that `device` does not have."""
    for name in ways:
        if WAYS[choose("disturb", name, WAYS)].cuda and device.type != "cuda":
            there = ", ".join(name for name, way in WAYS.items() if not way.cuda)
            raise ConfigError(f"disturb has {name!r}", f"capture modes are CUDA's, and this runs on {device.type}",
                              f"choose among {there}, or use a GPU")


class Watched(GraphCache):
    """A graph cache that captures as `way` says and notes what became of each capture. It holds the newest graph."""

    def __init__(self, device: torch.device, way: Way) -> None:
        super().__init__(device, Counters(), most=1)
        self.way = way
        self.reasons: dict[Hashable, str] = {}  # of failures, also of those that worked when tried again
        self.over: dict[Hashable, float] = {}   # when, by `time.perf_counter`

    def record(self, job: Job, mode: str = "thread_local") -> tuple[Graph, float]:
        if self.way.flush:
            torch.cuda.synchronize(self.device)
            gc.collect()
            torch.cuda.empty_cache()
        try:
            return super().record(job, self.way.mode or mode)
        except CaptureFailed as error:
            self.reasons[job.key] = str(error)
            raise

    def adopt(self, job: Job, graph: Graph, ms: float) -> None:
        super().adopt(job, graph, ms)
        self.over[job.key] = time.perf_counter()

    def fail(self, key: Hashable, cause: str) -> CaptureFailed:
        self.reasons[key], self.over[key] = cause, time.perf_counter()
        return super().fail(key, cause)


class Decoding:
    """Requests over one runtime that captures nothing by itself; its steps of both buckets must have run.

    All have the same `prompt` and `new` tokens, so that their tokens are the same whatever goes on meanwhile.
    `captures` of a prefill graph of `bucket` rows are made behind them, in each way. Raises `ConfigError` for a
    policy that cuts the forward: pieces run while they are captured, in the middle of what decodes.
    """

    def __init__(self, runtime: Runtime, prompt: list[int], new: int, bucket: int, captures: int) -> None:
        executor = runtime._executor
        assert isinstance(executor, LoweredExecutor)
        assert executor.lookup is not None
        self.runtime, self.lookup, self.captures = runtime, executor.lookup, captures
        self.prompt, self.new = prompt, new
        self.job, self.bucket = executor.job("prefill", bucket), bucket
        if self.job.cut is not None:
            raise ConfigError("captures behind decoding need a forward that is one graph",
                              f"policy {runtime.config.policy!r} cuts it, and pieces run while they are captured",
                              "choose policy='whole' or 'full'")
        self.lookup.cache.capture(executor.job("decode", 1))
        self.expected: list[int] = []

    def under(self, name: str) -> list[Row]:
        """The rows of one way. Its first capture, for which thread and stream are made, and a request are left out.

        Raises `RunError` for a token that differs from those of the requests before, and for captures without end.
        """
        self.cache, self.asked = Watched(self.runtime.device, WAYS[name]), dict[Hashable, float]()
        before, self.lookup.behind = self.lookup.behind, WAYS[name].behind(self.cache)
        self.wanted, self.lost, least, served, rows = 0, 0, max(2, self.captures // 4), 0, list[Row]()
        try:
            self.lookup.behind.ask(self.job)
            self.lookup.behind.settle()
            self._request(name)
            self.wanted = 0 if name == "quiet" else self.captures
            deadline = time.monotonic() + PATIENCE_S * (1 + self.wanted)
            while served < least or len(self.cache.over.keys() & self.asked.keys()) < self.wanted:
                if time.monotonic() > deadline:
                    raise RunError("captures behind decoding do not end", f"{name}: {len(self.cache.over)} of "
                                   f"{self.wanted} after {served} requests", "leave this way out, and report this")
                rows += [{"request": served, **row} for row in self._request(name)]
                served += 1
        finally:
            self.lookup.behind.close()
            self.lookup.behind = before
            self.cache.clear()
        return rows + [self._captured(number, key) for number, key in enumerate(self.asked)]

    def _request(self, name: str) -> list[Row]:
        """One request: a row a gap, and one for the time after its last token."""
        rows: list[Row] = []
        ids: list[int] = []
        served: Any = self.runtime._serve(self.runtime._request(self.prompt, self.new, [], 0.0, None, None, 0))
        with quiet_collector(), closing(served) as steps:
            try:
                ids.append(next(steps)[0].id)
                start, before = time.perf_counter(), self._reading()
                for index in range(1, self.new + 1):
                    last = index == self.new
                    if last if name == "request" else not (rows and rows[-1]["capturing"]):
                        self._ask(name)
                    step = None if last else next(steps)[0]
                    if last:
                        next(steps, None)
                    now, after = time.perf_counter(), self._reading()
                    rows.append({**_named(index, step), "ms": (now - start) * 1e3, **_between(before, after)})
                    ids += [step.id] if step else []
                    start, before = now, after
            except RuntimeError as error:  # a capture in mode "global" may end what others launch
                self.lost += 1
                if isinstance(error, HybridlabError) or self.runtime.device.type != "cuda" or self.lost > self.wanted:
                    raise
                rows.append({"metric": "lost", "index": len(ids), "ms": 0.0, "failures": 1, "reason": str(error)})
                ids = self.expected
        self._require_equal(name, ids)
        own = {"prompt_tokens": len(self.prompt), "bucket": self.runtime.bucket_for(len(self.prompt))}
        return [{**own, **row} for row in rows]

    def _ask(self, name: str) -> None:
        """Have the graph captured anew, unless a capture is under way or all are made."""
        if len(self.asked) == self.wanted or self.lookup.behind.busy:
            return
        job = self.job._replace(key=(self.job.key, len(self.asked)))
        self.asked[job.key] = time.perf_counter()
        if name == "sync":
            with suppress(CaptureFailed):  # the cache noted it
                self.cache.capture(job, rehearse=False)
        else:
            self.lookup.behind.ask(job)

    def _require_equal(self, name: str, ids: list[int]) -> None:
        self.expected = self.expected or ids
        if ids != self.expected:
            at = next(i for i, (a, b) in enumerate(zip(ids, self.expected, strict=True)) if a != b)
            raise RunError(f"new token {at} changed while graphs were captured behind it",
                           f"{name}: {ids[at]} in place of {self.expected[at]}", "do not use this way, and report this")

    def _reading(self) -> Row:
        """Counters of the runtime and of what is captured behind it, now."""
        own, made = self.runtime.counters, self.cache.counters
        both = {name: getattr(own, name) + getattr(made, name) for name in (*HAPPENED, *HELD)}
        return {**both, "capturing": self.runtime.capturing}

    def _captured(self, number: int, key: Hashable) -> Row:
        over, reason = self.cache.over.get(key, time.perf_counter()), self.cache.reasons.get(key, "")
        return {"metric": "capture", "index": number, "prompt_tokens": self.bucket, "bucket": self.bucket,
                "ms": (over - self.asked[key]) * 1e3, "reason": reason, "failures": int(bool(reason)),
                "captures": int(key not in self.cache.failed)}


def _named(index: int, step: Step | None) -> Row:
    if step is None:
        return {"metric": "after", "index": -1}
    return {"metric": "itl", "index": index, "path": step.path, "reason": step.reason}


def _between(before: Row, after: Row) -> Row:
    """The columns of the interval between two readings."""
    happened = {name: after[name] - before[name] for name in HAPPENED}
    capturing = before["capturing"] or after["capturing"] or happened["captures"] or happened["failures"]
    return {**happened, **{name: after[name] for name in HELD}, "capturing": bool(capturing)}
