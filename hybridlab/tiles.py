"""Candidate tiles of one matrix product: compiled, held against the specification, timed on random weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridlab import fusedops, kernels, tuning
from hybridlab.errors import MeasureError
from hybridlab.tuning import LIBRARY, Tile

OF_ONE = tuple(Tile(*sizes) for sizes in (
    (1, 1024, 2), (1, 2048, 4), (1, 4096, 4), (1, 4096, 8), (2, 1024, 2), (2, 1024, 4), (2, 2048, 4), (2, 2048, 8),
    (2, 4096, 8), (4, 512, 4), (4, 1024, 4), (4, 1024, 8), (4, 2048, 8), (4, 4096, 16), (8, 256, 4), (8, 512, 4),
    (8, 512, 8), (8, 1024, 8), (16, 128, 4), (16, 256, 4), (16, 256, 8), (16, 512, 8)))
OF_SEVERAL = (LIBRARY, *(Tile(*sizes) for sizes in (  # a matrix unit takes 64 rows at once
    (32, 128, 4, 4), (32, 256, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4),
    (64, 256, 4, 3), (128, 64, 4, 4), (128, 64, 4, 6), (128, 64, 8, 6), (128, 128, 8, 3))))
LAUNCHES, TIMINGS, WARM = 32, 7, 2  # launches of a graph, at least; its timed replays; replays before them
BEYOND_CACHE = 4   # times the L2 cache that all copies of the weights hold
MOST_COPIES = 256  # where a matrix is so small that a graph of more would take longer to build than to judge
READ_BYTES = 2 * 2**30
EPS = 1e-5         # of the norm
CLOSE = 0.02       # of the largest value; bfloat16 has 8 bits

Launch = Callable[[], object]
Clock = Callable[[Sequence[Launch]], list[float]]  # µs of one launch, once for each replay of a graph of them all
Tick = Callable[[str], None]                       # one step is done, and what it was


class Product(NamedTuple):
    """One product of a step of `tokens`: the rows its table entry is under, its depth, and the rows of each matrix."""

    op: str
    rows: int
    depth: int
    parts: tuple[int, ...]
    tokens: int = 1

    def key(self, dtype: str) -> tuning.Key:
        return self.op, self.tokens, self.rows, self.depth, dtype

    def __str__(self) -> str:
        return f"{self.op} {self.rows:,} × {self.depth:,}" + (f", {self.tokens} tokens" if self.tokens > 1 else "")


def candidates(tokens: int) -> tuple[Tile, ...]:
    """What a product of `tokens` is timed with."""
    return OF_ONE if tokens == 1 else OF_SEVERAL


class Found(NamedTuple):
    """The times of every tile that ran, in µs, and why the others did not."""

    times: dict[Tile, list[float]]
    left_out: dict[Tile, str]

    def us(self, tile: Tile) -> float:
        return statistics.median(self.times[tile])

    @property
    def best(self) -> Tile:
        return min(self.times, key=self.us)


class Weights:
    """Random matrices of one product in `copies`, which launches take in turn, so that none finds its own in a cache,
    and what else the product needs. `pdl` as in `FusedStep`."""

    def __init__(self, product: Product, dtype: torch.dtype, device: torch.device, copies: int, pdl: bool) -> None:
        self.product, self.pdl = product, pdl
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

        depth, of = product.depth, (product.tokens,) if product.tokens > 1 else ()
        together = (sum(product.parts),)  # as `layout` lays them
        self.copies = [[noise(rows, depth, std=depth**-0.5) for rows in together] for _ in range(copies)]
        self.x, self.gain = noise(*of, depth), noise(depth)
        self.out = torch.zeros(*of, product.rows, dtype=dtype, device=device)
        fusedops.REFERENCE[product.op](*self.arguments(self.copies[0]))
        self.exact = self.out.double()

    def arguments(self, matrices: Sequence[Tensor], pdl: bool | None = None) -> tuple[Any, ...]:
        """Of the operation over one copy; `pdl` None: as these weights were made for."""
        pdl = self.pdl if pdl is None else pdl
        if self.product.op == "residual":
            return self.x, matrices[0], None, pdl, self.out
        every = [*matrices, None, None][:3] + [None] * 3 if self.product.op == "project" else [*matrices, None]
        return self.x, self.gain, EPS, *every, pdl, self.out

    def launches(self, tile: Tile) -> list[partial[None]]:
        """Of every copy equally often."""
        rounds = math.ceil(LAUNCHES / len(self.copies))
        kernel = (kernels.TRITON if self.product.tokens == 1 else kernels.OF_SEVERAL)[self.product.op]
        return [partial(kernel, *self.arguments(matrices), tile=tile) for matrices in self.copies] * rounds

    def problem(self, tile: Tile) -> str:
        """Why `tile` must not be used here, after compiling and running it once; "" if it may."""
        self.out.zero_()  # what `residual` adds to
        try:
            self.launches(tile)[0]()
            off = off_by(self.out, self.exact)
        except Exception as error:  # Triton, LLVM, ptxas and the driver each have their own
            return _reason(error)
        return "" if off < CLOSE else "wrong result"  # NaN is not below either


def off_by(made: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((made.double() - exact).abs().max() / exact.abs().max())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:120]


def search(weights: Weights, clock: Clock, candidates: Sequence[Tile],
           tick: Tick = lambda _: None) -> Found:
    """Times every candidate that compiles, runs and computes the product, all of them compiled first.

    Raises `MeasureError` if there is none.
    """
    times: dict[Tile, list[float]] = {}
    left_out: dict[Tile, str] = {}
    for tile in candidates:
        if problem := weights.problem(tile):
            left_out[tile] = problem
        tick("compiling")
    for tile in candidates:
        if tile not in left_out:
            try:
                times[tile] = clock(weights.launches(tile))
            except Exception as error:  # as in `problem`: what fails only in a graph
                left_out[tile] = _reason(error)
        tick("timing")
    if not times:
        first = next(iter(left_out.values()), "")
        raise MeasureError(f"none of {len(candidates)} tiles ran", f"{weights.product}, the first: {first}",
                           "see `hybridlab env`; the default tile stays in use")
    return Found(times, left_out)


def replays_us(launches: Sequence[Launch]) -> list[float]:
    """µs of one of `launches`, for each of several replays of a CUDA graph of them all.

    Replays are queued without a wait between them: launching one on the host hides behind the one before.
    """
    launches[0]()  # what is loaded on first use must not be loaded inside a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMINGS + 1)]
    for _ in range(WARM):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [1e3 * before.elapsed_time(after) / len(launches)
            for before, after in pairwise(events)]


def read_gbs(device: torch.device, clock: Clock) -> float:
    """GB/s at which a plain reduction reads memory that no cache holds."""
    values = torch.ones(READ_BYTES // 4, device=device)
    total = torch.zeros((), device=device)
    return float(values.nbytes / statistics.median(clock([partial(torch.sum, values, dim=0, out=total)] * 4)) / 1e3)


def copies_of(size: int, cache: int) -> int:
    """How many copies of `size` bytes are several times as much as a cache holds, within reason; two at least."""
    return min(MOST_COPIES, max(2, math.ceil(BEYOND_CACHE * cache / size)))
