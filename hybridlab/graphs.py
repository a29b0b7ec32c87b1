"""Capture and replay of one program, whole or in pieces: CUDA graphs on a GPU, a tape on the CPU. Knows no model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlab import collector, loop, pools, tape
from hybridlab.errors import CaptureFailed
from hybridlab.pools import Pool
from hybridlab.ranges import span
from hybridlab.tape import Tape

CAPTURE_MODES = ("thread_local", "relaxed", "global")  # of CUDA: whose forbidden calls end a capture


class Graph(Protocol):
    """A captured launch sequence over fixed addresses, in one graph or in several with other work between them."""

    nbytes: int            # given back when the graph is dropped
    pool_bytes: int        # by which its pool has grown
    graphs: int            # launched by one replay
    capture_ms: float      # recording the launches
    instantiate_ms: float  # making them executable

    def replay(self) -> None: ...

    def reset(self) -> None: ...


CutOpen = Callable[[], AbstractContextManager[Callable[[Any], bool]]]  # see hybridlab.pieces.Cut


def new_pool(device: torch.device) -> Any:
    """Memory for the intermediates of graphs that never run at the same time."""
    return Pool() if device.type == "cuda" else tape.Pool()


def record(function: Callable[[], None], device: torch.device, *, pool: Any = None, cut: CutOpen | None = None,
           mode: str = "thread_local", private: Sequence[Tensor] = (), state: Tensor | None = None) -> Graph:
    """`function` as a graph, its intermediates in `pool`, or in a new one. It must have run before: nothing may be
    compiled or loaded while it is recorded.

    A CUDA capture runs nothing, except in pieces, which run once. A tape runs everything, on copies of the tensors
    in `private`, so that these keep their values. With a `state` one replay runs the graph until that says stop: see
    `hybridlab.loop`.
    """
    with collector.off():  # it might free a kernel's module or another graph, which CUDA forbids during a capture
        if device.type == "cuda":
            with _turn(), torch.cuda.device(device):
                return CudaGraph(function, pool or new_pool(device), cut, mode, state)
        with cut() if cut else nullcontext() as leave_outside:
            made = Tape(function, leave_outside, pool, private)
        return made if state is None else loop.OnHost(made, state)


PATIENCE_S = 120.0  # for somebody else's capture; the largest model takes well under a second for one
_ONE_AT_A_TIME = threading.RLock()  # PyTorch allows one capture a process
_OWN = threading.local()


@contextmanager
def _turn() -> Iterator[None]:
    if not _ONE_AT_A_TIME.acquire(timeout=PATIENCE_S):
        raise CaptureFailed("another capture of this process does not end", f"waited {PATIENCE_S:g} s for it",
                            "start a new process")
    try:
        yield
    finally:
        _ONE_AT_A_TIME.release()


def capture_stream() -> torch.cuda.Stream:
    """The stream on which this thread captures, always the same: cuBLAS keeps a workspace for each stream that it has
    met, 32 MiB on Hopper. Small products make this one where it is not there, as a capture would take it from its pool.
    """
    if not hasattr(_OWN, "stream"):
        _OWN.stream = torch.cuda.Stream()
    with torch.cuda.stream(_OWN.stream), torch.cuda.use_mem_pool(pools.workspaces()):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            one = torch.ones((16, 16), device="cuda", dtype=dtype)
            torch.addmm(one[0], one @ one, one)
    _OWN.stream.synchronize()
    return _OWN.stream


class _Pieces(TorchDispatchMode):
    """Captures what runs, piece by piece, into `pool`.

    At an operation that stays outside, the piece so far is ended and launched, so that the operation runs on its real
    values; and the call is kept, to be made again between the pieces at every replay.
    """

    def __init__(self, pool: Pool, leave_outside: Callable[[Any], bool], mode: str, keep: bool) -> None:
        super().__init__()
        self.keep = keep                 # the graph itself, to make others of it
        self.pool, self.leave_outside, self.mode = pool, leave_outside, mode
        self.open: torch.cuda.CUDAGraph | None = None
        self.captured: list[torch.cuda.CUDAGraph] = []
        self.parts: list[Callable[[], Any]] = []
        self.alive: list[Any] = []       # made outside captures and read by graphs at fixed addresses
        self.pooled: set[int] = set()    # addresses of storages that captures made: these lie in the pool
        self.instantiate_ms = 0.0

    def begin(self) -> None:
        self.open = torch.cuda.CUDAGraph(keep_graph=self.keep)
        self.open.capture_begin(pool=self.pool.handle, capture_error_mode=self.mode)

    def end(self) -> None:
        if self.open is not None:
            graph, self.open = self.open, None
            self.captured.append(graph)
            start = time.perf_counter()
            graph.capture_end()
            self.instantiate_ms += (time.perf_counter() - start) * 1e3
            self.parts.append(graph.replay)

    def abandon(self) -> None:
        """End a capture that failed, so that the stream is usable again; the first error is the one to report."""
        if self.open is not None:
            self.captured.append(self.open)
            with suppress(Exception):  # among them PyTorch's warning of an empty graph, where warnings are errors
                self.open.capture_end()
        broken = [graph for graph in self.captured if not _ended_well(graph)]
        for graph in self.captured:
            with suppress(RuntimeError):  # one that cannot be reset must not keep the others
                graph.reset()
        if broken:
            _BROKEN.extend(broken)
            pools.clean_up(self.pool)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leave_outside(func):
            if self.open is not None:
                self.end()
                self.parts[-1]()
            out = func(*args, **kwargs)
            fresh = tape.fresh(func, args, kwargs, out)
            if fresh or func._schema.is_mutable:
                args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._borrowed, (args, kwargs))
                self.parts.append(tape.again(func, args, kwargs, fresh))
        else:
            if self.open is None and not tape.launches_nothing(func):
                self.begin()
            out = func(*args, **kwargs)
        if self.open is None:
            self.alive.append(out)
        else:
            self.pooled |= {tape.storage(t) for t in tape.fresh(func, args, kwargs, out)}
        return out

    def _borrowed(self, tensor: Tensor) -> Tensor:
        """The same tensor, but without keeping its memory from others if that lies in the pool: graphs of one pool
        take turns, and each writes what it reads."""
        if tape.storage(tensor) not in self.pooled:
            return tensor
        whole = tensor.untyped_storage()
        place = torch._C._construct_storage_from_data_pointer(whole.data_ptr(), tensor.device, whole.nbytes())
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            place, tensor.storage_offset(), tensor.shape, tensor.stride())


_BROKEN: list[torch.cuda.CUDAGraph] = []  # kept: PyTorch's allocator of pinned memory goes on asking them


def _ended_well(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()  # refused otherwise
    except RuntimeError:
        return False
    return True


class CudaGraph:
    """`function` as CUDA graphs, their intermediates in `pool`: one, or with a `cut` one for each piece.

    `torch.cuda.graph()` is avoided: it synchronises the device and empties the allocator's cache on entry.
    """

    _loop: loop.OnDevice | None = None

    def __init__(self, function: Callable[[], None], pool: Pool, cut: CutOpen | None = None,
                 mode: str = "thread_local", state: Tensor | None = None) -> None:
        stream, here = capture_stream(), torch.cuda.current_stream()
        driver, pooled = _driver_bytes(), pool.nbytes()
        start = time.perf_counter()
        stream.wait_stream(here)
        with torch.no_grad(), torch.cuda.stream(stream), cut() if cut else nullcontext() as leave_outside:
            self._pieces = _Pieces(pool, leave_outside or (lambda _: False), mode, state is not None)
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
        here.wait_stream(stream)
        if state is not None:
            self._repeat(state)
        self.instantiate_ms = self._pieces.instantiate_ms
        self.capture_ms = (time.perf_counter() - start) * 1e3 - self.instantiate_ms
        self.graphs = len(self._pieces.captured)
        self.pool_bytes = pool.nbytes() - pooled
        self.nbytes = max(0, _driver_bytes() - driver)
        self._replayed = torch.cuda.Event()
        self._home: Any = pool.handle
        pools.LIVE[self._home] += 1

    def _repeat(self, state: Tensor) -> None:
        start = time.perf_counter()
        self._loop = loop.OnDevice(self._pieces.captured[0], state)
        self._pieces.parts = [self._loop.replay]
        self._pieces.instantiate_ms += (time.perf_counter() - start) * 1e3

    def replay(self) -> None:
        parts = self._pieces.parts
        if len(parts) == 1:
            parts[0]()
        else:
            for number, part in enumerate(parts):
                with span("segment", number):
                    part()
        self._replayed.record()

    def reset(self) -> None:
        """Give its memory back, once the device has finished the last replay."""
        self._replayed.synchronize()
        if self._loop is not None:
            self._loop.reset()
        for graph in self._pieces.captured:
            graph.reset()
        self._pieces.parts, self._pieces.alive = [], []
        if self._home is not None:
            pools.LIVE[self._home] -= 1
            self._home = None


def _driver_bytes() -> int:
    """Device memory that is in use beside the allocator's: among it the driver's own of every graph."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
