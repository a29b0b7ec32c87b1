"""Capture and replay, and the cache of captured graphs: the paper's rolling buffer. Knows no model.

A graph is a CUDA graph on a GPU and a tape on the CPU. The cache holds them by key, least recently used first, under
a byte budget; a lease keeps a graph in while it is in flight.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlab import kernels, tape
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed, CaptureFailed, StaleAddress
from hybridlab.tape import Tape


class Graph(Protocol):
    """A captured launch sequence over fixed addresses, in one graph or in several with other work between them."""

    nbytes: int
    graphs: int  # launched by one replay

    def replay(self) -> None: ...

    def reset(self) -> None: ...


CutOpen = Callable[[], AbstractContextManager[Callable[[Any], bool]]]  # see hybridlab.pieces.Cut


class _Pieces(TorchDispatchMode):
    """Captures what runs, piece by piece, into `pool`.

    At an operation that stays outside, the piece so far is ended and launched, so that the operation runs on its real
    values; and the call is kept, to be made again between the pieces at every replay.
    """

    def __init__(self, pool: tuple[int, int], leave_outside: Callable[[Any], bool]) -> None:
        super().__init__()
        self.pool, self.leave_outside = pool, leave_outside
        self.open: torch.cuda.CUDAGraph | None = None
        self.captured: list[torch.cuda.CUDAGraph] = []
        self.parts: list[Callable[[], Any]] = []
        self.alive: list[Any] = []  # made outside captures and read by graphs at fixed addresses

    def begin(self) -> None:
        self.open = torch.cuda.CUDAGraph()
        self.open.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        if self.open is not None:
            graph, self.open = self.open, None
            self.captured.append(graph)
            graph.capture_end()
            self.parts.append(graph.replay)

    def abandon(self) -> None:
        """End a capture that failed, so that the stream is usable again; the first error is the one to report."""
        if self.open is not None:
            with suppress(RuntimeError):
                self.open.capture_end()
            self.captured.append(self.open)
        for graph in self.captured:
            graph.reset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leave_outside(func):
            if self.open is not None:
                self.end()
                self.parts[-1]()
            out = func(*args, **kwargs)
            fresh = tape.fresh(func, args, kwargs, out)
            if fresh or func._schema.is_mutable:
                self.parts.append(tape.again(func, args, kwargs, fresh))
        else:
            if self.open is None and not tape.launches_nothing(func):
                self.begin()
            out = func(*args, **kwargs)
        if self.open is None:
            self.alive.append(out)
        return out


class CudaGraph:
    """`function` as CUDA graphs, their intermediates in `pool`: one, or with a `cut` one for each piece.

    `torch.cuda.graph()` is avoided: it synchronises the device and empties the allocator's cache on entry.
    """

    def __init__(self, function: Callable[[], None], pool: tuple[int, int], cut: CutOpen | None = None) -> None:
        before = torch.cuda.memory_reserved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream), cut() if cut else nullcontext() as leave_outside:
            self._pieces = _Pieces(pool, leave_outside or (lambda _: False))
            try:
                if cut:
                    with self._pieces:
                        function()
                else:
                    self._pieces.begin()
                    function()
                self._pieces.end()
            except BaseException:
                self._pieces.abandon()
                raise
        torch.cuda.current_stream().wait_stream(stream)
        self.graphs = len(self._pieces.captured)
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        for part in self._pieces.parts:
            part()

    def reset(self) -> None:
        torch.cuda.current_stream().synchronize()
        for graph in self._pieces.captured:
            graph.reset()


class GraphCache:
    """Captured graphs by key, least recently used first out, under `budget` bytes (None: no limit).

    The newest graph stays even if it is larger than the budget: it is about to be replayed.
    Keys name everything a graph bakes in. A key whose capture failed keeps its reason in `failed` and is not tried
    again. Graphs share one memory pool: they never run at the same time and nothing but their declared buffers is
    read after a replay.
    """

    def __init__(self, device: torch.device, budget: int | None, counters: Counters) -> None:
        self.device, self.budget, self.counters = device, budget, counters
        self.failed: dict[Hashable, str] = {}
        self.closed = False
        self._graphs: OrderedDict[Hashable, tuple[Graph, Sequence[Tensor], tuple[int, ...]]] = OrderedDict()
        self._leased: set[Hashable] = set()
        self._pinned: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    @contextmanager
    def lease(self, key: Hashable) -> Iterator[Callable[[], None]]:
        """The replay of `key`, which stays in the cache while the lease is held. Raises KeyError if it is not there."""
        graph, buffers, addresses = self._graphs[key]
        self._graphs.move_to_end(key)
        self._leased.add(key)

        def replay() -> None:
            if tuple(t.data_ptr() for t in buffers) != addresses:
                raise StaleAddress(f"a buffer of graph {key} has moved since capture",
                                   "replaying would read and write memory that is no longer its own",
                                   "keep the runtime's tensors as they are, or make a new Runtime")
            graph.replay()
            self.counters.replays += graph.graphs

        try:
            yield replay
        finally:
            self._leased.discard(key)

    def capture(self, key: Hashable, function: Callable[[], None], buffers: Sequence[Tensor], *,
                state: Sequence[Tensor] = (), cut: CutOpen | None = None, pin: bool = False) -> None:
        """Capture `function` under `key`; it must read and write only `buffers` and what never moves.

        It runs once before, so that nothing is compiled or loaded during capture; `state`, what a run changes for the
        next, is put back. `cut` says what stays outside the graphs. With `pin` the graph is never evicted. Raises
        `CaptureFailed` with the cause, or `CaptureClosed`; in both cases the cache is as it was.
        """
        if self.closed:
            raise CaptureClosed(f"graph {key} was to be captured", "captures are closed, as in a timed region",
                                "warm up every length before timing")
        start = time.perf_counter()
        try:
            with _restored(state), torch.no_grad():
                function()
            compiled = kernels.compiles()
            with _restored(state):
                graph = self._graph(function, cut)
        except Exception as error:  # whatever the model's code or a compiler raises: the request must go on
            raise self._failure(key, str(error)) from error
        if kernels.compiles() != compiled:
            graph.reset()
            raise self._failure(key, "a kernel was compiled during capture: its warm-up ran another program")
        self._graphs[key] = (graph, buffers, tuple(t.data_ptr() for t in buffers))
        if pin:
            self._pinned.add(key)
        self.counters.captures += 1
        self.counters.capture_ms += (time.perf_counter() - start) * 1e3
        self.counters.graph_bytes += graph.nbytes
        self._evict(keep=key)

    def _graph(self, function: Callable[[], None], cut: CutOpen | None) -> Graph:
        if self._pool is not None:
            return CudaGraph(function, self._pool, cut)
        with cut() if cut else nullcontext() as leave_outside:
            return Tape(function, leave_outside)

    def _failure(self, key: Hashable, cause: str) -> CaptureFailed:
        self.failed[key] = f"capture failed: {cause}"
        self.counters.failures += 1
        return CaptureFailed(f"graph {key} could not be captured", cause,
                             "its steps run without a graph; fallback='raise' stops instead")

    def _evict(self, keep: Hashable | None) -> None:
        for key in list(self._graphs):
            if self.budget is None or self.counters.graph_bytes <= self.budget:
                return
            if key != keep and key not in self._leased and key not in self._pinned:
                self._drop(key)
                self.counters.evictions += 1

    def _drop(self, key: Hashable) -> None:
        graph, _, _ = self._graphs.pop(key)
        self.counters.graph_bytes -= graph.nbytes
        graph.reset()

    def clear(self) -> None:
        """Drop every graph."""
        for key in list(self._graphs):
            self._drop(key)


@contextmanager
def _restored(state: Sequence[Tensor]) -> Iterator[None]:
    """Whatever runs meanwhile, `state` has its values again afterwards."""
    saved = [t.clone() for t in state]
    try:
        yield
    finally:
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
