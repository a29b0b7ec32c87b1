"""Triton: the products of `gemv` for the rows of a prompt, where weights are still read once and reading them is most
of the time. Where `hybridlab.tuning` says so, cuBLAS multiplies, and what is left here is the norm before and the gate
after.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab import tuning
from hybridlab.fusedops import halves
from hybridlab.kernels.ahead import Launched, reading
from hybridlab.kernels.gemv import _launch, _start, _tuned
from hybridlab.tuning import LIBRARY, Tile

FEWEST = tuning.TOKENS[1]  # tokens of the smallest tile
BLOCK = 1024


@Launched
@triton.jit
def _norm(x, gain, eps, out, depth: tl.constexpr, padded: tl.constexpr, pdl: tl.constexpr):
    """RMSNorm of one row."""
    _start(pdl)
    row, column = tl.program_id(0).to(tl.int64) * depth, tl.arange(0, padded)
    value = tl.load(x + row + column, mask=column < depth, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / depth + eps)
    result = value * scale * tl.load(gain + column, mask=column < depth, other=0.0).to(tl.float32)
    tl.store(out + row + column, result.to(out.dtype.element_ty), mask=column < depth)


@Launched
@triton.jit
def _gate(both, out, rows, pitch, block: tl.constexpr):
    """A part of one token: `rows` of the gate and after them as many that it lets through. `out` may be the memory of
    the gate."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    gate = both + token * 2 * rows + column
    opened = tl.load(gate, mask=column < rows, other=0.0).to(tl.float32)
    result = opened / (1 + tl.exp(-opened)) * tl.load(gate + rows, mask=column < rows, other=0.0).to(tl.float32)
    tl.store(out + token * pitch + column, result.to(out.dtype.element_ty), mask=column < rows)


@triton.jit
def _times(rows, valid, x, token, tokens, pitch, depth: tl.constexpr, block: tl.constexpr, stages: tl.constexpr):
    """The weights at addresses `rows` times every token, each `pitch` after the one before: [rows, tokens] in float32.

    Weights are the left matrix: a matrix unit takes 64 of its rows at once, and of the right one's columns 8.
    """
    total = tl.zeros([rows.shape[0], token.shape[0]], dtype=tl.float32)
    column = tl.arange(0, block)
    for start in tl.range(0, depth, block, num_stages=stages):
        inside = start + column < depth
        left = tl.load(rows[:, None] + (start + column)[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        right = tl.load(x + token[None, :] * pitch + (start + column)[:, None],
                        mask=(token < tokens)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@Launched
@triton.jit
def _project(x, a, b, c, a_bias, b_bias, c_bias, out, tokens, pitch, width, a_rows, b_rows, c_rows,
             depth: tl.constexpr, biased: tl.constexpr, added: tl.constexpr, pdl: tl.constexpr,
             block_tokens: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr):
    """Rows of up to three matrices, side by side in `out`; `added` to it, or written over it."""
    _start(pdl)
    tile = tl.program_id(0)
    weight, bias, rows, base = a, a_bias, a_rows, 0
    a_tiles, b_tiles = tl.cdiv(a_rows, block_rows), tl.cdiv(b_rows, block_rows)
    if tile >= a_tiles + b_tiles:
        weight, bias, rows, base = c, c_bias, c_rows, a_rows + b_rows
        tile -= a_tiles + b_tiles
    elif tile >= a_tiles:
        weight, bias, rows, base = b, b_bias, b_rows, a_rows
        tile -= a_tiles
    row, token = tile * block_rows + tl.arange(0, block_rows), tl.arange(0, block_tokens)
    result = _times(weight + row.to(tl.int64) * depth, row < rows, x, token, tokens, pitch, depth, block, stages)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    target = out + token[None, :] * width + base + row[:, None]
    if biased:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if added:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _swiglu(x, gate, up, out, tokens, pitch, rows, depth: tl.constexpr, pdl: tl.constexpr,
            block_tokens: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr):
    """A tile holds rows of gate and up in turn, so that one pass over x gives both."""
    _start(pdl)
    half: tl.constexpr = block_rows // 2
    first, token = tl.program_id(0) * half, tl.arange(0, block_tokens)
    slot = tl.arange(0, block_rows)
    feature = first + slot // 2
    both = tl.where(slot % 2 == 0, gate, up) + feature.to(tl.int64) * depth
    total = _times(both, feature < rows, x, token, tokens, depth, depth, block, stages)
    opened, given = tl.split(tl.trans(tl.reshape(total, [half, 2, block_tokens]), 0, 2, 1))
    row = first + tl.arange(0, half)
    tl.store(out + token[None, :] * pitch + row[:, None], (opened / (1 + tl.exp(-opened)) * given).to(
        out.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


def project(x: Tensor, gain: Tensor, eps: float, a: Tensor, b: Tensor | None, c: Tensor | None, a_bias: Tensor | None,
            b_bias: Tensor | None, c_bias: Tensor | None, pdl: bool, out: Tensor, tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.project` of several tokens; biases are given for all matrices or for none."""
    tile = tile or _tuned("project", len(x), out.shape[1], a)
    normed = _normed(x, gain, eps, pdl)
    if tile == LIBRARY and b is not None and len(x) <= tuning.TOKENS[-1]:
        tile = Tile(128, 128 // x.element_size(), 4, 6)  # cuBLAS would multiply by each, one after the other
    if tile != LIBRARY:
        _multiply(normed, (a, b, c), (a_bias, b_bias, c_bias), False, pdl, out, tile)
        return
    _by_library(normed, (a, b, c), (a_bias, b_bias, c_bias), out)


def residual(x: Tensor, weight: Tensor, bias: Tensor | None, pdl: bool, out: Tensor, tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.residual` of several tokens."""
    tile = tile or _tuned("residual", len(x), len(weight), weight)
    if tile != LIBRARY:
        _multiply(x, (weight, None, None), (bias, None, None), True, pdl, out, tile)
        return
    if reading():
        return
    with _fast_library(x):
        out.addmm_(x, weight.t())
    if bias is not None:
        out += bias


def swiglu(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor | None, pdl: bool, out: Tensor,
           tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.swiglu` of several tokens. Where each row of `out` is followed by as much room, the library's
    products lie there."""
    rows, depth = out.shape[1], x.shape[1]
    tile = tile or _tuned("swiglu", len(x), rows, gate)
    normed = _normed(x, gain, eps, pdl)
    if tile != LIBRARY:
        gate, up = halves(gate, up)
        _swiglu[(triton.cdiv(2 * rows, tile.rows),)](normed, gate, up, out, len(x), out.stride(0), rows, depth, pdl,
                                                     _held(x),
                                                     tile.rows, tile.columns, tile.stages, **_launch(pdl, tile))
        return
    both = _twice(out) if out.stride(0) == 2 * rows else x.new_empty(len(x), 2 * rows)
    _by_library(normed, (gate, up), (None, None), both)
    _gate[(len(x), triton.cdiv(rows, BLOCK))](both, out, rows, out.stride(0), BLOCK)


def _twice(out: Tensor) -> Tensor:
    """`out` with what follows each of its rows, as long as they are."""
    tokens, rows = out.shape
    return out.as_strided((tokens, 2 * rows), (2 * rows, 1))


def _by_library(x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], out: Tensor) -> None:
    """Products with each matrix, side by side in `out`."""
    if reading():
        return
    base = 0
    with _fast_library(x):
        for weight, bias in zip(weights, biases, strict=True):
            if weight is not None:
                part = out[:, base:base + len(weight)]
                torch.mm(x, weight.t(), out=part) if bias is None else torch.addmm(bias, x, weight.t(), out=part)
                base += len(weight)


@contextmanager
def _fast_library(x: Tensor) -> Iterator[None]:
    """On a GPU, products by cuBLASLt: of Llama-2-7B at 112 rows it takes 113 µs a layer on an H200, cuBLAS 127."""
    if not x.is_cuda:
        yield
        return
    _warned()
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@cache
def _warned() -> None:
    """PyTorch warns once in a process that choosing a library is experimental; here that would tell nobody anything.

    Its warnings pass through Python's filters only inside of calls that look for them, as `apply_` does; elsewhere
    they are written to the process's standard error.
    """
    before = torch.backends.cuda.preferred_blas_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1).apply_(lambda _: float(torch.backends.cuda.preferred_blas_library("cublaslt") is None))
    torch.backends.cuda.preferred_blas_library(before)


def _normed(x: Tensor, gain: Tensor, eps: float, pdl: bool) -> Tensor:
    tokens, depth = x.shape
    out = torch.empty_like(x)
    _norm[(tokens,)](x, gain, eps, out, depth, triton.next_power_of_2(depth), pdl, **_launch(pdl))
    return out


def _multiply(x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], added: bool, pdl: bool,
              out: Tensor, tile: Tile) -> None:
    sizes = [0 if weight is None else len(weight) for weight in weights]
    given = [x if weight is None else weight for weight in weights] + [x if bias is None else bias for bias in biases]
    _project[(sum(triton.cdiv(size, tile.rows) for size in sizes),)](
        x, *given, out, len(x), x.stride(0), sum(sizes), *sizes, x.shape[1], biases[0] is not None, added, pdl,
        _held(x), tile.rows, tile.columns, tile.stages, **_launch(pdl, tile))


def _held(x: Tensor) -> int:
    """Tokens of a tile, which a power of two must be."""
    return max(FEWEST, triton.next_power_of_2(len(x)))
