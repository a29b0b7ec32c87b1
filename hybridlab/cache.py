"""The graph cache, the paper's rolling buffer: captured graphs by key, least recently used out, leased while in flight.

One thread owns a cache. Only `record` may be called from another: it makes a graph and changes nothing; `adopt` then
takes the graph in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlab import graphs, kernels, pools
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed, CaptureFailed, StaleAddress, WrongThread
from hybridlab.graphs import CutOpen, Graph
from hybridlab.ranges import span

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """What is to be captured under `key`, which names everything that the graph will bake in.

    `function` reads and writes only `buffers` and what never moves. `state` is what one run changes for the next.
    `cut` says what stays outside the graphs. What is pinned is not evicted for room.
    """

    key: Hashable
    function: Callable[[], None]
    buffers: Sequence[Tensor]
    state: Sequence[Tensor] = ()
    cut: CutOpen | None = None
    pin: bool = False
    repeat: Tensor | None = None  # the state that says whether to run once more, if one replay is to loop


class _Held(NamedTuple):
    graph: Graph
    buffers: Sequence[Tensor]
    addresses: list[int]
    pinned: bool


class GraphCache:
    """Captured graphs under `budget` bytes and at most `most` of them (None: no limit).

    The newest graph, pinned ones and leased ones stay: they alone may exceed the limits. Of the others the least
    recently used goes first; or, if graphs cannot safely be dropped `one_by_one`, all go, pinned ones too, and are
    captured again when they are asked for.

    pool "shared": intermediates of all graphs lie in one pool, as large as the largest needs, which is given back with
    the last graph. That is safe as graphs never run at the same time and nothing but their buffers is read after a
    replay. "private": each graph has memory of its own, given back with it.

    A key whose capture failed keeps its reason in `failed` and is not tried again. While `closed` nothing is captured.
    """

    def __init__(self, device: torch.device, counters: Counters, budget: int | None = None, most: int | None = None,
                 pool: str = "shared", one_by_one: bool = True) -> None:
        self.device, self.counters, self.budget, self.most = device, counters, budget, most
        self.shared, self.one_by_one = pool == "shared", one_by_one
        self.failed: dict[Hashable, str] = {}
        self.closed = False
        self.on_adopt: Callable[[Hashable, float], None] = lambda key, ms: None
        self.on_evict: Callable[[Hashable], None] = lambda key: None
        self._owner = threading.current_thread()
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._leases: Counter[Hashable] = Counter()
        self._pool = graphs.new_pool(device) if self.shared else None
        self._pool_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Hashable]:
        """Keys, the least recently used first."""
        return iter(tuple(self._held))

    def own(self) -> None:
        """From now on the cache is the calling thread's: for whoever sees to it that no two use it at once."""
        self._owner = threading.current_thread()

    @contextmanager
    def lease(self, key: Hashable) -> Iterator[Callable[[], None]]:
        """The replay of `key`, which stays in the cache while any lease of it is held. Raises KeyError if it is not
        there, and `WrongThread`; the replay raises `StaleAddress` if a buffer has moved since capture."""
        self._require_owner(key)
        held = self._held[key]
        self._held.move_to_end(key)
        self._leases[key] += 1

        def replay() -> None:
            if [t.data_ptr() for t in held.buffers] != held.addresses:
                raise StaleAddress(f"a buffer of graph {key} has moved since capture",
                                   "replaying would read and write memory that is no longer its own",
                                   "keep the runtime's tensors as they are, or make a new Runtime")
            held.graph.replay()
            self.counters.replays += held.graph.graphs

        try:
            yield replay
        finally:
            self._leases[key] -= 1

    def capture(self, job: Job, rehearse: bool = True) -> None:
        """Capture a job and take its graph in. `rehearse` runs it before, so that nothing is compiled or loaded during
        capture, and puts its state back: only what has run already can do without.

        Raises `CaptureFailed` with the cause, `CaptureClosed` or `WrongThread`; in each case the cache is as it was.
        """
        self._require_owner(job.key)
        self._require_open(job.key)
        start = time.perf_counter()
        try:
            if rehearse:
                with _restored(job.state), torch.no_grad():
                    job.function()
            try:
                graph = self._record(job)
            except torch.OutOfMemoryError:
                self._drop_idle()
                graph = self._record(job)
        except Exception as error:  # whatever the model's code or a compiler raises: the request must go on
            raise self.fail(job.key, _cause(error)) from error
        self.adopt(job, graph, (time.perf_counter() - start) * 1e3)

    def record(self, job: Job, mode: str = "thread_local") -> tuple[Graph, float]:
        """The graph of a job that has run before, and the milliseconds that it took. May be called from any thread:
        the cache does not change until `adopt`. `mode`: see `graphs.CAPTURE_MODES`. Raises as `capture`."""
        self._require_open(job.key)
        start = time.perf_counter()
        try:
            graph = self._record(job, mode)
        except Exception as error:
            raise _failure(job.key, _cause(error)) from error
        return graph, (time.perf_counter() - start) * 1e3

    def adopt(self, job: Job, graph: Graph, ms: float) -> None:
        """Take in a graph that was made of `job` in `ms` milliseconds, and make room for it. Raises `WrongThread`."""
        self._require_owner(job.key)
        self._pool_bytes += graph.pool_bytes if self.shared else 0
        if job.key in self._held:  # captured in two ways at once
            graph.reset()
            return
        self._held[job.key] = _Held(graph, job.buffers, [t.data_ptr() for t in job.buffers], job.pin)
        self.counters.captures += 1
        self.counters.capture_ms += ms
        self._count()
        self.on_adopt(job.key, ms)
        self._make_room(job)

    def fail(self, key: Hashable, cause: str) -> CaptureFailed:
        """Remember that `key` cannot be captured, and why; returns the error to raise."""
        error = _failure(key, cause)
        self.failed[key] = f"capture failed: {cause}"
        self.counters.failures += 1
        return error

    def clear(self) -> None:
        """Drop every graph, and the pool."""
        for key in list(self._held):
            self._drop(key)
        if lost := pools.lost():
            log.warning("%s · start a new process", lost)

    def _require_owner(self, key: Hashable) -> None:
        caller = threading.current_thread()
        if caller is not self._owner:
            raise WrongThread(f"graph {key} was asked for by thread {caller.name}",
                              f"thread {self._owner.name} owns this cache", "let one thread serve a request to its end")

    def _require_open(self, key: Hashable) -> None:
        if self.closed:
            raise CaptureClosed(f"graph {key} was to be captured", "captures are closed, as in a timed region",
                                "warm up every length before timing")

    def _record(self, job: Job, mode: str = "thread_local") -> Graph:
        compiled = len(kernels.compiled())
        state = job.state if job.cut else ()  # pieces are launched while they are captured
        with span("capture", detail=str(job.key)), _restored(state):
            graph = graphs.record(job.function, self.device, pool=self._pool, cut=job.cut, mode=mode,
                                  private=job.buffers, state=job.repeat)
        if names := kernels.compiled()[compiled:]:
            graph.reset()
            raise RuntimeError(f"kernel {', '.join(names)} was compiled during capture: "
                               "what ran before was another program")
        return graph

    def _make_room(self, newest: Job) -> None:
        if self.one_by_one:
            for key in [key for key in self._held if self._idle(key) and key != newest.key]:
                if not self._full():
                    return
                self._evict(key)
        elif self._full() and len(self._held) > 1 and not any(self._leases.values()):
            self._drop_idle(pinned=True)
            self.capture(newest, rehearse=False)

    def _full(self) -> bool:
        return ((self.budget is not None and self.counters.graph_bytes > self.budget)
                or (self.most is not None and len(self._held) > self.most))

    def _idle(self, key: Hashable) -> bool:
        return not self._leases[key] and not self._held[key].pinned

    def _drop_idle(self, pinned: bool = False) -> None:
        for key in [key for key in self._held if self._idle(key) or (pinned and not self._leases[key])]:
            self._evict(key)

    def _evict(self, key: Hashable) -> None:
        self._drop(key)
        self.counters.evictions += 1
        self.on_evict(key)

    def _drop(self, key: Hashable) -> None:
        self._held.pop(key).graph.reset()
        if self.shared and not self._held:
            self._pool, self._pool_bytes = graphs.new_pool(self.device), 0
        self._count()

    def _count(self) -> None:
        self.counters.graphs = len(self._held)
        own = sum(held.graph.nbytes + (0 if self.shared else held.graph.pool_bytes) for held in self._held.values())
        self.counters.graph_bytes = own + self._pool_bytes


@contextmanager
def replaying(function: Callable[[], None], device: torch.device,
              cut: CutOpen | None = None) -> Iterator[Callable[[], None]]:
    """The replay of `function`, captured by itself; afterwards its memory is free. Raises `CaptureFailed`."""
    cache = GraphCache(device, Counters())
    cache.capture(Job("alone", function, [], cut=cut))
    try:
        with cache.lease("alone") as replay:
            yield replay
    finally:
        cache.clear()


def _failure(key: Hashable, cause: str) -> CaptureFailed:
    return CaptureFailed(f"graph {key} could not be captured", cause,
                         "its steps run without a graph; fallback='raise' stops instead")


def _cause(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"{error} · lower cache_bytes or max_len, or leave more of the GPU free"
    return str(error) or type(error).__name__


@contextmanager
def _restored(state: Sequence[Tensor]) -> Iterator[None]:
    """Whatever runs meanwhile, `state` has its values again afterwards."""
    saved = [t.clone() for t in state]
    try:
        yield
    finally:
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
