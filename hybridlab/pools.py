"""Memory of the CUDA allocator that graphs share, and what a capture that broke off leaves of it."""

from __future__ import annotations

import ctypes
from collections import Counter
from contextlib import suppress
from functools import cache

import torch


class Pool:
    """A pool of the CUDA allocator, by its current handle: a capture that breaks off spoils the handle for captures
    to come, so that these get a new one. Graphs that were made before keep their memory."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    def renew(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    def nbytes(self) -> int:
        """Device memory of the pool: that of the whole allocator also grows by what other threads do."""
        return _bytes_of(self.handle)


@cache
def workspaces() -> torch.cuda.MemPool:
    """Where cuBLAS's workspaces of the streams lie on which graphs are captured, for as long as the process: graphs
    write there at every replay, and Inductor, among others, gives back the workspaces of all streams."""
    return torch.cuda.MemPool()


def workspace_bytes() -> int:
    """Device memory of these."""
    return _bytes_of(workspaces().id)


def _bytes_of(handle: tuple[int, int]) -> int:
    for number in handle:  # PyTorch's function gives back two references that it never took
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(number))
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(handle))


LIVE: Counter[tuple[int, int]] = Counter()  # graphs that live, by the handle of the pool they were captured into
SPOILED: list[tuple[int, int]] = []         # handles of pools in which a capture broke off


def lost_bytes() -> int:
    """Device memory of captures that failed which PyTorch does not give back although no graph of their pool lives:
    some versions keep it as long as the process (pytorch issue 190308). Only captures that failed make this ask."""
    ended = [handle for handle in SPOILED if not LIVE[handle]]
    if not ended:
        return 0
    torch.cuda.empty_cache()
    lost = {handle: _bytes_of(handle) for handle in ended}
    SPOILED[:] = [handle for handle in SPOILED if lost.get(handle, 1)]
    return sum(lost.values())


def lost() -> str:
    """Why this process should end, where captures that failed keep memory for good; else nothing."""
    if not (found := lost_bytes()):
        return ""
    return (f"captures that failed keep {found:,} bytes of the GPU until this process ends: PyTorch "
            f"{torch.__version__} loses the memory of an aborted capture")


def clean_up(pool: Pool) -> None:
    """What `capture_end` leaves undone when it fails: PyTorch's allocator would stay in the pool and keep its memory,
    and its random generator would refuse to draw until some other capture has ended well."""
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # the capture failed before or after the allocator was in the pool
        torch._C._cuda_endAllocateToPool(device, pool.handle)
    torch._C._cuda_releasePool(device, pool.handle)
    SPOILED.append(pool.handle)
    pool.renew()
    one, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
    one.add_(1)
    graph.capture_end()
    graph.reset()
