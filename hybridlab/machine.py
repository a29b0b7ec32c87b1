"""A machine as the numbers that a step's time is predicted from, given or measured here in a few seconds."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta

from hybridlab import costs, environment
from hybridlab.bench import Bench, Count, Launching, NotNegative, Positive, Reading
from hybridlab.config import DTYPES
from hybridlab.errors import ConfigError, choose
from hybridlab.models import resolve_device


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast a device computes and reads, and what launching costs; the last two by the bytes that a step reads, in
    ascending order. Times in µs. `measure` says how each is found."""

    name: str
    device: Literal["cpu", "cuda"]
    dtype: str
    threads: Count
    matmul_tflops: Positive       # of a large matrix product
    graph_launch_us: NotNegative  # host, one replay of a graph
    read_back_us: NotNegative     # a token id from the device to the host, the wait included
    readings: Annotated[tuple[Reading, ...], Meta(min_length=1)]
    launchings: Annotated[tuple[Launching, ...], Meta(min_length=1)]

    @property
    def read_gbs(self) -> float:
        """GB/s of a streaming read of the largest working set that was measured."""
        return self.readings[-1].read_gbs

    def gemv_gbs(self, working_set: int) -> float:
        """GB/s at which matrix-vector products read `working_set` bytes."""
        return _between(working_set, [(r.bytes, r.gemv_gbs) for r in self.readings])

    def peak_gbs(self, working_set: int) -> float:
        """GB/s at which `working_set` bytes are read at best, by whichever kernel is quicker."""
        return _between(working_set, [(r.bytes, max(r.read_gbs, r.gemv_gbs)) for r in self.readings])

    def launching(self, working_set: int) -> Launching:
        """What launching costs in a step that reads `working_set` bytes."""
        return Launching(working_set, *(
            _between(working_set, [(found.bytes, getattr(found, name)) for found in self.launchings])
            for name in Launching.__struct_fields__[1:]))

    def jit_kernels(self, op: str) -> int:
        """Kernels of a JIT operation: Triton's launches on a GPU, one compiled call on a CPU."""
        return costs.jit_launches(op) if self.device == "cuda" else 1

    def to_json(self) -> str:
        """The machine as text that `from_json` turns back into an equal one."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Machine:
        """A machine from its JSON. Raises `ConfigError` for text that is none."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError("this text is no machine", str(error), "give what Machine.to_json() returned") from None


def _between(at: int, points: Sequence[tuple[int, float]]) -> float:
    """Linear in the logarithm of the size between the measured points, constant beyond them."""
    if at <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if at <= high:
            return before + (after - before) * math.log(at / low) / math.log(high / low)
    return points[-1][1]


def measure(device: str = "auto", dtype: str | None = None, threads: int | None = None) -> Machine:
    """This machine, by the micro-benchmarks of `bench`: seconds, and some more the first time, to compile two kernels.

    `device`: "auto", "cpu" or "cuda"; `dtype`: float32 on a CPU, else float16, if None; `threads`: of a CPU, as PyTorch
    has them if None, and put back afterwards. Raises `ConfigError` for a value that is none of these.
    """
    where = resolve_device(device)
    kind = choose("dtype", dtype or ("float32" if where.type == "cpu" else "float16"), DTYPES)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"threads is {threads!r}", "it counts CPU threads", "give a whole number from 1 on")
    with _threads(threads), torch.no_grad():
        bench = Bench(where, getattr(torch, kind))
        readings, graph_launch_us = bench.readings(), bench.graph_launch_us()
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else environment.report()["cpu"]
        return Machine(
            name=name or platform.machine(), device=where.type, dtype=kind, threads=torch.get_num_threads(),
            matmul_tflops=bench.matmul_tflops(), graph_launch_us=graph_launch_us, read_back_us=bench.read_back_us(),
            readings=readings, launchings=bench.launchings(
                lambda size: _between(size, [(r.bytes, r.gemv_gbs) for r in readings]), graph_launch_us))


def ridge(device: torch.device, dtype: torch.dtype) -> float:
    """The ridge of the roofline for one layer of a decoder, in rows: measured once a process and number of threads.

    A layer of w weights reads w · itemsize bytes and computes 2 · w FLOP a row, so arithmetic takes as long as reading
    at rows = FLOP/s · itemsize / (2 · bytes/s): with fewer rows the time of a step is flat, with more it grows with
    them (S. Williams, A. Waterman, D. Patterson, "Roofline", Communications of the ACM 52(4), 2009). FLOP/s are those
    of a product with many rows, bytes/s those of products with one row, which is what decoding consists of.
    """
    where = torch.device(device.type, torch.cuda.current_device()) if str(device) == "cuda" else device
    return _ridge(where, dtype, torch.get_num_threads())


@cache
def _ridge(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    with torch.no_grad():
        return Bench(device, dtype).ridge()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
